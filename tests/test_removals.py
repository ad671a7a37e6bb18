"""Nothing of the user's is deleted: a table lists what each removing function may take."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.export.hugging_face import REPLACED
from sevenfold.run_folder import RunFolder

LIBRARY = ROOT / "platform/sevenfold"
# Calls that remove or replace something, by module and name; METHODS are those of path objects.
CALLS = {
    "storage": {"remove", "remove_empty", "new_folder", "temporary_folder_beside"},
    "os": {"remove", "unlink", "rmdir", "removedirs", "rename", "renames", "replace", "truncate"},
    "shutil": {"rmtree", "move"},
    "tempfile": {"TemporaryDirectory", "NamedTemporaryFile", "mkdtemp", "mkstemp"},
    "fs": {"rm", "rm_file", "mv", "move", "delete"},
}
METHODS = {"unlink", "rmdir", "rmtree"}

# For each function that removes or replaces something: what it may take.
TABLE = {
    "init/command.py:_parsed": "A temporary folder of its own, with the recipe that is read.",
    "prepare/dry_run.py:describe": (
        "A temporary folder of its own, with what a run would prepare: test_dry_run.py."
    ),
    "storage/files.py:remove": "What its caller names; each caller is in this table.",
    "storage/files.py:remove_empty": "An empty folder.",
    "storage/files.py:_replace": (
        "The file that is written: its new contents replace it. Its own temporary file."
    ),
    "storage/copies.py:local_copy": (
        "Its own copy in the temporary folder, if it is unfinished or was changed."
    ),
    "storage/url_secrets.py:save_full_urls": (
        "~/.sevenfold/urls: a file with the same URLs and further ones replaces it."
    ),
    "cluster/temp_folder.py:_remove_ended_sessions": (
        "In Ray's private folder, sessions whose process has ended, apart from the newest ones."
    ),
    "storage/copies.py:_download": "Nothing: the copy does not exist.",
    "model/probe/rehearsal.py:rehearse_export": "Its own temporary folder.",
    "storage/folders.py:new_folder": "Its own temporary folder.",
    "storage/folders.py:_upload_over": (
        "At a URL: files of an earlier export that match the caller's pattern."
    ),
    "storage/folders.py:temporary_folder_beside": (
        "Its own temporary folder beside the target, and those of killed processes."
    ),
    "storage/folders.py:_move_into_place": (
        "The earlier folder, after every file outside the caller's pattern was moved out."
    ),
    "storage/folders.py:_restore_files": (
        "Nothing: it moves files back, and never over an existing one."
    ),
    "model/bases.py:write_base": "Nothing: the folder must be new or empty.",
    "model/gguf.py:unpack": "Nothing: the folder must be new or empty.",
    "engine/checkpoint/manager.py:CheckpointManager._write": (
        "Files of the save that just failed, in the directory that it created."
    ),
    "engine/checkpoint/retention.py:_remove_committed": (
        "Files that a manifest of this run names, in a checkpoint's directory."
    ),
    "engine/checkpoint/retention.py:_remove_unfinished": (
        "Shards and metadata of a save without a manifest, in such a directory."
    ),
    "data/ledger.py:Ledger._join": (
        "Ledger parts whose steps are all in a part that was just written."
    ),
    "data/ledger.py:Ledger.cut": (
        "Ledger parts (steps-N-M.parquet) after the step that the run resumes from."
    ),
    "data/token_cache.py:_encode_shard": "Its own temporary folder.",
    "data/sources/python_corpus.py:build_python": "Nothing: the folder must be new.",
    "data/tokenizer.py:save_tokenizer": "Its own temporary folder.",
    "evaluate/harness.py:harness": "Its own temporary folder.",
    "export/hugging_face.py:_folder": (
        "An earlier export's weights, and files that the export writes again."
    ),
    "report/run_log.py:RunLog._append": (
        "An incomplete last line of metrics.jsonl, left by a full disk."
    ),
    "prepare/job.py:_write_folder": (
        "The tokenizer and recipe.yaml that this start wrote before its input was refused."
    ),
    "faults/drill.py:_clear": (
        "An earlier drill's run, if it holds nothing but what a drill writes."
    ),
    "faults/drill.py:Drill.__init__": "Its own temporary folder.",
    "faults/inject.py:damage": "A checkpoint's file of the drill's own run, as the fault says.",
    "cluster/lease.py:Lease.close": "driver.json, which it wrote.",
    "sweep/worker_pool.py:WorkerPool._run_group": (
        "Ray Train's state of a finished worker group, in the sweep's ray folder."
    ),
    "sweep/snapshot.py:remove": (
        "The sweep's saved state, in its folder ray, if no trial of the sweep has a score."
    ),
    "sweep/snapshot.py:restore": (
        "Tune's state, in the sweep's ray/tune, which the sweep's saved state replaces."
    ),
    "sweep/trial.py:run": "Its own temporary folder.",
}


def removals() -> dict[str, list[str]]:
    """The functions of the library, as FILE:NAME, that call something of CALLS, with the calls."""
    found: dict[str, list[str]] = {}

    def visit(node: ast.AST, where: str, inside: tuple[str, ...], storage_itself: bool) -> None:
        for child in ast.iter_child_nodes(node):
            names = inside
            if (
                isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
                and len(inside) < 2
            ):
                names = (*inside, child.name)
            if isinstance(child, ast.Call):
                called = child.func
                owner = (
                    called.value.id
                    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)
                    else ""
                )
                name = (
                    called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                )
                bare = storage_itself and isinstance(called, ast.Name) and name in CALLS["storage"]
                if (
                    name in CALLS.get(owner, ())
                    or (isinstance(called, ast.Attribute) and name in METHODS)
                    or bare
                ):
                    found.setdefault(f"{where}:{'.'.join(names)}", []).append(f"{owner}.{name}")
            visit(child, where, names, storage_itself)

    for path in sorted(LIBRARY.rglob("*.py")):
        where = path.relative_to(LIBRARY).as_posix()
        visit(ast.parse(path.read_text()), where, (), where.startswith("storage/"))
    return found


def test_each_place_that_removes_something_is_in_the_table() -> None:
    found = removals()
    new = {where: calls for where, calls in found.items() if where not in TABLE}
    assert not new, f"say in TABLE what these may remove, and test that they remove no more: {new}"
    assert not TABLE.keys() - found.keys()


def listing(folder: Path) -> list[str]:
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if not p.is_dir() or p.is_symlink()
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An export that somebody added to."""
    folder = tmp_path / "model"
    (folder / "quantized").mkdir(parents=True)
    for name in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "notes.txt",
    ):
        (folder / name).write_text("old")
    (folder / "quantized/model.safetensors").write_text("theirs")
    (folder / "link").symlink_to(tmp_path)
    return folder


