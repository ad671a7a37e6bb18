"""Checkpoints of real process groups: any number of ranks loads any other's; damage is found and passed over."""

import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RANKS, RECIPE, rank_process, run_ranks

from sevenfold import storage
from sevenfold.engine import checkpoint as ckpt
from sevenfold.engine import optim
from sevenfold.engine.batch import micro_batches, to_batch
from sevenfold.engine.step import train_step
from sevenfold.errors import RunError
from sevenfold.model.parallel import Place
from sevenfold.recipe import Recipe
from sevenfold.runs.faults import DAMAGES, damage


def steps(tree: dict[str, Any], folder: str, until: int, save_at: list[int]) -> list[float]:
    """Trains from the last good checkpoint on; returns the losses."""
    from test_step import ROWS, rows_of, sharded

    recipe = Recipe.model_validate(tree)
    tensor = recipe.parallel.tensor
    place = Place.of(torch.distributed.get_rank(), torch.distributed.get_world_size(), tensor)
    rank, world = place.rank, place.world_size
    model = sharded(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    found = ckpt.latest(folder)
    if found:
        ckpt.load(found, model, optimizer)
    saver = ckpt.Saver(folder, keep=10, last=found)
    out = []
    for step in range(found.step if found else 0, until):
        rows = rows_of(step).part(rank * ROWS // world, (rank + 1) * ROWS // world)
        batches = micro_batches(rows, 4, -(-ROWS // world // 4), to_batch, torch.device("cpu"))
        out.append(train_step(model, batches, optimizer, 1e-2, 1.0, tensor).loss)
        if step + 1 in save_at:
            saver.save(step + 1, model, optimizer, {"positions": {}})  # and on at once: what is written is a copy
    saver.close()
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    run_ranks(2, root / "pg", steps, recipe_of(2, {}), str(root / "c"), 4, [2, 4])
    return root / "c"


@pytest.fixture
def saved(made: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4 by two ranks."""
    return Path(shutil.copytree(made, tmp_path / "c"))


def recipe_of(workers: int, layout: dict[str, int]) -> dict[str, Any]:
    return {**RECIPE, "data": {**RECIPE["data"], "sources": [{"path": "x"}]}, "parallel": layout,
            "cluster": {"num_workers": workers}}  # fmt: skip


def ranks(world: int, store: Path, folder: object, until: int, save_at: list[int], **layout: int) -> list[float]:
    return list(run_ranks(world, store, steps, recipe_of(world, layout), str(folder), until, save_at)[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two ranks without a break."""
    root = tmp_path_factory.mktemp("whole")
    return ranks(2, root / "pg", root / "c", 12, [])


def test_any_number_and_layout_of_ranks_goes_on_as_the_unbroken_run(whole: list[float], saved: Path, tmp_path: Path) -> None:
    store = tmp_path / "pg"
    again = Path(shutil.copytree(saved, tmp_path / "again"))
    assert ranks(2, store / "0", again, 8, []) == whole[4:8]  # to the bit
    found = ranks(3, store / "1", saved, 6, [6]) + ranks(1, store / "2", saved, 8, [8])
    found += ranks(4, store / "3", saved, 10, [10], replicate=2) + ranks(2, store / "4", saved, 12, [], tensor=2)
    assert found[:4] == pytest.approx(whole[4:8], rel=1e-5)
    assert found == pytest.approx(whole[4:], rel=1e-4)


def test_an_object_store(whole: list[float], saved: Path, bucket: str, tmp_path: Path) -> None:
    """Read, written and damaged over S3's own protocol."""
    folder = f"{bucket}/runs/a/checkpoints"
    storage.upload(str(saved), folder)
    assert ranks(2, tmp_path / "pg" / "0", folder, 6, [6]) == whole[4:6]
    _, before, newest = ckpt.steps(folder).values()
    found = ckpt.latest(folder)
    assert found is not None and found.path == newest
    damage(newest, "flip", random.Random(1), before)
    found = ckpt.latest(folder)
    assert found is not None and found.path == before


def escape(at: Path) -> str:
    tree = json.loads((at / ckpt.MANIFEST).read_text())
    tree["files"]["../../x"] = next(iter(tree["files"].values()))
    tree.pop("sha256")
    tree["sha256"] = ckpt._of_tree(tree)
    (at / ckpt.MANIFEST).write_text(json.dumps(tree))
    return "leaves its folder"


def test_a_thousand_corruptions_are_found(saved: Path) -> None:
    before, newest = ckpt.steps(str(saved)).values()
    whole, quiet = ckpt.latest(str(saved)), list[str]()
    assert whole is not None and (whole.step, whole.path) == (4, newest)
    sound = {p.name: p.read_bytes() for p in Path(newest).iterdir()}
    for seed in range(1000):
        rng = random.Random(seed)
        done = damage(newest, rng.choice(DAMAGES), rng, before)
        found = ckpt.latest(str(saved), quiet.append)
        if found != whole:  # a changed manifest may say the same as before
            assert found is not None and found.step == 2, (seed, done)
        else:
            assert done.startswith(ckpt.MANIFEST), (seed, done)
        for name, raw in sound.items():
            Path(newest, name).write_bytes(raw)
    assert ckpt.latest(str(saved)) == whole and len(quiet) > 800


def pickled(at: Path) -> str:
    """Code in the place of a manifest, and of what the manifest speaks of."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(at.parent / "exploded"),)

    (at / ".metadata").write_bytes(pickle.dumps(Bomb()))
    return ".metadata"


def huge(at: Path) -> str:
    tree = json.loads((at / ckpt.MANIFEST).read_text())
    tree["files"]["__0_0.distcp"]["bytes"] = 1 << 80
    del tree["sha256"]
    (at / ckpt.MANIFEST).write_text(json.dumps({**tree, "sha256": ckpt._of_tree(tree)}))
    return "__0_0.distcp"


def no_json(at: Path) -> str:
    (at / ckpt.MANIFEST).write_bytes(pickle.dumps({"files": {}}))
    return "cannot be read"


@pytest.mark.parametrize("done", [escape, pickled, huge, no_json])
def test_damage_is_named_and_passed_over(saved: Path, done: Any, caplog: pytest.LogCaptureFixture) -> None:
    newest = ckpt.latest(str(saved))
    assert newest is not None and newest.step == 4 and set(newest.files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    named = done(Path(newest.path))
    with caplog.at_level(logging.WARNING):
        before = ckpt.latest(str(saved))
    assert before is not None and before.step == 2
    assert named in caplog.text and "damaged" in caplog.text
    assert not (saved / "exploded").exists()


def test_what_was_not_committed_is_not_there(saved: Path) -> None:
    newest = ckpt.latest(str(saved))
    assert newest is not None
    Path(newest.path, ckpt.MANIFEST).unlink()
    before = ckpt.latest(str(saved))
    assert before is not None and before.step == 2
    with pytest.raises(RunError, match="cannot be read"):
        ckpt.read(newest.path)


def test_the_newest_are_kept(saved: Path) -> None:
    (saved / "step-00000003.00").mkdir()  # of a save that was interrupted
    (saved / "step-00000005.00").mkdir()  # damaged, say
    newest = ckpt.latest(str(saved))
    assert newest is not None
    ckpt.prune(newest, 1, keep_every=2)
    ckpt.prune(newest, 2)
    assert sorted(p.name for p in saved.iterdir()) == ["step-00000002.00", "step-00000004.00", "step-00000005.00"]
    six = renamed(newest, 6)
    assert ckpt.prune(six, 2, damaged={"step-00000004.00"}) == []  # it is no good one that would do for the other
    assert sorted(p.name for p in saved.iterdir()) == ["step-00000002.00", "step-00000006.00"]


def renamed(checkpoint: ckpt.Checkpoint, step: int, run: str = "", number: int = 0) -> ckpt.Checkpoint:
    """A copy of a checkpoint, beside it, as if it had been saved at another step."""
    path = Path(checkpoint.path).with_name(f"step-{step:08d}.{number:02d}")
    made = replace(checkpoint, path=str(shutil.copytree(checkpoint.path, path)), step=step, run=run)
    ckpt._commit(made)
    return made


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FOREIGN = [".snapshot", "good-one", "note.txt", "step-00000001.00", "step-00000003.00/note.txt", "step-4-backup", "zz-copy"]


def keep_something(saved: Path) -> dict[str, bytes]:
    """Puts into a folder of checkpoints what people keep there; returns all of it."""
    newest, moved = ckpt.latest(str(saved)), saved.with_name("archive")
    assert newest is not None
    for name in ("good-one", "step-4-backup", "zz-copy"):
        shutil.copytree(newest.path, saved / name)
    (saved / ".snapshot").mkdir()
    (saved / ".snapshot/state").write_text("theirs")
    (saved / "note.txt").write_text("theirs")
    (saved / "step-00000003.00").mkdir()  # a save that was interrupted, in which somebody looked for the reason
    (saved / "step-00000003.00/note.txt").write_text("theirs")
    (saved / "step-00000003.00/__0_0.distcp").write_text("ours")
    shutil.copytree(newest.path, moved)  # archived, with a link in its place
    (saved / "step-00000001.00").symlink_to(moved)
    kept = {k: v for k, v in tree_of(saved).items() if k.startswith(tuple(FOREIGN))}
    return kept | {f"../archive/{k}": v for k, v in tree_of(moved).items()}


def test_what_people_keep_beside_checkpoints_is_theirs(saved: Path) -> None:
    kept = keep_something(saved)
    newest = ckpt.latest(str(saved))
    assert newest is not None and newest.path == str(saved / "step-00000004.00")  # neither zz-copy nor a backup is newer
    assert list(ckpt.steps(str(saved))) == [1, 2, 4]
    assert ckpt.prune(renamed(newest, 6), 1) == sorted(FOREIGN, key=lambda n: (n.startswith("step-0"), n))
    assert {p.name for p in saved.iterdir()} == {n.split("/")[0] for n in FOREIGN} | {"step-00000006.00"}
    assert kept == {k: (saved / k).read_bytes() for k in kept}


def test_a_checkpoint_of_another_run_is_not_this_ones_to_remove(saved: Path) -> None:
    newest = ckpt.latest(str(saved))
    assert newest is not None
    for step, run in ((5, "other"), (6, "mine"), (7, "mine")):
        renamed(newest, step, run)
    Path(saved, "step-00000006.00", ckpt.MANIFEST).write_text("{")  # nobody can tell any more whose it is
    assert ckpt.prune(ckpt.read(str(saved / "step-00000007.00")), 1) == [
        "step-00000002.00", "step-00000004.00", "step-00000005.00", "step-00000006.00"
    ]  # fmt: skip


def test_checkpoints_are_ordered_by_number(saved: Path) -> None:
    newest = ckpt.latest(str(saved))
    assert newest is not None
    for step, number in ((99_999_999, 99), (99_999_999, 100), (100_000_000, 0)):
        renamed(newest, step, number=number)
    found = ckpt.latest(str(saved))
    assert found is not None and found.step == 100_000_000 and list(ckpt.steps(str(saved))) == [2, 4, 99_999_999, 100_000_000]
    assert ckpt.steps(str(saved))[99_999_999].endswith(".100")
    assert ckpt.prune(found, 2) == []
    assert sorted(p.name for p in saved.iterdir()) == ["step-100000000.00", "step-99999999.100"]


def test_a_copy_under_another_steps_name_is_not_newer(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(saved / "step-00000002.00", saved / "step-00000009.00")
    found = ckpt.latest(str(saved))
    assert found is not None and found.step == 4 and "says step 2: a copy of another checkpoint" in caplog.text


def beside_others(tree: dict[str, Any], folder: str) -> list[str]:
    """Saves steps 5 to 8, and keeps one."""
    from test_step import sharded

    recipe = Recipe.model_validate(tree)
    model = sharded(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    messages: list[str] = []
    saver = ckpt.Saver(folder, 1, None, messages.append, ckpt.latest(folder, messages.append))
    for step in range(5, 9):
        saver.save(step, model, optimizer, {})
    saver.wait()
    saver.close()
    return messages


def test_a_run_goes_on_beside_what_people_keep_and_says_so_once(saved: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    kept = keep_something(saved)
    (messages,) = run_ranks(1, tmp_path / "pg" / "store", beside_others, tree, str(saved))
    assert len(messages) == 1 and "kept, since this run did not write it" in messages[0]
    assert all(name in messages[0] for name in FOREIGN)
    assert list(ckpt.steps(str(saved))) == [1, 8] and kept == {k: (saved / k).read_bytes() for k in kept}


def limited(tree: dict[str, Any], folder: str) -> tuple[list[str], list[int | None]]:
    """Saves steps 1 to 5; from the second to the fourth rank 1 may write no file of any size."""
    from test_step import sharded

    recipe = Recipe.model_validate(tree)
    model = sharded(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    ckpt.RETRIES = (0.01,)
    told: list[str] = []
    saver, last = ckpt.Saver(folder, tell=told.append), []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the kernel ends the process
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 6):
        full = step in (2, 3) and torch.distributed.get_rank() == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, whole[1]) if full else whole)
        saver.save(step, model, optimizer, {})
        found = saver.wait()
        last.append(found.step if found else None)
    saver.close()
    return told, last


def test_a_full_disk_costs_an_interval_and_no_checkpoint(tree: dict[str, Any], tmp_path: Path) -> None:
    found = run_ranks(2, tmp_path / "pg" / "full", limited, tree, str(tmp_path / "c"))
    assert [last for _, last in found] == [[1, 1, 1, 4, 5]] * 2
    told = found[0][0]
    assert len(told) == 2 and all("File too large" in t and "step 1 is the last one" in t for t in told) and not found[1][0]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-00000004.00", "step-00000005.00"]


def hopeless(tree: dict[str, Any], folder: str) -> str:
    from test_step import sharded

    recipe = Recipe.model_validate(tree)
    model = sharded(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    ckpt.RETRIES = ()
    saver = ckpt.Saver(folder)
    try:
        for step in range(1, 9):
            saver.save(step, model, optimizer, {})
    except RunError as e:
        return f"{step}: {e}"
    finally:
        saver.close()
    return "saved"


def test_a_run_that_cannot_save_stops(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c").write_text("no folder")
    for said in run_ranks(2, tmp_path / "pg" / "hopeless", hopeless, tree, str(tmp_path / "c")):
        assert said.startswith("4: 3 checkpoints in a row could not be written; there is none"), said


def test_a_kill_at_any_point_of_a_save(tree: dict[str, Any], tmp_path: Path) -> None:
    """A process that dies at its k-th touch of the checkpoints' folder, for every k of a save that also removes an old one."""
    folder, aside, points = tmp_path / "c", tmp_path / "aside", list[str]()
    run_ranks(1, tmp_path / "pg" / "first", steps, tree, str(aside), 4, [1, 2])
    ended = False
    while not ended:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(aside, folder)
        ended = killed_at(len(points) + 1, tree, folder, points)
        committed = [p for p in folder.iterdir() if (p / ckpt.MANIFEST).exists()]
        for path in committed:
            ckpt.verify(ckpt.read(str(path)))
        found = ckpt.latest(str(folder))
        assert found is not None and found.step in (2, 3) and len(committed) >= 2
        assert found.step == 3 or not ended
    assert {"open", "os.rename", "os.remove"} <= set(points) and len(points) > 8, points


def dying(tree: dict[str, Any], folder: str, touch: int) -> None:
    from test_step import sharded

    recipe = Recipe.model_validate(tree)
    model = sharded(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    saver = ckpt.Saver(folder, keep=2, last=ckpt.latest(folder))
    left = touch

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wxa"
        )
        if writes and folder in str(arguments[0]):
            left -= 1
            if not left:
                Path(folder).with_name("died").write_text(event)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    saver.save(3, model, optimizer, {})
    saver.wait()
    saver.close()


def killed_at(touch: int, tree: dict[str, Any], folder: Path, points: list[str]) -> bool:
    """Whether the save came to its end before that many touches; else what it died at is added to the points."""
    results: Any = RANKS.Queue()
    process = rank_process(0, 1, folder.with_name(f"store{touch}"), results, dying, tree, str(folder), touch)
    process.start()
    process.join(120)
    if process.exitcode == 0:
        _, error, _ = results.get()
        assert error is None, error
        return True
    assert process.exitcode == -signal.SIGKILL
    points.append(folder.with_name("died").read_text())
    return False
