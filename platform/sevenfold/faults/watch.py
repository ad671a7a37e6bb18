"""Watches whether a run always has a valid checkpoint."""

from __future__ import annotations

import threading
import time

from sevenfold.engine.checkpoint import latest_checkpoint
from sevenfold.errors import RunError


class CheckpointWatch:
    """Checks again and again whether a folder has a valid checkpoint, from the first one on.

    Attributes:
        checks: The number of checks, counted from the first valid checkpoint.
        unguarded: How many of them found no valid checkpoint.
    """

    def __init__(self, folder: str):
        """Prepares the watch; `with` starts and stops it.

        Args:
            folder: The run's folder of checkpoints.
        """
        self.checks = self.unguarded = 0
        self._folder, self._stop = folder, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        pause = 0.5
        while not self._stop.wait(pause):
            start = time.monotonic()
            try:
                # The second call is for a checkpoint that was removed while the first one read it.
                valid = self._has_valid_checkpoint() or self._has_valid_checkpoint()
            except RunError:  # the storage does not respond
                continue
            if valid or self.checks:
                self.checks += 1
                self.unguarded += not valid
            pause = max(0.5, 4 * (time.monotonic() - start))  # verifying a large one takes long

    def _has_valid_checkpoint(self) -> bool:
        return latest_checkpoint(self._folder, lambda _: None) is not None

    def __enter__(self) -> CheckpointWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