def export(path: Path | str, replaces: bool = True) -> None:
    with storage.new_folder(str(path), REPLACED if replaces else None) as aside:
        for name in ("config.json", "model.safetensors"):
            Path(aside, name).write_text("new")


KEPT = ["config.json", "link", "model.safetensors", "notes.txt", "quantized/model.safetensors"]


def test_an_export_replaces_its_own_files_alone(model: Path) -> None:
    export(model)
    assert listing(model) == KEPT and (model / "config.json").read_text() == "new"
    assert (model / "quantized/model.safetensors").read_text() == "theirs" and (
        model / "link"
    ).is_symlink()
    assert listing(model.parent) == sorted(f"model/{n}" for n in KEPT)  # nothing is left beside it
    with pytest.raises(
        InputError, match="expected a new or empty folder, found one with files in it"
    ):
        export(model, replaces=False)
    assert listing(model) == KEPT


def test_an_export_at_a_url_too(tmp_path: Path) -> None:
    root = f"memory://{tmp_path}/model"
    for name in ("config.json", "model-00001-of-00002.safetensors", "notes.txt"):
        storage.write(f"{root}/{name}", "old")
    export(root)
    assert storage.listdir(root) == ["config.json", "model.safetensors", "notes.txt"]
    with pytest.raises(InputError, match="expected a new or empty folder"):
        export(root, replaces=False)


