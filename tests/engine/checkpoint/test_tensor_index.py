"""The index of a checkpoint: equal to DCP's own, and no content of it runs code or leaves it."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sevenfold import storage
from sevenfold.engine.checkpoint import Checkpoint, CheckpointWeights, commit, verified_checkpoint
from sevenfold.engine.checkpoint.shards import shard_writer
from sevenfold.errors import InputError, RunError

STATE = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "count": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 3, dtype=torch.float16),
}


def committed(folder: Path) -> Checkpoint:
    """Commits what lies in a folder, with its sums: those of a checkpoint that was handed over."""
    files = {p.name: storage.file_digest(str(p)) for p in folder.iterdir() if p.is_file()}
    files.pop("MANIFEST.json", None)
    commit(Checkpoint(str(folder), 1, 1, files, {}))
    return verified_checkpoint(str(folder))


def written_by_torch(folder: Path) -> Path:
    """A checkpoint as earlier versions wrote it, with hyperparameters and a pickled index."""
    state = {"model": STATE, "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def written_by_us(folder: Path) -> Path:
    folder.mkdir()
    dcp.save({"model": STATE}, storage_writer=shard_writer(str(folder))[0], no_dist=True)
    return folder


def read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    weights = CheckpointWeights(checkpoint, STATE)
    return {name: weights[name] for name in STATE}


@pytest.mark.parametrize("write", [written_by_torch, written_by_us])
def test_every_tensor_is_read_as_it_was_written(write: Any, tmp_path: Path) -> None:
    loaded = read(committed(write(tmp_path / "c")))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())
    assert [t.dtype for t in loaded.values()] == [t.dtype for t in STATE.values()]


def test_new_checkpoints_hold_no_pickle_but_tensors(tmp_path: Path) -> None:
    assert sorted(p.name for p in written_by_us(tmp_path / "c").iterdir()) == [
        "__0_0.distcp",
        "tensors.json",
    ]
    tree = json.loads((tmp_path / "c/tensors.json").read_text())["tensors"]
    assert tree["model.a.weight"]["dtype"] == "float32" and tree["model.b"]["size"] == [5]


def test_a_state_that_is_no_tensor_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises((RunError, TypeError, dcp.CheckpointException), match="expected a tensor"):
        (tmp_path / "c").mkdir()
        writer = shard_writer(str(tmp_path / "c"))[0]
        dcp.save({"model": {"x": {"y": 3}}}, storage_writer=writer, no_dist=True)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *args: Any):
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


def bombs(trace: str) -> dict[str, bytes]:
    """Pickles that run code, or change classes, when they are unpickled."""
    c = pickle.dumps
    return {
        "os.mkdir": c(Bomb(os.mkdir, trace)),
        "eval": c(Bomb(eval, f"__import__('os').mkdir({trace!r})")),
        "torch.load": c(Bomb(torch.load, trace)),
        "in a list": c([1, {"a": Bomb(os.mkdir, trace)}]),
        "as a key": c({("a", Bomb(os.mkdir, trace)): 1}),
        "protocol 0": pickle.dumps(Bomb(os.mkdir, trace), protocol=0),
        "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0f_utils.os.mkdir\x93"
        + c(trace)[2:-1][9:]
        + b"\x85R.",
        # sets Metadata.__eq__ = print, if Metadata is torch's own class
        "changes a class": (
            b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}(Vversion\nV666\nutb."
        ),
        "no pickle": b"\x00" * 50,
        "empty": b"",
        "a list": c([1, 2]),
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Psomething\n.",
        "deep": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    }


NAMES = list(bombs(""))


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_index_runs_nothing(name: str, tmp_path: Path) -> None:
    trace = str(tmp_path / "trace")
    folder = written_by_torch(tmp_path / "c")
    (folder / ".metadata").write_bytes(bombs(trace)[name])
    with pytest.raises((InputError, RunError), match=r"index of a checkpoint|cannot be read") as e:
        read(committed(folder))
    assert ".metadata" in str(e.value) and "\n" not in str(e.value)
    assert not os.path.exists(trace)
    assert dcp.metadata.Metadata({}).version is None  # the class is as it was


def test_a_bomb_anywhere_in_a_real_index_runs_nothing(tmp_path: Path) -> None:
    """Each global of a real index is replaced by one that would run code."""
    folder, trace = written_by_torch(tmp_path / "c"), tmp_path / "trace"
    content = (folder / ".metadata").read_bytes()
    call = pickle.dumps(Bomb(os.mkdir, str(trace)), protocol=4)
    call = call[11:-1]  # without protocol, frame and stop
    positions = [pos for op, _, pos in pickletools.genops(content) if op.name == "STACK_GLOBAL"]
    assert len(positions) > 8
    for position in positions:
        # the call's result takes the global's place on the stack
        end = position + 1
        (folder / ".metadata").write_bytes(
            b"\x80\x04" + content[11:position] + b"00" + call + content[end:]
        )
        with pytest.raises((InputError, RunError)):
            read(committed(folder))
        assert not trace.exists()


def replaced(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensor: tensor.update(fields)


def part(at: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensor: dict[str, Any]) -> None:
        tensor["parts"][0][at] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        part(2, "../../secret"),
        part(2, "/etc/passwd"),
        part(2, "MANIFEST.json"),
        part(2, ["a"]),
        part(3, -1),
        part(3, 1 << 70),
        part(3, "0"),
        part(3, 1e300),
        part(4, -1),
        part(4, True),
        part(0, [-1, 0]),
        part(1, [1 << 70, 4]),
        part(1, ["a"]),
        part(1, 3),
        replaced(dtype="load"),
        replaced(dtype=["a"]),
        replaced(size=[-3, 4]),
        replaced(size=[1 << 70]),
        replaced(size="34"),
        replaced(parts=[]),
        replaced(parts=[[1, 2]]),
        replaced(parts={"a": 1}),
        replaced(parts=None),
    ],
)
def test_an_index_with_other_values_is_refused(change: Any, tmp_path: Path) -> None:
    folder = written_by_us(tmp_path / "c")
    tree = json.loads((folder / "tensors.json").read_text())
    change(tree["tensors"]["model.a.weight"])
    (folder / "tensors.json").write_text(json.dumps(tree))
    with pytest.raises((InputError, RunError)) as e:
        read(committed(folder))
    assert "\n" not in str(e.value)


def test_a_shard_that_is_a_pickle_runs_nothing(tmp_path: Path) -> None:
    folder, trace = written_by_us(tmp_path / "c"), tmp_path / "trace"
    torch.save(Bomb(os.mkdir, str(trace)), folder / "__0_0.distcp")
    tree = json.loads((folder / "tensors.json").read_text())
    tree["tensors"]["model.a.weight"]["parts"][0][3:] = [
        0,
        (folder / "__0_0.distcp").stat().st_size,
    ]
    (folder / "tensors.json").write_text(json.dumps(tree))
    with pytest.raises(RunError, match="cannot be read"):
        read(committed(folder))
    assert not trace.exists()
