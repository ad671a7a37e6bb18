"""Pretrain, fine-tune, evaluate and tune language models on a Ray cluster."""

__version__ = "0.1.0"
