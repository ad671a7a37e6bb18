"""A file reader that survives temporary failures of the storage."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from sevenfold.errors import InputError, RunError
from sevenfold.storage.filesystem import filesystem, is_http
from sevenfold.storage.paths import is_url
from sevenfold.storage.retry import T, with_retries
from sevenfold.storage.url_secrets import keep_secrets

# The largest file that is downloaded as a whole from a server without range requests.
MAX_DOWNLOAD_BYTES = 2 << 30
_SPECIAL = (
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Reader(io.RawIOBase):
    """A binary file that is opened again at the same position if the storage fails temporarily.

    It is not buffered; to read lines, wrap it in `io.BufferedReader`.

    Attributes:
        name: The path or URL.
        size: The size in bytes when the file was opened first.
    """

    _file: BinaryIO | None = None

    def __init__(self, path: str):
        path = keep_secrets(path) if is_http(path) else path
        self.name = path
        self.size = -1
        self._position = 0  # where the next read begins
        self._file_position = 0  # where `_file` is
        with_retries(path, "read", self._open_at_position)

    def _open_at_position(self) -> BinaryIO:
        """Opens the file if it is not open, and moves it to the position of the next read."""
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if self._file is None:
            file = _open(self.name)
            size = file.seek(0, os.SEEK_END)
            if self.size not in (-1, size):
                raise RunError(
                    f"{self.name}: was changed while it was read: it had {self.size} bytes, and "
                    f"has {size} now"
                )
            self._file, self.size, self._file_position = file, size, size
        # URLs always seek, because all readers of a memory:// file share one position.
        if self._file_position != self._position or is_url(self.name):
            self._file_position = self._file.seek(self._position)
        return self._file

    def _read(self, requested: int, read: Callable[[BinaryIO], T], count: Callable[[T], int]) -> T:
        """Reads from the file, with retries, and advances the position.

        Args:
            requested: The number of bytes to read; fewer are accepted only at the end of the file.
            read: Reads from the opened file.
            count: Returns the number of bytes in the result of `read`.
        """

        def attempt() -> T:
            try:
                result = read(self._open_at_position())
                if count(result) < min(requested, self.size - self._position):
                    raise OSError(
                        f"ended {count(result)} bytes after byte {self._position} of {self.size}"
                    )
                return result
            except Exception:
                self._close_file()
                raise

        result = with_retries(self.name, "read", attempt)
        self._position = self._file_position = self._position + count(result)
        return result

    def read(self, n: int | None = -1) -> bytes:
        """Reads n bytes, fewer at the end of the file; all that remain if n is None or negative."""
        remaining = max(0, self.size - self._position)
        # -1 is never passed on: pyarrow's S3 files fail on it.
        n = remaining if n is None or n < 0 else min(n, remaining)
        return self._read(n, lambda f: f.read(n), len)

    def readall(self) -> bytes:
        """Reads the rest of the file."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Reads into a buffer and returns the number of bytes read."""
        view = memoryview(buffer).cast("B")
        return self._read(len(view), lambda f: cast(Any, f).readinto(view), int)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position and returns it."""
        position = offset + (0, self._position, self.size)[whence]
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        """Returns the position of the next read."""
        return self._position

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def close(self) -> None:
        """Closes the file."""
        self._close_file()
        super().close()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def _open(path: str) -> BinaryIO:
    """Opens a file for reading and seeking, local or at a URL."""
    if not is_url(path):
        # opening a FIFO would wait for a writer, and a device may never end
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            kind = next((kind for is_kind, kind in _SPECIAL if is_kind(mode)), "a special file")
            raise InputError(f"{path}: expected a regular file, found {kind}: remove it")
        return open(path, "rb")
    fs, root = filesystem(path)
    file = fs.open(root, "rb")
    if not is_http(path):
        return cast(BinaryIO, file)
    # fsspec raises ValueError if the server ignores range requests: try one
    with contextlib.suppress(ValueError):
        if file.size is not None:
            file.seek(file.size - 1)
            file.read(1)
            return cast(BinaryIO, file)
    file.close()
    content = io.BytesIO()
    with fs.open(root, "rb", block_size=0) as stream:
        while chunk := stream.read(1 << 20):
            if content.write(chunk) and content.tell() > MAX_DOWNLOAD_BYTES:
                raise InputError(
                    f"{path}: expected at most {MAX_DOWNLOAD_BYTES >> 20} MiB, because the server "
                    "does not support range requests, found more: copy the file to another storage"
                )
    return content
