"""Folders with data that cannot be read, or would take all time or memory."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def make_fifo(folder: Path) -> None:
    os.mkfifo(folder / "a.jsonl")


def make_link_to_fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "a.txt").symlink_to("pipe")


def make_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / "a.txt"))


def make_device(folder: Path) -> None:
    (folder / "a.txt").symlink_to("/dev/zero")


def make_link_to_itself(folder: Path) -> None:
    (folder / "a.txt").symlink_to("a.txt")


def write_json(value: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "a.jsonl").write_text(
            '{"text": "good"}\n{"text": ' + value + '}\n{"text": "good"}\n'
        )

    return make


def write_parquet(field: str, value: int) -> Callable[[Path], None]:
    """Returns a function that writes a file whose footer declares another value of a field."""

    def make(folder: Path) -> None:
        path = folder / "a.parquet"
        texts = [f"{i:05d}" * 20 for i in range(1009)]
        pq.write_table(pa.table({"text": texts}), path, compression="none", use_dictionary=False)
        group = pq.ParquetFile(path).metadata.row_group(0)
        actual = group.num_rows if field == "rows" else group.column(0).total_compressed_size
        raw = path.read_bytes()
        length = struct.unpack("<I", raw[-8:-4])[0]
        footer = raw[-8 - length : -8].replace(zigzag(actual), zigzag(value))
        path.write_bytes(raw[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1")

    return make


def zigzag(number: int) -> bytes:
    """Returns a positive integer as it is encoded in a parquet footer (Thrift's compact form)."""
    number <<= 1
    encoded = b""
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])


FOLDERS: list[tuple[Callable[[Path], None], str]] = [
    (make_fifo, "a.jsonl: expected a regular file, found a named pipe (FIFO)"),
    (make_link_to_fifo, "a.txt: expected a regular file, found a named pipe (FIFO)"),
    (make_socket, "a.txt: expected a regular file, found a socket"),
    (make_device, "a.txt: expected a regular file, found a device"),
    (make_link_to_itself, "a.txt: expected a file, found a symbolic link that leads back"),
    (write_json("[" * 100_000 + "]" * 100_000), "a.jsonl: line 2: expected a JSON object, found "),
    (write_json('{"a":' * 100_000), "line 2: expected a JSON object, found one that is nested"),
    (write_json("9" * 5000), "line 2: expected a JSON object, found an integer of over 4300"),
    (write_parquet("bytes", 2**62), "a.parquet: row group 0: expected at most "),
    (write_parquet("rows", 2**34), "a.parquet: row group 0 (17,179,869,184 rows): expected text"),
    (write_parquet("rows", 2**20), "a.parquet: row group 0"),
]
