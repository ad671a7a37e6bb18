"""A file system in this process that answers each request after a wait, as an object store does.

Its files are made when they are read, so that there may be any number of them.
"""

from __future__ import annotations

import io
import time
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

WAIT = 0.04  # seconds until a request is answered
PAGE = 1000  # names in an answer of a listing, as S3 has
_PLACE = b"000000000000"


def _template(rows: int, groups: int) -> bytes:
    """Returns a parquet file whose metadata have a place for a number, so that files differ."""
    text = [f"document {i} " + "some words of a text " * 50 for i in range(rows)]
    table = pa.table({"text": text}).replace_schema_metadata({"number": _PLACE.decode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows // groups)
    return buffer.getvalue()


class SlowStore(fsspec.AbstractFileSystem):
    """Holds `corpus/NUMBER.parquet` for each number below `count`.

    Attributes:
        count: The number of files.
        requests: The number of requests so far.
    """

    protocol = "slow"
    cachable = False
    count = 0
    requests = 0
    _bytes = _template(rows=40, groups=2)

    @classmethod
    def _wait(cls, requests: int = 1) -> None:
        cls.requests += requests
        time.sleep(WAIT * requests)

    def _info(self, path: str) -> dict[str, Any]:
        if path.strip("/") == "corpus":
            return {"name": "corpus", "size": 0, "type": "directory"}
        number = int(path.rsplit("/", 1)[1].partition(".")[0])
        tag = f"tag-{number}"
        return {"name": path, "size": len(self._bytes), "type": "file", "ETag": tag}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Returns what one request tells about a path."""
        self._wait()
        return self._info(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Lists the folder, one page per request."""
        self._wait(-(-self.count // PAGE))
        names = (f"corpus/{number:09d}.parquet" for number in range(self.count))
        return [self._info(name) if detail else name for name in names]

    def _open(self, path: str, *_: Any, **__: Any) -> Any:
        self._wait()  # an object store is asked for the size
        number = path.rsplit("/", 1)[1].partition(".")[0]
        return _SlowFile(self._bytes.replace(_PLACE, number.zfill(len(_PLACE)).encode()))


class _SlowFile(io.BytesIO):
    """A file each of whose reads is a request."""

    def read(self, size: int | None = -1) -> bytes:
        """Reads after a wait."""
        SlowStore._wait()
        return super().read(size)

    def readinto(self, buffer: Any) -> int:
        """Reads after a wait."""
        SlowStore._wait()
        return super().readinto(buffer)


fsspec.register_implementation("slow", SlowStore)
