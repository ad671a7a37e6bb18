"""Pretraining: ray job submit --working-dir . -- python jobs/pretrain.py RECIPE [key.path=value ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))  # the checkout's library, whatever is installed

from sevenfold.cli import job

if __name__ == "__main__":
    job("pretrain")
