"""A lease on a folder, so that one driver at a time works there."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from typing import Any

import psutil

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.report.console import say
from sevenfold.storage import RunFolder

RENEWED = 5.0  # seconds between its holder's signs of life
EXPIRES = 20.0  # seconds without one after which it is anybody's; by the clock of who waits


class Lease:
    """Attributes:
    lost: whether another driver has taken it, while this one was taken for dead.
    """

    def __init__(self, folder: RunFolder):
        """Takes it; waits for one that may be a dead driver's. Raises InputError where its holder lives."""
        self.lost, self._path, self._token = False, storage.join(folder.root, "driver.json"), secrets.token_hex(8)
        found = self._read()
        begin, told = time.monotonic(), False
        while found and not _ended(found) and time.monotonic() - begin < EXPIRES:
            if (now := self._read()) != found and now:
                raise InputError(
                    f"{folder.root}: another driver works on it (process {found['pid']} on {found['host']}): wait for its end, "
                    "stop it, or give this one a new name (name=...)"
                )
            if not told:
                say(f"{folder.root}: waiting whether its last driver, process {found['pid']} on {found['host']}, still lives")
                told = True
            time.sleep(RENEWED / 10)
        self._number, self._stop = 0, threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        if not self.lost:
            storage.remove(self._path)

    def _renew(self) -> None:
        while not self._stop.wait(RENEWED):
            there = self._read()
            if there and there["token"] != self._token:
                self.lost = True
                return
            self._write()

    def _read(self) -> dict[str, Any] | None:
        return storage.read_json(self._path) if storage.exists(self._path) else None

    def _write(self) -> None:
        self._number += 1
        mine = {"token": self._token, "number": self._number, "pid": os.getpid(), "host": socket.gethostname()}
        storage.write(self._path, json.dumps(mine))


def _ended(found: dict[str, Any]) -> bool:
    return found["host"] == socket.gethostname() and not psutil.pid_exists(found["pid"])
