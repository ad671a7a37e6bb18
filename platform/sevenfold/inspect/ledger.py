"""The command `ledger`: the documents that a step of a run read, and its tensors, rebuilt."""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save

from sevenfold import storage
from sevenfold.data.ledger import Ledger, Replay
from sevenfold.data.stream import ReadRange
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.engine.objectives import Support, build_objective
from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.prepare.job import read_recipe
from sevenfold.prepare.streams import open_streams
from sevenfold.recipe import Recipe
from sevenfold.report.console import say, table
from sevenfold.run_folder import RunFolder

SHOWN = 24  # documents shown in the terminal
SHOWN_TOKENS = 48  # tokens shown of the first row


class _Step(NamedTuple):
    """A step of a run, as the ledger records it.

    Attributes:
        replay: Reproduces the rows of the run.
        draws: The ledger's entries of the step, sorted by lane.
        recipe: The run's recipe.
    """

    replay: Replay
    draws: list[ReadRange]
    recipe: Recipe


def which(path: str, step: int, out: str | None = None) -> None:
    """Prints a step's documents by source, and the first of them.

    Args:
        path: The run's folder.
        step: The step, from 1.
        out: A parquet file, to which all documents of the step are written.

    Raises:
        InputError: There is no run, its ledger does not have the step, or a source has changed.
        RunError: The rows are not those that were trained on.
    """
    replayer, draws, _ = _open(path, step, out, ".parquet")
    replayer.rows(draws)  # raises RunError if they are not the step's
    pieces = replayer.documents(draws)
    tokens: Counter[str] = Counter()
    documents: dict[str, set[tuple[str, str, int]]] = {}
    for piece in pieces:
        source = piece["source"]
        tokens[source] += piece["tokens"]
        documents.setdefault(source, set()).add((piece["shard"], piece["place"], piece["document"]))
    total = sum(tokens.values())
    rows = [(name, len(documents[name]), n, f"{n / total:.1%}") for name, n in tokens.most_common()]
    table(
        f"{path}: step {step} (data step {draws[0].data_step})",
        ["source", "documents", "tokens", "share of tokens"],
        rows,
    )
    table(
        f"the first {min(SHOWN, len(pieces))} of {len(pieces)} documents or pieces of documents",
        ["row", "offset", "tokens", "hash", "document", "file and place"],
        [
            (
                piece["row"],
                piece["offset"],
                piece["tokens"],
                piece["hash"],
                piece["document"],
                f"{piece['shard']}: {piece['place']}",
            )
            for piece in pieces[:SHOWN]
        ],
    )
    if out:
        pq.write_table(pa.Table.from_pylist(pieces), out)
        say(f"full list: {out}")


def replay(path: str, step: int, out: str | None = None) -> None:
    """Rebuilds the tensors of a step and checks them against the ledger.

    Args:
        path: The run's folder.
        step: The step, from 1.
        out: A safetensors file, to which the tensors are written.

    Raises:
        InputError: There is no run, its ledger does not have the step, or a source has changed.
        RunError: The rows are not those that were trained on.
    """
    replayer, draws, recipe = _open(path, step, out, ".safetensors")
    rows = replayer.rows(draws)
    tokenizer = load_tokenizer(RunFolder.existing(path).tokenizer)
    config = build.config_of(recipe, len(tokenizer), tokenizer)
    batch = build_objective(recipe, tokenizer, config, Support()).collate(rows, step - 1)
    say(
        f"step {step}: {len(rows)} rows of {rows.tokens.shape[1]} tokens; "
        f"all {len(draws)} hashes match the ledger"
    )
    say(f"hash of the step: {rows.hash():016x}")
    say(f"row 0 starts with: {tokenizer.decode(batch.input_ids[0, :SHOWN_TOKENS])!r}")
    if out:
        tensors = {k: v for k, v in vars(batch).items() if k != "decoder" and v is not None}
        if batch.decoder:
            tensors |= {f"decoder_{k}": v for k, v in vars(batch.decoder).items()}
        # save_file would create a file that only its owner can read, whatever the umask
        storage.write(os.path.abspath(out), save({k: v.contiguous() for k, v in tensors.items()}))
        say(f"{', '.join(tensors)}: {out}")


def _open(path: str, step: int, out: str | None, suffix: str) -> _Step:
    """Opens a run's step, after checking that `out` can be written and has the suffix."""
    if out and not (out.endswith(suffix) and os.path.isdir(os.path.dirname(out) or ".")):
        raise InputError(f"--out {out}: expected a {suffix} file in an existing folder")
    folder = RunFolder.existing(path)
    draws = Ledger(folder.ledger).step(step)
    recipe = read_recipe(folder)
    stream, _ = open_streams(folder, recipe)
    return _Step(Replay(stream), draws, recipe)
