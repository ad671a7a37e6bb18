"""s3:// and gs:// for fsspec, through pyarrow: no package besides it is needed."""

from __future__ import annotations

import datetime
import functools
import os
from typing import Any

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper

SILENCE = 10.0  # seconds without a byte after which a request has failed


@functools.cache
def _s3(endpoint: str | None, region: str | None) -> Any:
    from pyarrow.fs import S3FileSystem

    scheme, _, host = (endpoint or "").rstrip("/").rpartition("://")
    return S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme or "https",
        region=region or ("us-east-1" if endpoint else None),  # none: pyarrow asks the network for it
        allow_delayed_open=True,  # a small file is one request
        request_timeout=SILENCE,
        connect_timeout=SILENCE,
    )


@functools.cache
def _gcs() -> Any:
    from pyarrow.fs import GcsFileSystem

    return GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=SILENCE))


class _ObjectStore(ArrowFSWrapper):
    """An object store through pyarrow, which needs no package besides; credentials: the environment's."""

    cachable = False

    def __init__(self, store: Any) -> None:
        super().__init__(store)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return [cls._strip_protocol(p) for p in path] if isinstance(path, list) else str(path).split("://")[-1].rstrip("/")

    def isdir(self, path: str) -> bool:
        try:
            return bool(self.info(path)["type"] == "directory")
        except FileNotFoundError:  # not any OSError, as fsspec has it: an outage is no answer
            return False

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: a put needs no folder, and an empty object in its place would only be in the way."""


class S3(_ObjectStore):
    protocol = ("s3", "s3a")

    def __init__(self, **_: Any) -> None:
        env = os.environ.get
        super().__init__(
            _s3(env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL"), env("AWS_REGION") or env("AWS_DEFAULT_REGION"))
        )


class Gcs(_ObjectStore):
    protocol = ("gs", "gcs")

    def __init__(self, **_: Any) -> None:
        super().__init__(_gcs())


for _store in (S3, Gcs):
    for _scheme in _store.protocol:
        fsspec.register_implementation(_scheme, _store, clobber=True)
