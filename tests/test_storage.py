import os
from pathlib import Path

import pytest

from sevenfold import storage
from sevenfold.errors import InputError


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEVENFOLD_HOME", raising=False)
    assert storage.locate("runs/a") == str(tmp_path / "runs/a")
    assert storage.locate("s3://bucket/x/") == "s3://bucket/x"
    monkeypatch.setenv("SEVENFOLD_HOME", "/elsewhere")
    assert storage.locate("runs/a") == "/elsewhere/runs/a"


def test_in_a_job_results_stay_out_of_the_throw_away_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEVENFOLD_HOME", raising=False)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert storage.locate("runs/a") == os.path.expanduser("~/sevenfold/runs/a")
    (tmp_path / "came-along").mkdir()
    assert storage.locate("came-along") == str(tmp_path / "came-along")


@pytest.mark.parametrize("root", ["{tmp}", "memory://bucket"])
def test_write_read_list_remove(root: str, tmp_path: Path) -> None:
    root = root.format(tmp=tmp_path)
    storage.write(storage.join(root, "run", "a.json"), '{"x": 1}')
    storage.write(storage.join(root, "run", "b.parquet"), b"1")
    assert storage.read_json(storage.join(root, "run", "a.json")) == {"x": 1}
    assert storage.listdir(storage.join(root, "run")) == ["a.json", "b.parquet"]
    assert [p.rsplit("/", 1)[-1] for p in storage.files(storage.join(root, "run"), ".parquet")] == ["b.parquet"]
    assert [p.rsplit("/", 1)[-1] for p in storage.files(storage.join(root, "run", "*.json"), ".parquet")] == ["a.json"]
    storage.remove(storage.join(root, "run"))
    assert not storage.exists(storage.join(root, "run", "a.json")) and storage.listdir(storage.join(root, "none")) == []


def test_nothing_there(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none", "a file or folder"), (tmp_path, "shards"), (tmp_path / "*.x", "matches")):
        with pytest.raises(InputError, match=says):
            storage.files(str(path), ".parquet")
    with pytest.raises(InputError, match="expected a run"):
        storage.RunFolder.of(str(tmp_path))
