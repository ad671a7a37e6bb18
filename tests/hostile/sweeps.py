"""States of sweeps that somebody else has written, or changed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

from hostile.runs import Bomb
from sevenfold.sweep import snapshot

FILES = {"experiment_state-1.json": b"{}", "searcher-state-1.pkl": b"\x80\x04N."}


def hostile_states(ray: Path, trace: str) -> dict[str, Any]:
    """Saved states that somebody else has written, as functions that write them."""
    bomb = pickle.dumps(Bomb(trace))

    def tune(name: str, content: bytes) -> None:
        (ray / "tune").mkdir(parents=True)
        (ray / "tune/experiment_state-2026-01-01_00-00-00.json").write_text("{}")
        (ray / "tune" / name).write_bytes(content)

    def changed(at: int) -> None:
        path = ray / "sweep-state"
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    def by_another(files: dict[str, bytes]) -> None:
        os.environ["SEVENFOLD_KEY"] = "a key of somebody else"
        snapshot.save(str(ray.parent), files)
        del os.environ["SEVENFOLD_KEY"]

    embedded = {"runner_data": {"_type": "CLOUDPICKLE_FALLBACK", "value": bomb.hex()}}
    own = snapshot._MAGIC  # what every such file begins with
    return {
        "Tune's experiment": lambda: tune(
            "experiment_state-2026-01-02_00-00-00.json", json.dumps(embedded).encode()
        ),
        "Tune's searcher": lambda: tune("searcher-state-2026-01-01_00-00-00.pkl", bomb),
        "Tune's callbacks": lambda: tune("callback-states-2026-01-01_00-00-00.pkl", bomb),
        "Tune's generator": lambda: tune("search_gen_state-2026-01-01_00-00-00.json", bomb),
        "another key": lambda: by_another({"callback.pkl": bomb}),
        "the MAC changed": lambda: (snapshot.save(str(ray.parent), FILES), changed(len(own) + 3)),
        "the content changed": lambda: (snapshot.save(str(ray.parent), FILES), changed(-30)),
        "cut": lambda: (
            snapshot.save(str(ray.parent), FILES),
            os.truncate(ray / "sweep-state", 110),
        ),
        "a pickle": lambda: (ray.mkdir(parents=True), (ray / "sweep-state").write_bytes(bomb)),
        "empty": lambda: (ray.mkdir(parents=True), (ray / "sweep-state").write_bytes(b"")),
        "no MAC": lambda: (ray.mkdir(parents=True), (ray / "sweep-state").write_bytes(own + bomb)),
    }
