"""Examines every model type of transformers: trained right, or refused?

    python benchmarks/families.py [--json FILE] [--table FILE] [--only TYPE ...]

A tiny model of each type of transformers' causal, masked and sequence-to-sequence language models
is trained for a few steps, saved, resumed, exported, and trained with an adapter; its losses and
gradients are compared with those of transformers' own model, one document at a time (the code is
tests/helpers/families.py). It takes about ten minutes on two idle cores.

The claim `accepted_are_right`: the share of accepted types without a problem is 1. The numbers of
accepted and refused types and the reasons are printed. --table writes docs/model_families.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "tests")]

import measure  # noqa: E402
from helpers.families import Outcome, examine, model_types  # noqa: E402

PROCESSES = 2
TYPES_PER_PROCESS = 20  # a fresh process returns the memory of the models before
OBJECTIVES = {
    "causal": "causal, sft, dpo",
    "masked": "masked",
    "denoise": "denoise, seq2seq",
}
HEAD = """# Model types

Written by `python benchmarks/families.py --table docs/model_families.md` (transformers {version}):
a tiny model of each type is trained, saved, resumed, exported and trained with an adapter, and its
losses and gradients are compared with those of transformers' own model, one document at a time.

Every run tries its own model in the same way before anything starts, on a tiny copy of the very
config; the table says what to expect. *packed*: documents share rows. *one per row*: the model does
not keep packed documents apart, so each document becomes a padded row, which takes more time and
memory.
"""


def _begin() -> None:
    """Prepares a process: one rank, one thread, no progress bars."""
    import torch
    import torch.distributed as dist
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    store = os.path.join(tempfile.mkdtemp(), "store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def _cell(message: str) -> str:
    """Returns a message as the cell of a table, without the temporary path that it begins with.

    Sets, whose order differs from run to run, are sorted.
    """
    text = re.sub(r"^/\S+: ", "", " ".join(message.split()))
    text = re.sub(r"\{('[^{}]*')\}", lambda m: f"{{{', '.join(sorted(m[1].split(', ')))}}}", text)
    return text.replace("|", "/")


def _examine(of: tuple[str, str]) -> Outcome:
    return examine(*of)


def write_table(outcomes: dict[tuple[str, str], Outcome], path: Path) -> None:
    """Writes the accepted and the refused types as Markdown."""
    import transformers

    lines = [HEAD.format(version=transformers.__version__)]
    for objective, names in OBJECTIVES.items():
        found = {t: o for (name, t), o in outcomes.items() if name == objective}
        packed = [t for t, o in found.items() if not o.refused and o.packed]
        padded = [t for t, o in found.items() if not o.refused and not o.packed]
        lines += [
            f"## {names}\n",
            f"packed ({len(packed)}): {', '.join(sorted(packed))}\n",
            f"one per row ({len(padded)}): {', '.join(sorted(padded))}\n",
            "| no adapter of all linear layers | reason |\n|-|-|",
            *(f"| {t} | {_cell(o.no_adapter)} |" for t, o in sorted(found.items()) if o.no_adapter),
            "",
            "| refused | reason |\n|-|-|",
            *(f"| {t} | {_cell(o.refused)} |" for t, o in sorted(found.items()) if o.refused),
            "",
        ]
    path.write_text("\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", nargs="+", help="model types")
    arguments = parser.parse_args()
    types = [t for t in model_types() if not arguments.only or t[1] in arguments.only]
    outcomes = {}
    # not ProcessPoolExecutor, which hangs with max_tasks_per_child (Python 3.11)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(PROCESSES, initializer=_begin, maxtasksperchild=TYPES_PER_PROCESS) as pool:
        results = pool.imap(_examine, types)
        for (objective, model_type), outcome in zip(types, results, strict=True):
            outcomes[objective, model_type] = outcome
            state = "packed" if outcome.packed else "one per row"
            found = outcome.refused or "; ".join(outcome.problems) or state
            print(f"{objective:8} {model_type:24} {found[:150]}", flush=True)
    accepted = [o for o in outcomes.values() if not o.refused]
    reasons = Counter(o.refused.split(": ")[-1][:100] for o in outcomes.values() if o.refused)
    counts = [[str(n), reason] for reason, n in reasons.most_common()]
    measure.show(f"{len(outcomes) - len(accepted)} refused", ["types", "reason"], counts)
    if arguments.table:
        write_table(outcomes, arguments.table)
    right = sum(not o.problems for o in accepted)
    print(f"{len(accepted)} accepted, {right} of them without a problem")
    claims = [measure.claim("accepted_are_right", right / max(1, len(accepted)), None, 1)]
    return 0 if measure.report(claims, arguments.json) else 1


if __name__ == "__main__":
    sys.exit(main())
