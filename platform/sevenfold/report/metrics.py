"""What a run logs: metrics.jsonl (a JSON object a line, for whatever tool comes after) and TensorBoard's events."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable

from torch.utils.tensorboard import SummaryWriter

from sevenfold import storage
from sevenfold.errors import InputError, RunError
from sevenfold.storage import RunFolder


class RunLog:
    """A disk that is full for a while stops no run: what could not be written to metrics.jsonl is written with what comes
    next; TensorBoard goes without it. At a URL, where nothing can be appended to, metrics.jsonl is written at each `flush`."""

    def __init__(self, folder: RunFolder, start: int, tell: Callable[[str], None]):
        """
        Args:
            start: the step that the run goes on from; what a killed try wrote after it is forgotten.
            tell: a word where something could not be written, once.
        """
        self._path, self._board, self._tell = folder.log, folder.tensorboard, tell
        self._remote, self._told = storage.is_url(folder.log), False
        self._writer: SummaryWriter | None = None
        self._purge = start + 1 if start else None
        self._lines = [line for line in _lines(self._path) if _step(line) <= start]
        storage.write(self._path, "".join(f"{line}\n" for line in self._lines))
        self._written = len(self._lines)
        self._lock = threading.Lock()  # a save flushes from its own thread

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self._lines.append(json.dumps({"step": step, **metrics}))
        if not self._remote:
            self._try(self._append)

        def scalars(writer: SummaryWriter) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)

        self._event(scalars)

    def text(self, key: str, text: str, step: int) -> None:
        """For TensorBoard alone."""
        self._event(lambda writer: writer.add_text(key, text, step))

    def flush(self) -> None:
        """What was added is safe afterwards, if it can be."""
        if self._remote:
            self._try(lambda: storage.write(self._path, "".join(f"{line}\n" for line in list(self._lines))))
        else:
            self._try(lambda: self._append(sync=True))

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._try(self._writer.close)

    def _append(self, sync: bool = False) -> None:
        with self._lock, open(self._path, "ab", buffering=0) as f:
            at, lines = f.seek(0, os.SEEK_END), self._lines[self._written :]
            raw = "".join(f"{line}\n" for line in lines).encode()
            if f.write(raw) != len(raw):
                os.truncate(self._path, at)  # no half of a line stays
                raise OSError(f"{self._path}: no room")
            if sync:
                os.fsync(f.fileno())
            self._written += len(lines)

    def _event(self, write: Callable[[SummaryWriter], None]) -> None:
        def attempt() -> None:
            if self._writer is None:
                self._writer = SummaryWriter(self._board, purge_step=self._purge)
            write(self._writer)

        if not self._try(attempt):
            broken, self._writer, self._purge = self._writer, None, None
            with contextlib.suppress(OSError):
                if broken is not None:
                    broken.close()

    def _try(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except (OSError, InputError, RunError) as e:
            if not self._told:
                self._tell(f"a part of the log could not be written yet ({e})")
            self._told = True
            return False
        return True


def logged(path: str, step: int) -> dict[str, float]:
    """All that the file says of a step."""
    return {k: v for line in _lines(path) if _step(line) == step for k, v in json.loads(line).items()}


def _lines(path: str) -> list[str]:
    return storage.read_text(path).splitlines() if storage.exists(path) else []


def _step(line: str) -> float:
    """A line that was cut off by a kill counts as one to forget."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
