"""The fsspec filesystem of a path or URL, and what it reports about a file."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import urlsplit

import fsspec

from sevenfold.errors import InputError
from sevenfold.storage import object_stores
from sevenfold.storage.retry import MissingError, with_retries
from sevenfold.storage.url_secrets import full_url, hide_secrets

# What stores report about a file that changes when its content does.
VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "mtime",
    "LastModified",
    "Last-Modified",
    "created",
    "blob_id",
)


def stat(path: str) -> dict[str, Any]:
    """Returns fsspec's info about a path or URL, or {} if there is nothing."""
    fs, root = filesystem(path)
    try:
        return with_retries(path, "looked up", lambda: cast(dict[str, Any], fs.info(root)))
    except MissingError:
        return {}


def is_http(path: str) -> bool:
    """Returns whether this is an HTTP or HTTPS URL."""
    return path.startswith(("http://", "https://"))


def is_listing(url: str, info: dict[str, Any], suffixes: tuple[str, ...]) -> bool:
    """Returns whether an HTTP URL is a glob or a web page that lists a folder, not a data file.

    Args:
        url: The URL.
        info: What `stat` returned for it.
        suffixes: The suffixes of data files.
    """
    if not info:
        return any(c in url for c in "*[")
    return info.get("mimetype") == "text/html" and not urlsplit(url).path.lower().endswith(suffixes)


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the fsspec filesystem of a path or URL, and the path within it.

    Over HTTP, the path within it is the URL with its secrets: it must not be shown or stored.

    Raises:
        InputError: fsspec does not know such URLs.
    """
    options: dict[str, Any] = {}
    if is_http(path):
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=object_stores.TIMEOUT_SECONDS,
            sock_read=object_stores.TIMEOUT_SECONDS,
        )
        options = {
            # With gzip, sizes and ranges would be those of the compressed file.
            "headers": {"Accept-Encoding": "identity"},
            "client_kwargs": {"timeout": timeout},
        }
    try:
        if is_http(path):
            urlsplit(path).port  # noqa: B018 (raises ValueError if it is no number)
        fs, root = fsspec.core.url_to_fs(full_url(path), **options)
    except (ValueError, ImportError) as e:
        raise InputError(
            hide_secrets(f"{path}: expected a path or a URL that fsspec supports: {e}")
        ) from None
    return fs, root
