"""No file of a run or a model that was handed over runs code, with any command.

A file that makes a folder when it is run or unpickled takes the place of each file in turn, in
several forms, and all sums are those of the changed files: sums prove wholeness, not origin.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
from pathlib import Path

import pytest
from conftest import refused
from helpers.damages import ReachedCluster, files_of
from helpers.handed_runs import COMMANDS, finished_run, stop_before_the_cluster
from hostile.runs import FORMS, attack, write_run_with_code

from sevenfold.cli import main
from sevenfold.model.remote_code import code_hash
from sevenfold.recipe import loads, parse


@pytest.fixture(scope="module")
def finished() -> Path:
    """A home with the finished run runs/old, whose model was exported by this revision."""
    return finished_run()


def run_command(argv: list[str]) -> None:
    """Runs a command; what it says about its input is the business of other tests."""
    with contextlib.suppress(Exception, SystemExit):
        main(argv)


def cases(run: Path, thorough: bool) -> list[tuple[str, str]]:
    """Returns (file, form): all of them, or those of which a reader is known to unpickle or run."""
    usual = {".yaml": ("yaml",), ".json": ("json",), ".jinja": ("template",)}
    return [
        (file, form)
        for file in files_of(run)
        for form in (
            FORMS
            if thorough
            else ("pickle", *usual.get(Path(file).suffix, ("torch",)))
            if not file.endswith(".parquet") or file.endswith("4.parquet")
            else ()
        )
    ]


@pytest.mark.parametrize(
    ("command", "thorough"),
    [
        *((command, False) for command in ("export", "generate", "evaluate", "resume")),
        *(pytest.param(command, True, marks=pytest.mark.nightly) for command in COMMANDS),
    ],
)
def test_no_file_of_a_run_runs_code(
    finished: Path,
    command: str,
    thorough: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_before_the_cluster(command, monkeypatch)
    monkeypatch.chdir(finished)
    trace = tmp_path / "trace"
    for file, form in cases(finished / "runs/old", thorough):
        runs = tmp_path / "runs"
        shutil.copytree(finished / "runs/old", runs / "old")
        attack(runs / "old", file, form, str(trace))
        if command == "resume":
            shutil.rmtree(runs / "old/model")
            (runs / "old/summary.json").unlink(missing_ok=True)
        run_command([part.format(runs=runs, run=runs / "old") for part in COMMANDS[command]])
        assert not trace.exists(), (command, file, form)
        shutil.rmtree(runs)


@pytest.fixture
def handed(finished: Path, tmp_path: Path) -> Path:
    """A folder with a run and a base whose models have code of their own, and recipes."""
    write_run_with_code(finished, tmp_path)
    return tmp_path


WITH_CODE: dict[str, list[str]] = {
    "evaluate": ["evaluate", "{run}"],
    "export": ["export", "{run}", "--out", "{home}/out"],
    "replay": ["ledger", "{run}", "replay", "--step", "3"],
    "plan": ["plan", "{recipe}", "--gpus", "1", "--gpu", "h100-80gb"],
    "dry run": ["pretrain", "{recipe}", "--dry-run"],
    "pretrain": ["pretrain", "{recipe}", "storage={home}/runs"],
}


@pytest.mark.parametrize("command", WITH_CODE)
def test_code_of_a_model_runs_only_with_consent_to_this_very_code(
    handed: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_before_the_cluster(command, monkeypatch)
    monkeypatch.setenv("SEVENFOLD_HOME", str(handed))
    places = {"run": handed / "runs/old", "home": handed, "recipe": handed / "recipe.yaml"}
    argv = [part.format(**places) for part in WITH_CODE[command]]
    trace, base = handed / "trace", handed / "base"
    try:
        assert "--trust-remote-code" in refused(capsys, *argv)
    except ReachedCluster:
        assert command == "evaluate"  # its actors load the model
    assert not trace.exists()
    if command in ("replay", "plan"):  # which has no such option, or would take long
        return
    # the hash of other code, as of a model that was changed after a review
    line = refused(capsys, *argv, "--trust-remote-code", "0" * 32) if command != "evaluate" else ""
    assert not trace.exists() and (not line or code_hash(str(base)) in line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(handed / "modules"))
        try:
            code = main([*argv, "--trust-remote-code", code_hash(str(base))])
        except ReachedCluster:
            code = 0
    assert code == 0, capsys.readouterr().err
    assert trace.exists() or command == "evaluate"


def test_a_recipe_cannot_agree_to_run_code(
    handed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (
        ["pretrain", str(handed / "other.yaml")],
        ["plan", str(handed / "other.yaml"), "--gpus", "1", "--gpu", "h100-80gb"],
        ["pretrain", str(handed / "recipe.yaml"), "model.trust_remote_code=true"],
    ):
        assert "a recipe cannot allow the code of a model to run" in refused(capsys, *argv)
    assert not (handed / "trace").exists()


def test_a_hash_covers_names_and_contents_of_all_code(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.py").write_text("2")
    hashes = {code_hash(str(tmp_path))}
    (tmp_path / "sub/b.py").write_text("3")
    hashes.add(code_hash(str(tmp_path)))
    (tmp_path / "sub/b.py").rename(tmp_path / "b.py")
    hashes.add(code_hash(str(tmp_path)))
    (tmp_path / "b.py").write_text("")
    hashes.add(code_hash(str(tmp_path)))
    (tmp_path / "config.json").write_text("no code")
    assert len(hashes) == 4 and code_hash(str(tmp_path)) in hashes


def test_workers_and_trials_get_the_consent_and_files_do_not(handed: Path) -> None:
    recipe = parse(str(handed / "recipe.yaml")).trusting(["0" * 32])
    sent = pickle.loads(pickle.dumps(recipe))  # as Ray sends it to workers
    assert sent.trusted_code == {"0" * 32} == sent.override({"seed": 7}).trusted_code
    assert loads(recipe.to_yaml(), "r.yaml").trusted_code == frozenset()
    assert recipe.hash() == parse(str(handed / "recipe.yaml")).hash()
