"""Checkpoints of real process groups: any number of ranks loads any other's; damage is found and passed over."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks

from sevenfold.engine import checkpoint as ckpt
from sevenfold.engine import optim
from sevenfold.engine.batch import micro_batches, to_batch
from sevenfold.engine.step import train_step
from sevenfold.errors import RunError
from sevenfold.recipe import Recipe


def steps(tree: dict[str, Any], folder: str, until: int, save_at: list[int]) -> list[float]:
    """Trains from the last good checkpoint on; returns the losses."""
    from test_step import ROWS, rows_of, sharded

    recipe = Recipe.model_validate(tree)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = sharded(recipe)
    optimizer = optim.build(model, recipe.optimizer)
    found = ckpt.latest(folder)
    if found:
        ckpt.load(found, model, optimizer)
    out = []
    for step in range(found.step if found else 0, until):
        rows = rows_of(step).part(rank * ROWS // world, (rank + 1) * ROWS // world)
        out.append(
            train_step(
                model, micro_batches(rows, 4, -(-ROWS // world // 4), to_batch, torch.device("cpu")), optimizer, 1e-2, 1.0
            ).loss
        )
        if step + 1 in save_at:
            ckpt.save(folder, step + 1, model, optimizer, {"positions": {}})
    return out


@pytest.fixture
def saved(tree: dict[str, Any], tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4 by two ranks."""
    run_ranks(2, tmp_path / "pg" / "save", steps, tree, str(tmp_path / "c"), 4, [2, 4])
    return tmp_path / "c"


def test_resume_is_the_unbroken_run(tree: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    whole = run_ranks(2, tmp_path / "pg" / "whole", steps, tree, str(tmp_path / "none"), 8, [])[0]
    assert run_ranks(2, tmp_path / "pg" / "again", steps, tree, str(saved), 8, [])[0] == whole[4:]  # to the bit
    for world in (1, 3):
        found = run_ranks(world, tmp_path / "pg" / f"{world}", steps, tree, str(saved), 8, [])[0]
        assert found == pytest.approx(whole[4:], rel=1e-5)


def flip(at: Path) -> str:
    file = at / "__1_0.distcp"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    return file.name


def truncate(at: Path) -> str:
    file = at / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    return file.name


def lose(at: Path) -> str:
    (at / ".metadata").unlink()
    return ".metadata"


def swap(at: Path) -> str:
    a, b = at / "__0_0.distcp", at / "__1_0.distcp"
    raw = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(raw)
    return "distcp"


def escape(at: Path) -> str:
    tree = json.loads((at / ckpt.MANIFEST).read_text())
    tree["files"]["../../x"] = next(iter(tree["files"].values()))
    (at / ckpt.MANIFEST).write_text(json.dumps(tree))
    return "leaves its folder"


@pytest.mark.parametrize("damage", [flip, truncate, lose, swap, escape])
def test_damage_is_named_and_passed_over(saved: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    newest = ckpt.latest(str(saved))
    assert newest is not None and newest.step == 4 and set(newest.files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    named = damage(Path(newest.path))
    with caplog.at_level(logging.WARNING):
        before = ckpt.latest(str(saved))
    assert before is not None and before.step == 2
    assert named in caplog.text and "damaged" in caplog.text


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
    ckpt.prune(newest, 2)
    assert sorted(p.name for p in saved.iterdir()) == ["step-00000002.00", "step-00000004.00", "step-00000005.00"]
    ckpt.prune(newest, 1)
    assert sorted(p.name for p in saved.iterdir()) == ["step-00000004.00", "step-00000005.00"]
