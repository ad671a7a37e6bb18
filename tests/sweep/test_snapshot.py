"""The saved state of a sweep: only what was saved with the user's key is read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import RECIPE, refused
from hostile.sweeps import FILES, hostile_states
from ray import tune

from sevenfold.errors import InputError
from sevenfold.sweep import snapshot, trial


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of a user without a key."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("SEVENFOLD_KEY", raising=False)
    (tmp_path / "user").mkdir()
    return tmp_path / "user"


def test_the_owner_reads_what_was_saved(tmp_path: Path, user: Path) -> None:
    sweep = str(tmp_path / "s")
    assert snapshot.load(sweep) is None
    snapshot.save(sweep, FILES)
    assert snapshot.load(sweep) == FILES
    assert (user / ".sevenfold/key").stat().st_mode & 0o777 == 0o600
    assert (user / ".sevenfold").stat().st_mode & 0o777 == 0o700
    snapshot.save(sweep, {"a": b"1"})
    assert snapshot.load(sweep) == {"a": b"1"}
    snapshot.remove(sweep)
    assert snapshot.load(sweep) is None


def test_restored_files_replace_what_lay_there(tmp_path: Path) -> None:
    tune = tmp_path / "s/ray/tune"
    (tune / "trial").mkdir(parents=True)
    (tune / "searcher-state-9.pkl").write_bytes(b"hostile")
    (tune / "trial/result.json").write_text("kept")
    moved = SimpleNamespace(storage=SimpleNamespace(storage_fs_path="/old/s/ray"))
    generator = {"search_gen_state-1.json": pickle.dumps({"experiment": moved})}
    snapshot.restore(str(tmp_path / "s"), FILES | generator | {"../../outside.pkl": b"x"})
    state = pickle.loads((tune / "search_gen_state-1.json").read_bytes())
    assert state["experiment"].storage.storage_fs_path == str(tmp_path / "s/ray")
    (tune / "search_gen_state-1.json").unlink()
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {f"s/ray/tune/{name}" for name in (*FILES, "outside.pkl", "trial/result.json")}


@pytest.mark.parametrize("sweep", ["/new/b-sweep", "s3://bucket/b-sweep"])
def test_paths_follow_a_sweep_that_was_moved(sweep: str) -> None:
    old = "/old/trials/a-sweep/ray/tune/t1/checkpoint_000003"
    path = snapshot.moved(tune.Checkpoint(old), sweep).path
    assert path == f"{sweep.removeprefix('s3://')}/ray/tune/t1/checkpoint_000003"
    assert snapshot.moved(tune.Checkpoint("/elsewhere/c"), sweep).path == "/elsewhere/c"
    old = "/old/trials/a-sweep/trials/t1.2/checkpoints/step-00000004.00"
    assert trial.moved(old, sweep) == f"{sweep}/trials/t1.2/checkpoints/step-00000004.00"


def test_a_key_of_the_environment_is_enough_on_another_machine(
    tmp_path: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEVENFOLD_KEY", "a key of the team")
    snapshot.save(str(tmp_path / "s"), FILES)
    assert not (user / ".sevenfold").exists()
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
    assert snapshot.load(str(tmp_path / "s")) == FILES
    for key in ("another key of theirs", "short", ""):
        monkeypatch.setenv("SEVENFOLD_KEY", key)
        with pytest.raises(InputError):
            snapshot.load(str(tmp_path / "s"))


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_a_key_that_others_can_read_is_refused(mode: int, tmp_path: Path, user: Path) -> None:
    snapshot.save(str(tmp_path / "s"), FILES)
    (user / ".sevenfold/key").chmod(mode)
    with pytest.raises(InputError, match="only you can read"):
        snapshot.load(str(tmp_path / "s"))


def test_a_key_behind_a_link_or_in_a_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, user: Path
) -> None:
    (user / ".sevenfold").write_text("")
    with pytest.raises(InputError, match="SEVENFOLD_KEY"):
        snapshot.save(str(tmp_path / "s"), FILES)
    (user / ".sevenfold").unlink()
    (user / ".sevenfold").mkdir()
    (tmp_path / "key").write_text("k" * 64)
    (user / ".sevenfold/key").symlink_to(tmp_path / "key")
    with pytest.raises(InputError, match="SEVENFOLD_KEY"):
        snapshot.save(str(tmp_path / "s"), FILES)


NAMES = list(hostile_states(Path(), ""))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_somebody_else_is_refused_before_anything_starts(
    name: str,
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["data"] |= tree["data"]
    recipe["validation"] = {"every": 4, "rows": 16}
    recipe["sweep"] = {"trials": 4, "space": {"optimizer.learning_rate": {"uniform": [0.1, 0.2]}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setenv("SEVENFOLD_HOME", str(tmp_path))
    ray = tmp_path / f"runs/{recipe['name']}-sweep/ray"
    hostile_states(ray, str(tmp_path / "trace"))[name]()
    message = refused(capsys, "sweep", str(tmp_path / "r.yaml"))
    assert "--trust-state" in message or "damaged" in message
    assert not (tmp_path / "trace").exists()
