"""A damaged file of a run or a model is named in one line; nothing is computed from it silently.

Each file of a run is damaged in each way, and each command that may read it is run on the result.
`make test` takes some commands and one damage per file in turn, `make test-nightly` all.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused, run_job
from helpers.damages import DAMAGES, ReachedCluster, Runner, damage, files_of
from helpers.handed_runs import COMMANDS, finished_run, stop_before_the_cluster

from sevenfold import storage
from sevenfold.cli import main
from sevenfold.cluster.lease import Lease
from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.report import ranking
from sevenfold.report.run_log import read_reports
from sevenfold.run_folder import RunFolder

# of those that load the same files in the same way, one
ORDINARY = ("export", "which", "generate", "evaluate", "resume", "finetune")
# the files, as a regular expression, without which the result of a command would be another one
NEEDED = {
    "export": r"recipe\.yaml|manifest\.json|tokenizer/(?!encoder).*",
    "which": r"recipe\.yaml|manifest\.json|tokenizer/.*|ledger/steps-0+1-.*",
    "replay": r"recipe\.yaml|manifest\.json|tokenizer/.*|ledger/steps-0+1-.*",
    "generate": r"model/.*",
    "chat": r"model/.*",
    "inspect": r"model/.*",
    "retrieve": r"model/.*",
    "evaluate": r"recipe\.yaml|manifest\.json|tokenizer/.*|model/.*",
    "resume": r"recipe\.yaml|manifest\.json|tokenizer/.*",
    "finetune": r"model/(?!model).*",
    "dry run": r"model/(?!model).*",
}
# Nobody needs the card. A changed bit of a recipe or a manifest may be another valid one: the
# checkpoints and the ledger's hashes say whether it is the run's.
HARMLESS = re.compile(
    r".*README\.md: .*|.*/checksums\.json: gone|.*(recipe|manifest|encoder).*: flipped"
)


@pytest.fixture(scope="module")
def finished() -> Path:
    """A home with the finished run runs/old, whose model was exported by this revision."""
    return finished_run()


def cases(run: Path, command: str, all_damages: bool) -> Iterator[tuple[str, str]]:
    """Yields (file, damage): all of them, or one damage of each file, another for each command."""
    turn = itertools.cycle(DAMAGES)
    for _ in range(list(COMMANDS).index(command)):
        next(turn)
    for file in files_of(run):
        for kind in DAMAGES if all_damages else [next(turn)]:
            yield file, kind


@pytest.mark.parametrize(
    ("command", "all_damages"),
    [
        *((command, False) for command in ORDINARY),
        *(pytest.param(command, True, marks=pytest.mark.nightly) for command in COMMANDS),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    finished: Path,
    command: str,
    all_damages: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_before_the_cluster(command, monkeypatch)
    monkeypatch.chdir(finished)
    run, argv = finished / "runs/old", COMMANDS[command]
    without = ("summary.json", "model") if command == "resume" else ()
    runner = Runner(run, tmp_path, capsys)
    code, output, errors = expected = runner(argv, without=without)
    assert code in (0, ReachedCluster) and not errors, errors
    wrong = []
    for file, kind in cases(run, command, all_damages):
        if file.startswith(without):
            continue
        code, output, errors = result = runner(argv, file, kind, without)
        is_needed = re.fullmatch(NEEDED[command], file)
        is_needed = is_needed and not HARMLESS.fullmatch(f"{file}: {kind}")
        if code in (1, 2):
            # all mistakes of a recipe are told at once, each in a line with the file
            right = len(errors) == 1 or (len(errors) > 1 and file == "recipe.yaml")
            right = right and all(error.startswith("error: ") for error in errors)
            names = (
                [Path(file).name, (run / file).parent.name] if kind == "gone" else [Path(file).name]
            )
            right = right and all(any(n in error + output for n in names) for error in errors)
        else:
            # a damaged checkpoint is named, and the one before it is used
            recovers = "tryingthepreviouscheckpoint" in output and Path(file).name in output
            right = not is_needed and (result == expected or recovers)
        if not right:
            wrong.append((file, kind, code, errors, output[-300:]))
    assert not wrong, "\n".join(map(str, wrong))


SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
NONSENSE: list[dict[str, Any]] = [
    *({size: value} for size in SIZES for value in (-3, 0, "two", [1, 2])),
    {"hidden_size": 33},  # not divisible by the heads
    {"num_attention_heads": 2, "num_key_value_heads": 3},
    {"vocab_size": -1},
    {"vocab_size": 10**12},
    {"intermediate_size": 10**12},
    {"head_dim": 0},
    {"hidden_act": "nonsense"},
    {"rope_parameters": [1]},
    {"attention_dropout": -1},
    {"pad_token_id": 10**6},
    {"dtype": "nonsense"},
    {"model_type": ["llama"]},
    {"architectures": [3]},
]


def test_nonsense_in_a_config_is_refused_before_anything_starts(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished)
    stop_before_the_cluster("pretrain", monkeypatch)
    base, recipe = tmp_path / "base", yaml.safe_load((finished / "recipe.yaml").read_text())
    shutil.copytree(finished / "runs/old/model", base)
    (base / "checksums.json").unlink()
    config = json.loads((base / "config.json").read_text())
    for values in NONSENSE:
        (base / "config.json").write_text(json.dumps(config | values))
        tree = recipe | {"model": {"config": recipe["model"]["config"] | values}}
        (tmp_path / "nonsense.yaml").write_text(yaml.safe_dump(tree | {"name": "nonsense"}))
        line = refused(capsys, "pretrain", str(tmp_path / "nonsense.yaml"))
        assert re.match(r"error: (model\.config|.*/nonsense\.yaml: model)", line), (values, line)
        for argv in (
            ["finetune", "sft.yaml", f"storage={tmp_path}", f"model.path={base}"],
            ["generate", str(base), "--prompt", "a"],
        ):
            assert str(base) in refused(capsys, *argv), values
    assert not (finished / "runs/nonsense").exists() and not (tmp_path / "sft").exists()


def test_an_export_is_verified_when_it_is_loaded(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(finished / "runs/old/model", model)
    generate = ["generate", str(model), "--prompt", "a", "--max-new-tokens", "2"]
    # the card is for people, and a file that the export did not write is nobody's business
    (model / "README.md").write_text("changed")
    (model / "notes.txt").write_text("new")
    assert main(generate) == 0
    storage.verify_checksums.cache_clear()
    damage(model / "model.safetensors", "flipped")
    line = refused(capsys, *generate)
    assert re.search(r"model\.safetensors: was changed: expected SHA-256 \w+\.\.\., found", line)
    assert f"remove {model}/checksums.json" in line
    # weights are not read where a config is enough
    config = json.loads((model / "config.json").read_text())
    assert build.local_model(str(model), weights=False) == str(model)
    # a change on purpose: as the line says, the file is used once the checksums are gone
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    storage.verify_checksums.cache_clear()
    assert "config.json: was changed: expected " in refused(capsys, *generate)
    (model / "checksums.json").unlink()
    assert main(generate) == 0


def test_an_export_at_a_url_is_verified(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    assert main(["export", "runs/old", "--out", "memory://exported"]) == 0
    url = "memory://exported/model.safetensors"
    with storage.open_read(url) as file:
        content = bytearray(file.read())
    content[-1] ^= 1
    storage.write(url, bytes(content))
    line = refused(capsys, "generate", "memory://exported", "--prompt", "a")
    assert "model.safetensors: was changed" in line


def test_a_damaged_file_of_a_sweep_is_named(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    trial = {
        "trial": "a",
        "config": {},
        "step": 1,
        "score": 1.0,
        "metrics": {},
        "status": "finished",
    }
    (tmp_path / "trials/a").mkdir(parents=True)
    for kind in DAMAGES.keys() - {"flipped", "gone"}:
        for name, content, read in (
            (
                "driver.json",
                {"token": "a", "pid": 1, "host": "b", "number": 1},
                lambda: Lease(folder),
            ),
            ("trials.json", [trial | {"error": None}], lambda: ranking.show(folder)),
            ("reports.json", [{"step": 1}], lambda: read_reports(str(tmp_path / "reports.json"))),
        ):
            (tmp_path / name).write_text(json.dumps(content))
            damage(tmp_path / name, kind)
            with pytest.raises(InputError, match=re.escape(f"{tmp_path / name}: ")):
                read()
            path = tmp_path / name
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.nightly
def test_workers_name_a_damaged_file(home: Path, tmp_path: Path) -> None:
    """Some files are read only by workers and actors on the cluster."""
    shutil.copytree(home / "runs/whole", tmp_path / "runs/whole")
    for name in ("heldout", "pairs"):
        shutil.copytree(home / name, tmp_path / name)
    shutil.copy(home / "sft.yaml", tmp_path)
    run = tmp_path / "runs/whole"
    damage(run / "model/model.safetensors", "flipped")
    stderr = run_job("evaluate", "runs/whole", home=tmp_path, code=2)
    assert "Traceback" not in stderr and "model.safetensors: was changed" in stderr
    stderr = run_job("finetune", "sft.yaml", "name=tuned", home=tmp_path, code=1)
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "model.safetensors: was changed" in line and "Traceback" not in stderr
    # the log of a run that is resumed
    (run / "summary.json").unlink()
    damage(run / "metrics.jsonl", "not UTF-8")
    recipe = str(home / "pretrain.yaml")
    stderr = run_job("pretrain", recipe, "name=whole", home=tmp_path, code=2)
    assert f"{run}/metrics.jsonl: expected UTF-8" in stderr and "Traceback" not in stderr
