"""Exports of checkpoints as Hugging Face directories, with model cards."""
