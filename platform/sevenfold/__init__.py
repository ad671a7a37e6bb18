"""Pretrain, fine-tune, evaluate and tune language models on a Ray cluster."""

import os
import sys

__version__ = "0.1.0"

# read by transformers when it is imported; see sevenfold.model.hub_kernels
os.environ["USE_HUB_KERNELS"] = "0"


def _leave_out_current_folder() -> None:
    """Keeps the imports that follow from modules in the current folder.

    One may stand in a folder that was handed over, with a numpy.py in it. Python itself looks there
    first for `python -m sevenfold.cli`, and if PYTHONPATH has an empty entry, which is mostly an
    accident: `PYTHONPATH=$PYTHONPATH:/folder`. An entry that names the folder is kept.
    """
    if sys.flags.safe_path:
        return
    here = ("", os.getcwd())
    arguments = sys.orig_argv
    module = arguments[arguments.index("-m") + 1 :][:1] if "-m" in arguments else []
    first = 1  # the first entry is that of the script or of the interpreter
    if module and module[0].split(".")[0] == __name__ and sys.path and sys.path[0] in here:
        del sys.path[0]
        first = 0
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if len(entries) > 1 and "" in entries:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, entries))
        if os.getcwd() not in entries:
            sys.path[first:] = [path for path in sys.path[first:] if path not in here]


_leave_out_current_folder()
