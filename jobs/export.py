"""A checkpoint as a Hugging Face directory: ray job submit ... -- python jobs/export.py RUN [--step N] [--out FOLDER]"""

import sys
from pathlib import Path

# the checkout's library, whatever is installed; and not this folder, whose tokenize.py is not Python's
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from sevenfold.cli import job  # noqa: E402

if __name__ == "__main__":
    job("export")
