"""A lease on a folder: only one driver at a time works on a run or sweep."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from typing import Any

import psutil

from sevenfold import storage
from sevenfold.errors import InputError, RunError
from sevenfold.report.console import say
from sevenfold.run_folder import RunFolder
from sevenfold.storage.retry import MissingError

RENEW_SECONDS = 5.0  # seconds between two renewals by the holder

# Seconds without a renewal after which the lease is free. They are measured by the clock of the
# process that waits, so that the machines' clocks need not agree.
EXPIRE_SECONDS = 20.0


class Lease:
    """The right to work on a folder, kept in its driver.json and renewed by a thread.

    Attributes:
        lost: Whether another driver has taken the lease because this one seemed to be dead.
    """

    def __init__(self, folder: RunFolder):
        """Takes the lease; waits for it to expire if its holder may be dead.

        Raises:
            InputError: Another driver holds the lease and renews it.
        """
        self.lost = False
        self._path = storage.join(folder.root, "driver.json")
        self._token = secrets.token_hex(8)
        self._wait_until_free(folder)
        self._number = 0
        self._stop = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _wait_until_free(self, folder: RunFolder) -> None:
        held = self._read()
        start, reported = time.monotonic(), False
        while held and not _has_ended(held) and time.monotonic() - start < EXPIRE_SECONDS:
            holder = f"process {held['pid']} on {held['host']}"
            if (current := self._read()) != held and current:
                raise InputError(
                    f"{folder.root}: another driver works on it ({holder}): wait until it has "
                    "finished, stop it, or give this run another name (name=...)"
                )
            if not reported:
                say(f"{folder.root}: checking whether its last driver, {holder}, is still alive")
                reported = True
            time.sleep(RENEW_SECONDS / 10)

    def close(self) -> None:
        """Gives the lease back, if it is still this one's."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(InputError, RunError):  # it expires by itself
            held = self._read()
            if held and held["token"] == self._token:
                storage.remove(self._path)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                self._renew_once()
            except (InputError, RunError):  # the storage cannot be reached for a while
                continue
            if self.lost:
                return

    def _renew_once(self) -> None:
        """Renews the lease, or finds that another driver has taken it."""
        try:
            held = self._read()
        except InputError:  # damaged: it is written anew
            held = None
        self.lost = bool(held and held["token"] != self._token)
        if not self.lost:
            self._write()

    def _read(self) -> dict[str, Any] | None:
        """Returns what the holder wrote; None if nobody holds the lease.

        Raises:
            InputError: The file is damaged.
        """
        if not storage.exists(self._path):
            return None
        try:
            return storage.read_json(
                self._path,
                lambda held: {
                    **held,
                    "token": str(held["token"]),
                    "pid": int(held["pid"]),
                    "host": str(held["host"]),
                },
                "if no other driver works on this sweep, remove the file",
            )
        except MissingError:  # the holder has given it back meanwhile
            return None

    def _write(self) -> None:
        self._number += 1  # a renewal must change the file
        held = {
            "token": self._token,
            "number": self._number,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        storage.write(self._path, json.dumps(held))


def _has_ended(held: dict[str, Any]) -> bool:
    """Returns whether the holder was a process of this machine that has ended."""
    return held["host"] == socket.gethostname() and not psutil.pid_exists(held["pid"])
