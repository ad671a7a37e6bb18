"""Finds out how a text file is encoded and how its lines end."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace

from sevenfold import storage
from sevenfold.data.sources.shards import Shard, separator
from sevenfold.data.sources.text_blocks import BLOCK_BYTES, blocks
from sevenfold.errors import InputError
from sevenfold.recipe import Source
from sevenfold.report.console import say

# Python's names of what is read as UTF-8
_UTF8 = ("utf-8", "utf-8-sig", "ascii")
HEAD_BYTES = 64 * 2**10  # read at the beginning of each file


def with_text_format(shard: Shard, source: Source, file: storage.Reader) -> Shard:
    """Returns a shard with its encoding and its newline, from the beginning of its opened file.

    Raises:
        InputError: The source's encoding is `auto`, and no encoding fits.
        OSError: The file is damaged, or not in the source's encoding.
        EOFError: It is truncated.
    """
    if shard.is_binary:
        return shard
    if source.encoding == "auto":
        encoding = _guess(shard, file)
    else:
        encoding = codecs.lookup(source.encoding or "utf-8").name
    shard = replace(shard, encoding="" if encoding in _UTF8 else encoding)
    file.seek(0)
    head = b""
    for block in blocks(file, shard, HEAD_BYTES):
        head += block
        if b"\n" in head or len(head) >= BLOCK_BYTES:
            break
    has_only_returns = b"\r" in head[:-1] and b"\n" not in head
    if has_only_returns and separator(shard, source):
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


def _guess(shard: Shard, file: storage.Reader) -> str:
    """Returns UTF-8 if it fits, else the encoding that charset-normalizer ranks first."""
    from charset_normalizer import from_bytes

    file.seek(0)
    head = next(blocks(file, shard), b"")
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
