"""The ledger as a tool: which documents a step read, and its tensors once more."""

from __future__ import annotations

import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file

from sevenfold.data.ledger import Ledger, Replay
from sevenfold.data.stream import Draw
from sevenfold.data.tokens import load_tokenizer
from sevenfold.engine import tuning
from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.recipe import Recipe
from sevenfold.report.console import say, table
from sevenfold.runs import prepare
from sevenfold.storage import RunFolder

SHOWN = 24  # documents in the terminal
SHOWN_TOKENS = 48  # of the first row


def which(path: str, step: int, out: str | None = None) -> None:
    """Prints the documents of a step by source, and the first of them; all of them into a parquet file.

    Raises:
        InputError: no run, a step that its ledger does not know, a source that has changed.
        RunError: the rows are no longer those that were trained on.
    """
    replay, draws, _ = _open(path, step, out, ".parquet")
    replay.rows(draws)  # refuses where they are not the step's
    found = replay.documents(draws)
    tokens: Counter[str] = Counter()
    documents: dict[str, set[tuple[str, str, int]]] = {}
    for d in found:
        tokens[d["source"]] += d["tokens"]
        documents.setdefault(d["source"], set()).add((d["shard"], d["place"], d["document"]))
    total = sum(tokens.values())
    rows = [(name, len(documents[name]), n, f"{n / total:.1%}") for name, n in tokens.most_common()]
    table(f"{path}: step {step} (data step {draws[0].data_step})", ["source", "documents", "tokens", "share"], rows)
    table(
        f"the first {min(SHOWN, len(found))} of {len(found)} pieces",
        ["row", "at", "tokens", "hash", "document", "shard, place"],
        [(d["row"], d["offset"], d["tokens"], d["hash"], d["document"], f"{d['shard']}: {d['place']}") for d in found[:SHOWN]],
    )
    if out:
        pq.write_table(pa.Table.from_pylist(found), out)
        say(f"all of them: {out}")


def replay(path: str, step: int, out: str | None = None) -> None:
    """Makes the tensors of a step again and checks them against the ledger; into a safetensors file. Raises as `which`."""
    again, draws, recipe = _open(path, step, out, ".safetensors")
    rows = again.rows(draws)
    tokenizer = load_tokenizer(RunFolder.of(path).tokenizer)
    config = build.config_of(recipe, len(tokenizer), tokenizer)
    batch = tuning.of(recipe, tokenizer, config).collate(rows, step - 1)
    say(f"step {step}: {len(rows)} rows of {rows.tokens.shape[1]} tokens, {len(draws)} draws: every hash is the ledger's")
    say(f"hash of the whole step: {rows.hash():016x}")
    say(f"row 0 begins: {tokenizer.decode(batch.input_ids[0, :SHOWN_TOKENS])!r}")
    if out:
        tensors = {k: v for k, v in vars(batch).items() if k != "decoder" and v is not None}
        tensors |= {f"decoder_{k}": v for k, v in vars(batch.decoder).items()} if batch.decoder else {}
        save_file({k: v.contiguous() for k, v in tensors.items()}, out)
        say(f"{', '.join(tensors)}: {out}")


def _open(path: str, step: int, out: str | None, suffix: str) -> tuple[Replay, list[Draw], Recipe]:
    if out and not (out.endswith(suffix) and os.path.isdir(os.path.dirname(out) or ".")):
        raise InputError(f"--out {out}: expected a file {suffix} in a folder that exists")
    folder = RunFolder.of(path)
    draws = Ledger(folder.ledger).step(step)
    recipe = prepare.recipe_of(folder)
    stream, _ = prepare.reopen(folder, recipe)
    return Replay(stream), draws, recipe
