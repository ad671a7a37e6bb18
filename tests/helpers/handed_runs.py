"""A finished run as it is handed over, and the commands that read it."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, once

from helpers.damages import ReachedCluster
from sevenfold.cli import main
from sevenfold.cluster import connect
from sevenfold.data.tokenizer import load_tokenizer, save_tokenizer
from sevenfold.evaluate import run as evaluate
from sevenfold.prepare import job
from sevenfold.train import launch

COMMANDS = {
    "export": ["export", "{run}", "--out", "{runs}/out"],
    "which": ["ledger", "{run}", "which", "--step", "3"],
    "replay": ["ledger", "{run}", "replay", "--step", "3"],
    "generate": ["generate", "{run}", "--prompt", "def", "--max-new-tokens", "2"],
    "chat": ["chat", "{run}", "--prompt", "def", "--max-new-tokens", "2"],
    "inspect": ["inspect", "{run}", "--text", "def f"],
    "retrieve": ["retrieve", "{run}", "--corpus", "corpus.txt", "--query", "one"],
    "evaluate": ["evaluate", "{run}"],
    "resume": ["pretrain", "recipe.yaml", "storage={runs}"],
    "finetune": ["finetune", "sft.yaml", "storage={runs}", "model.path={run}"],
    "dry run": ["finetune", "sft.yaml", "--dry-run", "model.path={run}"],
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def finished_run() -> Path:
    """Returns a home with the finished run runs/old, whose model was exported by this revision."""

    def make(home: Path) -> None:
        with tarfile.open(ROOT / "tests/train/runs_of_837cad8.tar.xz") as archive:
            archive.extractall(home, filter="data")
        run = home / "runs/old"
        (run / "manifest.json").write_text(
            (run / "manifest.json").read_text().replace("/HOME", str(home))
        )
        (run / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
        save_tokenizer(load_tokenizer(str(run / "tokenizer")), str(run / "tokenizer"))
        assert main(["export", str(run)]) == 0
        shutil.copy(run / "recipe.yaml", home)
        (home / "corpus.txt").write_text("one\ntwo\n")
        (home / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
        sft = {
            "name": "sft",
            "objective": "sft",
            "data": {
                "sources": [{"path": str(home / "pairs.jsonl")}],
                "sequence_length": 64,
                "lanes": 2,
                "executor": "inline",
            },
            "model": {"path": "runs/old"},
            "train": {"global_batch": 4, "micro_batch": 4, "steps": 2},
        }
        (home / "sft.yaml").write_text(yaml.safe_dump(sft))

    return once("damaged", make)


def stop_before_the_cluster(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a command where it would start something on the cluster, after its checks."""

    def reached(*_: Any, **__: Any) -> None:
        raise ReachedCluster

    monkeypatch.setattr(connect, "connect", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "_actor_pool", reached)
    # a run that is resumed reads the files in its folder after it has asked for the resources
    resumes = command == "resume"
    monkeypatch.setattr(job, "_check_cluster", (lambda *_: None) if resumes else reached)
    monkeypatch.setattr(launch, "start_stop_signal", reached)
