"""A run's log: metrics.jsonl, one JSON object per line for other tools, and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sevenfold import storage
from sevenfold.errors import InputError, RunError
from sevenfold.run_folder import RunFolder


class RunLog:
    """The log of a run. A full disk does not stop the run.

    Lines that could not be written to metrics.jsonl are kept and written together with later ones.
    TensorBoard events that could not be written are lost. If the log is at a URL, where nothing can
    be appended to a file, metrics.jsonl is written as a whole by each `flush`.
    """

    def __init__(self, folder: RunFolder, start: int, tell: Callable[[str], None]):
        """Opens the log, and removes what it says of steps after `start`.

        Args:
            folder: The run's folder.
            start: The step that the run resumes from; an earlier attempt may have logged later
                ones.
            tell: Called once with a message when something could not be written.
        """
        self._path, self._tensorboard, self._tell = folder.log, folder.tensorboard, tell
        self._remote = storage.is_url(folder.log)
        self._warned = False
        self._writer: SummaryWriter | None = None
        # TensorBoard discards what an earlier attempt logged from this step on
        self._purge_step: int | None = start + 1
        self._lines = [line for line in _lines(self._path) if _step(line) <= start]
        storage.write(self._path, "".join(f"{line}\n" for line in self._lines))
        self._written = len(self._lines)
        self._lock = threading.Lock()  # saving a checkpoint flushes the log from another thread

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of a step."""
        self._lines.append(storage.to_json({"step": step, **metrics}))
        if not self._remote:
            self._try(self._append)

        def add_scalars(writer: SummaryWriter) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)

        self._add_event(add_scalars)

    def text(self, key: str, text: str, step: int) -> None:
        """Logs a text, for TensorBoard only."""
        self._add_event(lambda writer: writer.add_text(key, text, step))

    def flush(self) -> None:
        """Writes everything that was added to durable storage, if possible."""
        if self._remote:
            self._try(
                lambda: storage.write(
                    self._path, "".join(f"{line}\n" for line in list(self._lines))
                )
            )
        else:
            self._try(lambda: self._append(sync=True))

    def close(self) -> None:
        """Flushes and closes the log."""
        self.flush()
        if self._writer is not None:
            self._try(self._writer.close)

    def abandon(self) -> None:
        """Closes the log without writing what is not written yet: it belongs to another process."""
        if self._writer is not None:
            self._try(self._writer.close)

    def _append(self, sync: bool = False) -> None:
        """Appends the lines that are not written yet.

        Args:
            sync: Also wait until they are on the disk.
        """
        with self._lock, open(self._path, "ab", buffering=0) as f:
            size, lines = f.seek(0, os.SEEK_END), self._lines[self._written :]
            raw = "".join(f"{line}\n" for line in lines).encode()
            if f.write(raw) != len(raw):
                os.truncate(self._path, size)  # leave no incomplete line
                raise OSError(f"{self._path}: no space left on the disk")
            if sync:
                os.fsync(f.fileno())
            self._written += len(lines)

    def _add_event(self, write: Callable[[SummaryWriter], None]) -> None:
        """Writes a TensorBoard event; after a failure the next event opens a new file."""

        def attempt() -> None:
            if self._writer is None:
                self._writer = SummaryWriter(self._tensorboard, purge_step=self._purge_step)
            write(self._writer)

        if not self._try(attempt):
            broken, self._writer, self._purge_step = self._writer, None, None
            with contextlib.suppress(OSError):
                if broken is not None:
                    broken.close()

    def _try(self, write: Callable[[], None]) -> bool:
        """Returns whether the write succeeded; warns at the first failure."""
        try:
            write()
        except (OSError, InputError, RunError) as e:
            if not self._warned:
                self._tell(f"part of the log could not be written yet ({e})")
            self._warned = True
            return False
        return True


def logged_metrics(path: str, step: int) -> dict[str, float]:
    """Returns everything that a metrics.jsonl says of a step, from all of its lines.

    A value that is not a number is null in the file, and NaN here.
    """
    return {
        key: math.nan if value is None else value
        for line in _lines(path)
        if _step(line) == step
        for key, value in json.loads(line).items()
    }


def read_reports(path: str) -> list[dict[str, Any]]:
    """Returns the reports in a trial's reports.json, each with its step; [] if there is no file.

    Raises:
        InputError: The file is damaged.
    """

    def parse(reports: Any) -> list[dict[str, Any]]:
        if not isinstance(reports, list):
            raise TypeError("expected a list of reports")
        return [{**report, "step": int(report["step"])} for report in reports]

    return storage.read_json(path, parse) if storage.exists(path) else []


def _lines(path: str) -> list[str]:
    return storage.read_text(path).splitlines() if storage.exists(path) else []


def _step(line: str) -> float:
    """Returns a line's step; infinity if a killed process left the line incomplete."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
