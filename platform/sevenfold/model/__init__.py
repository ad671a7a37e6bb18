"""Models: built from transformers' configs and classes, and parallelized over ranks."""
