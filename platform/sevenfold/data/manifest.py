"""The manifest: every shard of every source, cut into row groups. A run keeps the one that it began with."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from sevenfold import storage
from sevenfold.data import formats, shards
from sevenfold.data.shards import RowGroup, Shard
from sevenfold.errors import InputError
from sevenfold.recipe import Source

TARGET_BYTES = 2 * 2**20  # of text in a row group
_LEAST_BYTES, _LEAST_EXAMPLES = 8 * 2**10, 2**10
_AT_ONCE = 16  # shards looked at: their storage may be far
_COLUMNS = tuple(f.name for f in fields(RowGroup))


@dataclass(frozen=True)
class Manifest:
    """Row groups lie in the order of their sources, shards and rows.

    Attributes:
        table: int64 [row groups, 6], the fields of a RowGroup.
        left_out: what was wrong with shards that were left out (on_bad_document: skip).
        tokens_per_byte: of each source, measured on a sample; () before there is a tokenizer.
    """

    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    table: np.ndarray
    left_out: tuple[str, ...] = ()
    tokens_per_byte: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def group(self, index: int) -> RowGroup:
        return RowGroup(*self.table[index].tolist())

    @functools.cached_property
    def bytes(self) -> int:
        return int(self.table[:, 5].sum())

    @property
    def documents(self) -> int | None:
        """None where a text file among the shards was not read to count them."""
        counts = self.table[:, 4]
        return int(counts.sum()) if counts.all() else None

    @functools.cached_property
    def spans(self) -> tuple[range, ...]:
        """The row groups of each source."""
        source = np.array([s.source for s in self.shards])[self.table[:, 0]]
        ends = np.searchsorted(source, np.arange(len(self.sources) + 1))
        return tuple(range(int(a), int(b)) for a, b in itertools.pairwise(ends))

    def tokens(self, source: int) -> float:
        """Tokens of a source, estimated."""
        span = self.spans[source]
        size = float(self.table[span.start : span.stop, 5].sum())
        return size * (self.tokens_per_byte[source] if self.tokens_per_byte else 0.25)

    def to_json(self) -> dict[str, Any]:
        return {
            "sources": [s.model_dump(mode="json") for s in self.sources],
            "shards": [vars(s) for s in self.shards],
            "row_groups": {c: self.table[:, i].tolist() for i, c in enumerate(_COLUMNS)},
            "left_out": list(self.left_out),
            "tokens_per_byte": list(self.tokens_per_byte),
        }

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Manifest:
        table = np.array([tree["row_groups"][c] for c in _COLUMNS], np.int64).T
        return Manifest(
            tuple(Source(**s) for s in tree["sources"]), tuple(Shard(**s) for s in tree["shards"]),
            np.ascontiguousarray(table), tuple(tree["left_out"]), tuple(tree["tokens_per_byte"]),
        )  # fmt: skip

    def hash(self) -> str:
        """Of what is read: shards, row groups, sources."""
        tree = self.to_json()
        del tree["left_out"], tree["tokens_per_byte"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    def measured(self, tokens_per_byte: Sequence[float]) -> Manifest:
        return replace(self, tokens_per_byte=tuple(tokens_per_byte))

    def check_unchanged(self) -> None:
        """Raises InputError, naming the file, where a source is no longer what this manifest says."""
        then = {s.path: s.fingerprint for s in self.shards}
        now = {path for _, path in _listed(self.sources)}
        left_out = {message.partition(": ")[0] for message in self.left_out}
        for path in sorted(then.keys() | (now - left_out)):
            what = "is gone" if path not in now else "is new" if path not in then else None
            if what:
                raise InputError(f"{path}: {what} since this run began: {_MEND}")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = pool.map(shards.fingerprint, then)
            for path, fingerprint in zip(then, found, strict=True):
                if fingerprint != then[path]:
                    raise InputError(f"{path}: has changed since this run began: {_MEND}")


_MEND = "put it back as it was, or start a run of another name"


def scan(
    sources: Sequence[Source], objective: str, windows: int = 1, on_bad: Literal["error", "skip"] = "error",
    most: int = TARGET_BYTES,
) -> Manifest:  # fmt: skip
    """Looks at every shard: footers of parquet, sizes of text, compressed files as a whole; no document is kept.

    Args:
        objective: what is learnt from them: decides which columns are read (data/formats.py).
        windows: into how many an epoch should at least be cut: row groups of a small corpus are made small for it.
        most: bytes of text that a row group should have at most.

    Raises:
        InputError: a path without shards, nothing in all shards; unless on_bad is skip, the first shard that is not what
            its name says, lacks a column, is truncated, empty, a bomb, or the copy of another.
    """
    listed = _listed(sources)
    left_out: list[str] = []
    found: list[Shard] = []
    seen: dict[str, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for shard in pool.map(lambda item: shards.describe(item[1], item[0], sources[item[0]]), listed):
            twin = seen.setdefault(shard.fingerprint, shard.path)
            if twin is shard.path or shard.fingerprint.startswith("0-"):
                found.append(shard)
            else:
                what = "is named twice" if twin == shard.path else f"is a copy of {twin}"
                _refuse(f"{shard.path}: {what}: each document should be there once", on_bad, left_out)
        sources = [_recognised(source, i, objective, found) for i, source in enumerate(sources)]
        total = sum(int(s.fingerprint.partition("-")[0]) for s in found)
        least = _LEAST_EXAMPLES if objective in formats.SHAPES else _LEAST_BYTES
        target = max(least, min(most, TARGET_BYTES, 3 * total // max(1, 4 * windows)))

        def cut(item: tuple[int, Shard]) -> list[RowGroup] | str:
            number, shard = item
            source = sources[shard.source]
            columns = formats.read_columns(source)
            others = sorted({f.column for f in source.filters} - set(columns))
            try:
                return shards.cut(number, shard, source, columns, others, target)
            except InputError as e:
                return str(e)

        groups: list[RowGroup] = []
        for result in pool.map(cut, enumerate(found)):
            if isinstance(result, str):
                _refuse(result, on_bad, left_out)
            else:
                groups += result
    names = [s.name for s in sources]
    for i, name in enumerate(names):
        if not any(found[g.shard].source == i for g in groups):
            why = f" ({left_out[0]})" if left_out else ""
            raise InputError(f"source {name!r}: expected documents in {sources[i].path}, found none{why}")
    table = np.array([list(vars(g).values()) for g in groups], np.int64).reshape(-1, len(_COLUMNS))
    return Manifest(tuple(sources), tuple(found), table, tuple(left_out))


def _recognised(source: Source, number: int, objective: str, found: Sequence[Shard]) -> Source:
    first = next((s for s in found if s.source == number), None)
    if first is None or objective not in formats.SHAPES:
        return source
    return formats.recognise(source, objective, shards.columns(first), first.path, more=first.format == "jsonl")


def _listed(sources: Sequence[Source]) -> list[tuple[int, str]]:
    return [(i, p) for i, s in enumerate(sources) for p in storage.files(storage.locate(s.path), shards.suffixes(s))]


def _refuse(message: str, on_bad: str, left_out: list[str]) -> None:
    if on_bad == "error":
        raise InputError(f"{message}; or leave such shards out (data.on_bad_document=skip)")
    left_out.append(message)
