"""Finds out how a text file is encoded and how its lines end."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace

from sevenfold import storage
from sevenfold.data.sources.shards import Shard
from sevenfold.data.sources.text_blocks import blocks
from sevenfold.errors import InputError
from sevenfold.recipe import Source
from sevenfold.report.console import say

# Python's names of what is read as UTF-8
_UTF8 = ("utf-8", "utf-8-sig", "ascii")


def with_text_format(shard: Shard, source: Source) -> Shard:
    """Returns a shard with its encoding and its newline, from its first megabyte.

    Raises:
        InputError: The source's encoding is `auto`, and no encoding fits.
        OSError: The file is damaged, or not in the source's encoding.
        EOFError: It is truncated.
    """
    if shard.format == "parquet":
        return shard
    if source.encoding == "auto":
        encoding = _guess(shard)
    else:
        encoding = codecs.lookup(source.encoding or "utf-8").name
    shard = replace(shard, encoding="" if encoding in _UTF8 else encoding)
    head = _first_block(shard)
    has_only_returns = b"\r" in head[:-1] and b"\n" not in head
    if has_only_returns and (source.separator or shard.format == "jsonl"):
        return replace(shard, newline="CR")
    return shard


def report_encodings(shards: Sequence[Shard], sources: Sequence[Source]) -> None:
    """Prints the encodings that were guessed, and which files they are of."""
    for index, source in enumerate(sources):
        if source.encoding != "auto":
            continue
        paths: dict[str, list[str]] = {}
        for shard in shards:
            if shard.source == index:
                paths.setdefault(shard.encoding or "utf-8", []).append(shard.path)
        for encoding, files in paths.items():
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            say(f"source {source.name}: guessed the encoding {encoding} for {files[0]}{more}")


def _first_block(shard: Shard) -> bytes:
    with storage.open_read(shard.path) as file:
        return next(blocks(file, shard), b"")


def _guess(shard: Shard) -> str:
    """Returns UTF-8 if it fits, else the encoding that charset-normalizer ranks first."""
    from charset_normalizer import from_bytes

    head = _first_block(shard)
    try:
        # the last character may be cut
        codecs.getincrementaldecoder("utf-8")().decode(head)
        if b"\0" not in head:
            return "utf-8"
    except UnicodeDecodeError:
        pass
    best = from_bytes(head).best()
    if best is None:
        raise InputError(
            f"{shard.path}: encoding: auto: no encoding fits the text: name it in the source's "
            "`encoding`"
        )
    return codecs.lookup(best.encoding).name
