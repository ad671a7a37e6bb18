"""Ray job: fine-tunes a model.

Usage: ray job submit --working-dir . -- python jobs/finetune.py RECIPE [key.path=value ...]
"""

import sys
from pathlib import Path

# Import sevenfold from this checkout, even if another version is installed. This replaces the
# folder jobs/ in sys.path, whose tokenize.py would hide the module of Python's standard library.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from sevenfold.cli import job  # noqa: E402 (needs the path that is set above)

if __name__ == "__main__":
    job("finetune")
