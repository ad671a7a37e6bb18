"""Checkpoints of real process groups.

Any number of ranks loads the checkpoints of any other number; damage is detected and an older
checkpoint is used.
"""

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
from sevenfold.engine import optim
from sevenfold.engine.batch import micro_batches, to_batch
from sevenfold.engine.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointManager,
    checkpoint_paths,
    commit,
    latest_checkpoint,
    load_checkpoint,
    manager,
    prune_checkpoints,
    read_manifest,
    tree_digest,
    verify_files,
)
from sevenfold.engine.step import train_step
from sevenfold.errors import RunError
from sevenfold.faults.inject import DAMAGES, damage
from sevenfold.model.parallel import DataRank
from sevenfold.recipe import Recipe


def train_steps(tree: dict[str, Any], folder: str, stop: int, save_at: list[int]) -> list[float]:
    """Trains from the latest valid checkpoint, if there is one; returns the losses."""
    from helpers.training import ROWS, rows_of, sharded_model

    recipe = Recipe.model_validate(tree)
    tensor = recipe.parallel.tensor
    place = DataRank.from_rank(
        torch.distributed.get_rank(), torch.distributed.get_world_size(), tensor
    )
    rank, world = place.rank, place.world_size
    model = sharded_model(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    checkpoint = latest_checkpoint(folder)
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizer)
    saver = CheckpointManager(folder, keep=10, last=checkpoint)
    losses = []
    for step in range(checkpoint.step if checkpoint else 0, stop):
        rows = rows_of(step).part(rank * ROWS // world, (rank + 1) * ROWS // world)
        batches = micro_batches(rows, 4, -(-ROWS // world // 4), to_batch, torch.device("cpu"))
        losses.append(train_step(model, batches, optimizer, 1e-2, 1.0, tensor=tensor).loss)
        if step + 1 in save_at:
            # training continues at once: what is written is a copy
            saver.save(step + 1, model, optimizer, {"positions": {}})
    saver.close()
    return losses


@pytest.fixture(scope="module")
def two_rank_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    run_ranks(2, root / "pg", train_steps, recipe_of(2, {}), str(root / "c"), 4, [2, 4])
    return root / "c"


@pytest.fixture
def saved(two_rank_checkpoints: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4 by two ranks."""
    return Path(shutil.copytree(two_rank_checkpoints, tmp_path / "c"))


def recipe_of(workers: int, layout: dict[str, int]) -> dict[str, Any]:
    """A recipe for this number of workers and this `parallel` section."""
    return {
        **RECIPE,
        "data": {**RECIPE["data"], "sources": [{"path": "x"}]},
        "parallel": layout,
        "cluster": {"num_workers": workers},
    }


def train_on_ranks(
    world: int, store: Path, folder: object, stop: int, save_at: list[int], **layout: int
) -> list[float]:
    """Runs `train_steps` on this number of ranks and returns rank 0's losses."""
    recipe = recipe_of(world, layout)
    return list(run_ranks(world, store, train_steps, recipe, str(folder), stop, save_at)[0])


@pytest.fixture(scope="module")
def uninterrupted_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two ranks without an interruption."""
    root = tmp_path_factory.mktemp("whole")
    return train_on_ranks(2, root / "pg", root / "c", 12, [])


def test_any_number_and_layout_of_ranks_resumes_with_the_same_losses(
    uninterrupted_losses: list[float], saved: Path, tmp_path: Path
) -> None:
    store = tmp_path / "pg"
    copy = Path(shutil.copytree(saved, tmp_path / "again"))
    assert train_on_ranks(2, store / "0", copy, 8, []) == uninterrupted_losses[4:8]  # to the bit
    losses = train_on_ranks(3, store / "1", saved, 6, [6]) + train_on_ranks(
        1, store / "2", saved, 8, [8]
    )
    losses += train_on_ranks(4, store / "3", saved, 10, [10], replicate=2) + train_on_ranks(
        2, store / "4", saved, 12, [], tensor=2
    )
    assert losses[:4] == pytest.approx(uninterrupted_losses[4:8], rel=1e-5)
    assert losses == pytest.approx(uninterrupted_losses[4:], rel=1e-4)


def test_checkpoints_in_an_object_store(
    uninterrupted_losses: list[float], saved: Path, bucket: str, tmp_path: Path
) -> None:
    """Checkpoints are read, written and damaged over S3's own protocol."""
    folder = f"{bucket}/runs/a/checkpoints"
    storage.upload(str(saved), folder)
    assert train_on_ranks(2, tmp_path / "pg" / "0", folder, 6, [6]) == uninterrupted_losses[4:6]
    _, previous, newest = checkpoint_paths(folder).values()
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None and checkpoint.path == newest
    damage(newest, "flip", random.Random(1), previous)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None and checkpoint.path == previous


def escape(path: Path) -> str:
    tree = json.loads((path / MANIFEST).read_text())
    tree["files"]["../../x"] = next(iter(tree["files"].values()))
    tree.pop("sha256")
    tree["sha256"] = tree_digest(tree)
    (path / MANIFEST).write_text(json.dumps(tree))
    return "outside this directory"


def test_a_thousand_corruptions_are_detected(saved: Path) -> None:
    previous, newest = checkpoint_paths(str(saved)).values()
    undamaged, messages = latest_checkpoint(str(saved)), list[str]()
    assert undamaged is not None and (undamaged.step, undamaged.path) == (4, newest)
    files = {p.name: p.read_bytes() for p in Path(newest).iterdir()}
    for seed in range(1000):
        rng = random.Random(seed)
        description = damage(newest, rng.choice(DAMAGES), rng, previous)
        checkpoint = latest_checkpoint(str(saved), messages.append)
        changed = {p.name for p in Path(newest).iterdir() if p.read_bytes() != files.get(p.name)}
        if checkpoint != undamaged:
            assert checkpoint is not None and checkpoint.step == 2, (seed, description)
        else:  # a changed manifest may still mean the same, and checkpoints' indexes are equal
            assert changed <= {MANIFEST}, (seed, description)
        for name, data in files.items():
            Path(newest, name).write_bytes(data)
    assert latest_checkpoint(str(saved)) == undamaged and len(messages) > 800


def pickled(path: Path) -> str:
    """Puts a pickle that runs code in the place of a file that the manifest lists."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path.parent / "exploded"),)

    (path / "tensors.json").write_bytes(pickle.dumps(Bomb()))
    return "tensors.json"


def huge(path: Path) -> str:
    tree = json.loads((path / MANIFEST).read_text())
    tree["files"]["__0_0.distcp"]["bytes"] = 1 << 80
    del tree["sha256"]
    (path / MANIFEST).write_text(json.dumps({**tree, "sha256": tree_digest(tree)}))
    return "__0_0.distcp"


def no_json(path: Path) -> str:
    (path / MANIFEST).write_bytes(pickle.dumps({"files": {}}))
    return "cannot be read"


@pytest.mark.parametrize("done", [escape, pickled, huge, no_json])
def test_a_damaged_checkpoint_is_named_and_skipped(
    saved: Path, done: Any, caplog: pytest.LogCaptureFixture
) -> None:
    newest = latest_checkpoint(str(saved))
    assert (
        newest is not None
        and newest.step == 4
        and set(newest.files) == {"tensors.json", "__0_0.distcp", "__1_0.distcp"}
    )
    message = done(Path(newest.path))
    with caplog.at_level(logging.WARNING):
        previous = latest_checkpoint(str(saved))
    assert previous is not None and previous.step == 2
    assert message in caplog.text and "damaged" in caplog.text
    assert not (saved / "exploded").exists()


def test_an_uncommitted_checkpoint_is_ignored(saved: Path) -> None:
    newest = latest_checkpoint(str(saved))
    assert newest is not None
    Path(newest.path, MANIFEST).unlink()
    previous = latest_checkpoint(str(saved))
    assert previous is not None and previous.step == 2
    with pytest.raises(RunError, match="cannot be read"):
        read_manifest(newest.path)


def test_the_newest_checkpoints_are_kept(saved: Path) -> None:
    (saved / "step-00000003.00").mkdir()  # left by an interrupted save
    (saved / "step-00000005.00").mkdir()  # for example a damaged checkpoint
    newest = latest_checkpoint(str(saved))
    assert newest is not None
    prune_checkpoints(newest, 1, keep_every=2)
    prune_checkpoints(newest, 2)
    assert sorted(p.name for p in saved.iterdir()) == [
        "step-00000002.00",
        "step-00000004.00",
        "step-00000005.00",
    ]
    step_6 = copy_as(newest, 6)
    # a damaged checkpoint does not count as one of the two to keep
    assert prune_checkpoints(step_6, 2, damaged={"step-00000004.00"}) == []
    assert sorted(p.name for p in saved.iterdir()) == ["step-00000002.00", "step-00000006.00"]


def copy_as(checkpoint: Checkpoint, step: int, run: str = "", number: int = 0) -> Checkpoint:
    """Copies a checkpoint beside itself, as if it had been saved at another step."""
    path = Path(checkpoint.path).with_name(f"step-{step:08d}.{number:02d}")
    copy = replace(checkpoint, path=str(shutil.copytree(checkpoint.path, path)), step=step, run=run)
    commit(copy)
    return copy


def file_contents(folder: Path) -> dict[str, bytes]:
    """The contents of all files below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FOREIGN = [
    ".snapshot",
    "good-one",
    "note.txt",
    "step-00000001.00",
    "step-00000003.00/note.txt",
    "step-4-backup",
    "zz-copy",
]


def add_foreign_files(saved: Path) -> dict[str, bytes]:
    """Adds files of other people to a folder of checkpoints; returns the contents of them all."""
    newest, archive = latest_checkpoint(str(saved)), saved.with_name("archive")
    assert newest is not None
    for name in ("good-one", "step-4-backup", "zz-copy"):
        shutil.copytree(newest.path, saved / name)
    (saved / ".snapshot").mkdir()
    (saved / ".snapshot/state").write_text("theirs")
    (saved / "note.txt").write_text("theirs")
    # an interrupted save, in which somebody has left a note
    (saved / "step-00000003.00").mkdir()
    (saved / "step-00000003.00/note.txt").write_text("theirs")
    (saved / "step-00000003.00/__0_0.distcp").write_text("ours")
    shutil.copytree(newest.path, archive)  # archived, with a link in its place
    (saved / "step-00000001.00").symlink_to(archive)
    kept = {
        path: data for path, data in file_contents(saved).items() if path.startswith(tuple(FOREIGN))
    }
    return kept | {f"../archive/{path}": data for path, data in file_contents(archive).items()}


def test_files_of_others_beside_checkpoints_are_never_removed(saved: Path) -> None:
    kept = add_foreign_files(saved)
    newest = latest_checkpoint(str(saved))
    # neither zz-copy nor a backup counts as newer
    assert newest is not None and newest.path == str(saved / "step-00000004.00")
    assert list(checkpoint_paths(str(saved))) == [1, 2, 4]
    assert prune_checkpoints(copy_as(newest, 6), 1) == sorted(
        FOREIGN, key=lambda name: (name.startswith("step-0"), name)
    )
    assert {p.name for p in saved.iterdir()} == {name.split("/")[0] for name in FOREIGN} | {
        "step-00000006.00"
    }
    assert kept == {path: (saved / path).read_bytes() for path in kept}


def test_checkpoints_of_another_run_are_not_removed(saved: Path) -> None:
    newest = latest_checkpoint(str(saved))
    assert newest is not None
    for step, run in ((5, "other"), (6, "mine"), (7, "mine")):
        copy_as(newest, step, run)
    # it is no longer known which run wrote this one
    Path(saved, "step-00000006.00", MANIFEST).write_text("{")
    assert prune_checkpoints(read_manifest(str(saved / "step-00000007.00")), 1) == [
        "step-00000002.00",
        "step-00000004.00",
        "step-00000005.00",
        "step-00000006.00",
    ]


def test_checkpoints_are_ordered_by_number(saved: Path) -> None:
    newest = latest_checkpoint(str(saved))
    assert newest is not None
    for step, number in ((99_999_999, 99), (99_999_999, 100), (100_000_000, 0)):
        copy_as(newest, step, number=number)
    checkpoint = latest_checkpoint(str(saved))
    assert (
        checkpoint is not None
        and checkpoint.step == 100_000_000
        and list(checkpoint_paths(str(saved))) == [2, 4, 99_999_999, 100_000_000]
    )
    assert checkpoint_paths(str(saved))[99_999_999].endswith(".100")
    assert prune_checkpoints(checkpoint, 2) == []
    assert sorted(p.name for p in saved.iterdir()) == ["step-100000000.00", "step-99999999.100"]


def test_a_copy_under_another_steps_name_is_not_newer(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved / "step-00000002.00", saved / "step-00000009.00")
    checkpoint = latest_checkpoint(str(saved))
    assert (
        checkpoint is not None
        and checkpoint.step == 4
        and "says step 2: this is a renamed copy of another checkpoint" in caplog.text
    )


def save_beside_foreign_files(tree: dict[str, Any], folder: str) -> list[str]:
    """Saves steps 5 to 8, keeping one checkpoint; returns the messages."""
    from helpers.training import sharded_model

    recipe = Recipe.model_validate(tree)
    model = sharded_model(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    messages: list[str] = []
    saver = CheckpointManager(
        folder, keep=1, say=messages.append, last=latest_checkpoint(folder, messages.append)
    )
    for step in range(5, 9):
        saver.save(step, model, optimizer, {})
    saver.wait()
    saver.close()
    return messages


def test_a_run_reports_files_of_others_once_and_keeps_them(
    saved: Path, tree: dict[str, Any], tmp_path: Path
) -> None:
    kept = add_foreign_files(saved)
    (messages,) = run_ranks(
        1, tmp_path / "pg" / "store", save_beside_foreign_files, tree, str(saved)
    )
    assert len(messages) == 1 and "kept files not written by this run" in messages[0]
    assert all(name in messages[0] for name in FOREIGN)
    assert list(checkpoint_paths(str(saved))) == [1, 8] and kept == {
        path: (saved / path).read_bytes() for path in kept
    }


def save_with_full_disk(tree: dict[str, Any], folder: str) -> tuple[list[str], list[int | None]]:
    """Saves steps 1 to 5; at steps 2 and 3 rank 1 cannot write files above 1,024 bytes."""
    from helpers.training import sharded_model

    recipe = Recipe.model_validate(tree)
    model = sharded_model(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    manager.RETRIES = (0.01,)
    messages: list[str] = []
    saver, last_steps = CheckpointManager(folder, say=messages.append), []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # otherwise the kernel ends the process
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 6):
        full = step in (2, 3) and torch.distributed.get_rank() == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]) if full else limit)
        saver.save(step, model, optimizer, {})
        checkpoint = saver.wait()
        last_steps.append(checkpoint.step if checkpoint else None)
    saver.close()
    return messages, last_steps


def test_a_full_disk_loses_no_committed_checkpoint(tree: dict[str, Any], tmp_path: Path) -> None:
    results = run_ranks(2, tmp_path / "pg" / "full", save_with_full_disk, tree, str(tmp_path / "c"))
    assert [last_steps for _, last_steps in results] == [[1, 1, 1, 4, 5]] * 2
    messages = results[0][0]
    assert (
        len(messages) == 2
        and all(
            "File too large" in message and "the last checkpoint is of step 1" in message
            for message in messages
        )
        and not results[1][0]
    )
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "step-00000004.00",
        "step-00000005.00",
    ]


def save_without_folder(tree: dict[str, Any], folder: str) -> str:
    """Saves where no folder can be created; returns the step and the message of the error."""
    from helpers.training import sharded_model

    recipe = Recipe.model_validate(tree)
    model = sharded_model(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    manager.RETRIES = ()
    saver = CheckpointManager(folder)
    try:
        for step in range(1, 9):
            saver.save(step, model, optimizer, {})
    except RunError as error:
        return f"{step}: {error}"
    finally:
        saver.close()
    return "saved"


def test_a_run_that_cannot_save_stops(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c").write_text("no folder")
    for message in run_ranks(
        2, tmp_path / "pg" / "hopeless", save_without_folder, tree, str(tmp_path / "c")
    ):
        assert message.startswith(
            "4: 3 checkpoints in a row could not be written; there is no checkpoint yet"
        ), message


def test_a_kill_at_any_point_of_a_save(tree: dict[str, Any], tmp_path: Path) -> None:
    """A process dies at its k-th write to the checkpoints' folder.

    This is repeated for every k of a save that also removes an old checkpoint.
    """
    folder, original, events = tmp_path / "c", tmp_path / "aside", list[str]()
    run_ranks(1, tmp_path / "pg" / "first", train_steps, tree, str(original), 4, [1, 2])
    completed = False
    while not completed:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        completed = save_survives_kill_at(len(events) + 1, tree, folder, events)
        committed = [p for p in folder.iterdir() if (p / MANIFEST).exists()]
        for path in committed:
            verify_files(read_manifest(str(path)))
        checkpoint = latest_checkpoint(str(folder))
        assert checkpoint is not None and checkpoint.step in (2, 3) and len(committed) >= 2
        assert checkpoint.step == 3 or not completed
    assert {"open", "os.rename", "os.remove"} <= set(events) and len(events) > 8, events


def save_until_killed(tree: dict[str, Any], folder: str, kill_at: int) -> None:
    """Saves step 3 and kills itself at the write with this number."""
    from helpers.training import sharded_model

    recipe = Recipe.model_validate(tree)
    model = sharded_model(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    saver = CheckpointManager(folder, keep=2, last=latest_checkpoint(folder))
    remaining = kill_at

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal remaining
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wxa"
        )
        if writes and folder in str(arguments[0]):
            remaining -= 1
            if not remaining:
                Path(folder).with_name("died").write_text(event)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    saver.save(3, model, optimizer, {})
    saver.wait()
    saver.close()


def save_survives_kill_at(
    kill_at: int, tree: dict[str, Any], folder: Path, events: list[str]
) -> bool:
    """Whether the save completed before that write; if not, `events` gets the event it died at."""
    results: Any = RANKS.Queue()
    process = rank_process(
        0,
        1,
        folder.with_name(f"store{kill_at}"),
        results,
        save_until_killed,
        tree,
        str(folder),
        kill_at,
    )
    process.start()
    process.join(120)
    if process.exitcode == 0:
        _, error, _ = results.get()
        assert error is None, error
        return True
    assert process.exitcode == -signal.SIGKILL
    events.append(folder.with_name("died").read_text())
    return False


class WithUnused(torch.nn.Module):
    """A model whose loss does not depend on one of its layers, as on BERT's pooler."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.router, self.pooler = (torch.nn.Linear(4, 4) for _ in range(3))

    def step(self, optimizers: list[torch.optim.Optimizer]) -> float:
        loss = self.router(self.used(torch.ones(2, 4))).square().sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()


@pytest.mark.parametrize("moved", [False, True])
def test_parameters_without_saved_state_resume(moved: bool, tmp_path: Path, one_rank: None) -> None:
    def optimizers(model: WithUnused, with_router: bool) -> list[torch.optim.Optimizer]:
        router = [model.router.weight]
        rest = [p for p in model.parameters() if p is not router[0]]
        adamw = torch.optim.AdamW(rest + router * with_router, lr=0.1)
        return [adamw] if with_router else [adamw, torch.optim.SGD(router, lr=0.1, momentum=0.9)]

    model = WithUnused()
    # an earlier version updated the router by another optimizer
    before = optimizers(model, with_router=not moved)
    model.step(before)
    saver = CheckpointManager(str(tmp_path / "checkpoints"))
    saver.save(1, model, before, {"recipe": "", "versions": {"sevenfold": "0"}})
    saver.close()
    checkpoint = latest_checkpoint(str(tmp_path / "checkpoints"))
    assert checkpoint is not None
    resumed = WithUnused()
    after = optimizers(resumed, with_router=True)
    assert load_checkpoint(checkpoint, resumed, after) == ({"router.weight"} if moved else set())
    assert resumed.pooler.weight not in after[0].state
    assert (resumed.router.weight in after[0].state) is not moved
    assert after[0].state[resumed.used.weight]["step"] == 1
    if not moved:
        assert [model.step(before) for _ in range(3)] == [resumed.step(after) for _ in range(3)]