def test_an_export_through_a_link(model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "large-disk"
    model.rename(moved)
    model.symlink_to(moved)
    export(model)
    assert model.is_symlink() and listing(moved) == KEPT


EXPORT = """
import re, sys, time
sys.path.insert(0, {library!r})
from pathlib import Path
from sevenfold import storage
from sevenfold.errors import InputError
try:
    with storage.new_folder({folder!r}, re.compile({pattern!r}) if {replaces} else None) as aside:
        for name in ("config.json", "model.safetensors"):
            Path(aside, name).write_text(sys.argv[1])
        Path({folder!r} + "." + sys.argv[1]).touch()
        while len(list(Path({folder!r}).parent.glob("model.?"))) < 4:
            time.sleep(0.001)
except InputError as e:
    sys.exit(str(e))
"""


@pytest.mark.parametrize("replaces", [True, False])
def test_exports_at_once_into_one_folder(model: Path, replaces: bool) -> None:
    if not replaces:
        shutil.rmtree(model)
    script = EXPORT.format(
        library=str(ROOT / "platform"),
        folder=str(model),
        replaces=replaces,
        pattern=REPLACED.pattern,
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(i)], stderr=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    errors = [p.communicate(timeout=100)[1] for p in processes]
    assert (
        len({(model / n).read_text() for n in ("config.json", "model.safetensors")}) == 1
    )  # one of them, whole
    assert listing(model) == (KEPT if replaces else ["config.json", "model.safetensors"])
    assert [p.returncode for p in processes].count(0) == (4 if replaces else 1), errors
    assert all(not e or "expected a new or empty folder" in e for e in errors)
    assert not [p for p in model.parent.iterdir() if p.name.startswith(".")]


def test_what_killed_exports_left_is_put_right(model: Path) -> None:
    """One export was killed while it wrote, another between its two renames."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = os.uname().nodename
    (model.parent / f".model.{host}-{dead.pid}-0123abcd.unfinished").mkdir()
    model.rename(model.parent / f".model.{host}-{dead.pid}-0123abce.replaced")
    (alive := model.parent / f".model.{host}-{os.getppid()}-0123abcf.unfinished").mkdir()
    export(model)
    assert listing(model) == KEPT
    assert sorted(p.name for p in model.parent.iterdir()) == [alive.name, "model"]


def test_a_failed_write_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def fails(*_: object) -> None:
        raise IsADirectoryError

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(InputError):
        storage.write(str(path), "new")
    assert listing(tmp_path) == ["x.json"] and path.read_text() == "old"


def test_a_run_folder_knows_what_is_its_own(tmp_path: Path) -> None:
    own = [
        "recipe.yaml",
        "metrics.jsonl",
        "checkpoints/step-00000004.00/MANIFEST.json",
        "ledger/steps-000000001-000000004.parquet",
    ]
    own += [
        "checkpoints/step-00000004.00/.metadata",
        "model/model.safetensors",
        "model/README.md",
        "tokenizer/encoder.json",
    ]
    own += [
        "adapter/adapter_config.json",
        "tensorboard/events.out.tfevents.1.host.2.3",
        "metrics.json.12-0123abcd.tmp",
    ]
    theirs = [
        "notes.md",
        "checkpoints/good-one/MANIFEST.json",
        "checkpoints/step-4/x",
        "model/model.gguf",
        ".snapshot",
    ]
    theirs += [
        "checkpoints/step-00000004.00/note.txt",
        "ledger/steps-000000001-000000004 (copy).parquet",
    ]
    for name in own + theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = RunFolder(str(tmp_path))
    assert folder.other_files() == sorted(theirs)
    assert {"recipe.yaml", "checkpoints", "model"} <= set(
        folder.existing_outputs()
    ) and "notes.md" not in folder.existing_outputs()
