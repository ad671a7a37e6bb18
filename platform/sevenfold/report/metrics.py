"""metrics.jsonl: all that is logged of a run, a JSON object a line, for whatever tool comes after."""

from __future__ import annotations

import json
import os

from sevenfold import storage


class MetricsLog:
    """Appends to a file; at a URL, where nothing can be appended to, the whole is written at each `flush`."""

    def __init__(self, path: str, start: int):
        """start: the step that the run goes on from; what a killed try wrote after it is forgotten."""
        self._path, self._remote = path, storage.is_url(path)
        lines = storage.read_text(path).splitlines() if storage.exists(path) else []
        self._lines = [line for line in lines if _step(line) <= start]
        storage.write(path, "".join(f"{line}\n" for line in self._lines))

    def add(self, step: int, metrics: dict[str, float]) -> None:
        line = json.dumps({"step": step, **metrics})
        if self._remote:
            self._lines.append(line)
            return
        with open(self._path, "a", encoding="utf-8") as f:
            f.write(line + "\n")

    def flush(self) -> None:
        if self._remote:
            storage.write(self._path, "".join(f"{line}\n" for line in self._lines))
        elif os.path.exists(self._path):
            with open(self._path, "rb") as f:
                os.fsync(f.fileno())


def logged(path: str, step: int) -> dict[str, float]:
    """All that the file says of a step."""
    lines = storage.read_text(path).splitlines() if storage.exists(path) else []
    return {k: v for line in lines if _step(line) == step for k, v in json.loads(line).items()}


def _step(line: str) -> float:
    """A line that was cut off by a kill counts as one to forget."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
