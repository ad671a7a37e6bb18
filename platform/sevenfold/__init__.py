"""Pretrain, fine-tune, evaluate and tune language models on a Ray cluster."""

import os

__version__ = "0.1.0"

# read by transformers when it is imported; see sevenfold.model.hub_kernels
os.environ["USE_HUB_KERNELS"] = "0"
