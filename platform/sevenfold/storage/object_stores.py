"""Filesystems for s3:// and gs:// URLs, registered with fsspec.

They use pyarrow, so that no further package (s3fs, gcsfs) is needed. Credentials come from the
environment.
"""

from __future__ import annotations

import datetime
import functools
import os
from typing import Any

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper

TIMEOUT_SECONDS = 10.0  # a request fails after this time without any data


@functools.cache
def _s3(endpoint: str | None, region: str | None) -> Any:
    from pyarrow.fs import S3FileSystem

    scheme, _, host = (endpoint or "").rstrip("/").rpartition("://")
    return S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme or "https",
        # with None, pyarrow finds out the bucket's region by a request to AWS
        region=region or ("us-east-1" if endpoint else None),
        allow_delayed_open=True,  # a small file is written in one request
        request_timeout=TIMEOUT_SECONDS,
        connect_timeout=TIMEOUT_SECONDS,
    )


@functools.cache
def _gcs() -> Any:
    from pyarrow.fs import GcsFileSystem

    return GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=TIMEOUT_SECONDS))


class _ObjectStore(ArrowFSWrapper):
    """An object store, accessed through pyarrow."""

    cachable = False  # fsspec would keep one instance even after the environment has changed

    def __init__(self, store: Any) -> None:
        super().__init__(store)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(p) for p in path]
        return str(path).split("://")[-1].rstrip("/")

    def isdir(self, path: str) -> bool:
        """Returns whether there is a folder at a path.

        fsspec's own method returns False after any OSError, and so also during an outage.
        """
        try:
            return bool(self.info(path)["type"] == "directory")
        except FileNotFoundError:
            return False

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing.

        Objects can be written without a folder, and pyarrow would create an empty object for one.
        """


class S3(_ObjectStore):
    """S3, or a compatible store; endpoint and region are read from AWS's environment variables."""

    protocol = ("s3", "s3a")

    def __init__(self, **_: Any) -> None:
        env = os.environ.get
        super().__init__(
            _s3(
                env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL"),
                env("AWS_REGION") or env("AWS_DEFAULT_REGION"),
            )
        )


class Gcs(_ObjectStore):
    """Google Cloud Storage."""

    protocol = ("gs", "gcs")

    def __init__(self, **_: Any) -> None:
        super().__init__(_gcs())


for _store in (S3, Gcs):
    for _scheme in _store.protocol:
        fsspec.register_implementation(_scheme, _store, clobber=True)
