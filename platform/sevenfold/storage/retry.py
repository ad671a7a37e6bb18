"""Retries for storage that fails temporarily, and which failures no retry can fix."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from sevenfold.errors import InputError, RunError
from sevenfold.storage.url_secrets import URLS_VARIABLE, hide_secrets

RETRY_SECONDS = 120.0  # after the first failure, until retrying is given up
# The wait before a retry doubles from the first to the longest of these; seconds.
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0

# Parts of the messages with which S3 and GCS refuse access, as pyarrow reports them.
REFUSALS = (
    "ACCESS_DENIED|ACCESS_KEY_ID|SIGNATURE|CLIENT_TOKEN|AUTHENTICATION_TOKEN|EXPIRED_TOKEN"
    "|UNRECOGNIZED_CLIENT|PERMISSION_DENIED|UNAUTHENTICATED"
)

T = TypeVar("T")


# Ends errors about URLs: what was given once may be unknown here, or have expired.
_URL_HINT = (
    f"; a URL with a password or signature can be given again in ${URLS_VARIABLE} (URLs, separated "
    "by spaces)"
)


class MissingError(InputError):
    """There is nothing at a path."""


def with_retries(path: str, action: str, attempt: Callable[[], T]) -> T:
    """Calls a function that accesses a storage, again and again if the storage fails temporarily.

    The errors name URLs without their secrets, and have no cause, whose message would have them.

    Args:
        path: The path or URL, for messages.
        action: What the function does, as a past participle: "could not be {action}".
        attempt: The function.

    Returns:
        What the function returns.

    Raises:
        InputError: There is nothing at the path, or access is refused.
        RunError: The storage has failed for RETRY_SECONDS seconds.
    """
    first_failure, wait = None, FIRST_WAIT
    path = hide_secrets(path)
    while True:
        try:
            return attempt()
        except Exception as e:
            permanent = _permanent_error(path, e)
            if permanent is e:
                raise
            if permanent is not None:
                raise permanent from None
            # fsspec reports an outage as a missing file, with the real error as its cause
            actual = e.__cause__ if isinstance(e, FileNotFoundError) and e.__cause__ else e
            now = time.monotonic()
            reason = _reason(actual) or type(actual).__name__
            if first_failure is None:
                first_failure = now
                logging.getLogger(__name__).warning(
                    "%s: %s; retrying for up to %.0f s", path, reason, RETRY_SECONDS
                )
            remaining = first_failure + RETRY_SECONDS - now
            if remaining <= 0:
                raise RunError(
                    f"{path}: could not be {action}, retried for {now - first_failure:.0f} s: "
                    f"{reason}: check the storage and the connection to it, then start the run "
                    "again"
                ) from None
        time.sleep(min(wait, remaining))
        wait = min(2 * wait, LONGEST_WAIT)


def _permanent_error(path: str, error: Exception) -> Exception | None:
    """Returns the error to raise for a failure that no retry can fix; None if a retry may help."""
    import aiohttp

    # fsspec reports outages and refusals as missing files, with the real error as their cause
    if isinstance(error, FileNotFoundError) and isinstance(
        error.__cause__, (OSError, TimeoutError, aiohttp.ClientError)
    ):
        error = error.__cause__
    reason = _reason(error)
    status = _http_status(error, reason)
    if "NO_SUCH_BUCKET" in reason:
        return MissingError(f"{path}: expected a bucket of this name, found none")
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError)) or status in (404, 410)
    if missing or "NO_SUCH_KEY" in reason:
        return MissingError(f"{path}: expected a file, found none")
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return InputError(
            f"{path}: expected a file, found a symbolic link that leads back to itself: remove it"
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return InputError(f"{path[:80]}...: expected a path, found a name that is too long")
    if isinstance(error, IsADirectoryError):
        return InputError(f"{path}: expected a file, found a folder")
    refused = isinstance(error, PermissionError) or re.search(REFUSALS, reason)
    # 408, 425 and 429 (timeout, too early, too many requests) are worth a retry
    if refused or (300 <= status < 500 and status not in (408, 425, 429)):
        return InputError(
            f"{path}: access refused ({reason}): check the address, the credentials and their "
            f"permissions{_URL_HINT if '://' in path else ''}"
        )
    invalid_url = isinstance(error, aiohttp.ClientError) and isinstance(error, ValueError)
    if isinstance(error, FileExistsError) or invalid_url:
        return InputError(f"{path}: cannot be used: {reason}")
    if isinstance(error, (OSError, TimeoutError, aiohttp.ClientError)) or _is_of_httpx(error):
        return None
    if reason != " ".join(str(error).split()):  # an error that would show a secret
        return InputError(f"{path}: cannot be used: {type(error).__name__}: {reason}")
    return error


def _reason(error: BaseException) -> str:
    """Returns an error's message on one line, without the secrets of URLs."""
    return hide_secrets(" ".join(str(error).split()))


def _is_of_httpx(error: Exception) -> bool:
    """Returns whether a request of huggingface_hub failed, whose library is not a dependency."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _http_status(error: Exception, reason: str) -> int:
    """Returns the HTTP status that a failure reports, or 0 if it reports none."""
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):  # of huggingface_hub
        return status
    match = re.search(r"HTTP status (\d+)", reason)  # in pyarrow's messages
    return int(match[1]) if match else 0
