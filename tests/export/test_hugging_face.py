"""Exports of checkpoints that two real ranks wrote.

An export needs little memory, is identical to the bit, and can start another run.
"""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import RECIPE, run_ranks
from helpers.objectives import BERT, T5
from safetensors.torch import load_file

from sevenfold import cli
from sevenfold.data.manifest import Manifest
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Selection
from sevenfold.data.tokenizer import save_tokenizer, train_tokenizer
from sevenfold.engine.checkpoint import CheckpointManager, latest_checkpoint
from sevenfold.engine.objectives import Causal, SpecialTokens, attach_losses
from sevenfold.errors import RunError
from sevenfold.export.hugging_face import export
from sevenfold.model import build, parallel
from sevenfold.recipe import Recipe, loads

LLAMA = RECIPE["model"]["config"]
LARGE = LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}  # 136 MB
MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
RUNS = {
    "llama": ("causal", LLAMA),
    "large": ("causal", LARGE),
    "moe": ("causal", MOE),
    "bert": ("masked", BERT),
    "t5": ("denoise", T5),
}
IDS = torch.arange(5, 45)[None]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def logits(model: Any, objective: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            input_ids=IDS, **({"decoder_input_ids": IDS} if objective == "denoise" else {})
        ).logits


def save(root: str, names: list[str]) -> None:
    """Saves step 2 of each run, and step 1 of llama too.

    The weights and logits before sharding are saved beside the checkpoints.
    """
    rank = torch.distributed.get_rank()
    for name in names:
        recipe = loads(Path(root, name, "recipe.yaml").read_text(), name)
        model = build.build(recipe, build.config_of(recipe, 512), weights=rank == 0)
        if rank == 0:
            with torch.no_grad():
                for p in model.parameters():
                    p.normal_(std=0.05)
            torch.save(
                (model.state_dict(), logits(model, recipe.objective)),
                Path(root, name, "expected.pt"),
            )
        attach_losses(model, Causal(SpecialTokens(512), 0, 0.15, 3))
        sharded = parallel.shard(model, torch.device("cpu"), recipe.train, recipe.parallel)
        saver = CheckpointManager(str(Path(root, name, "checkpoints")))
        extra = {"recipe": recipe.hash(), "versions": {"sevenfold": "0", "torch": "2"}}
        for step in (1, 2) if name == "llama" else (2,):
            saver.save(step, sharded, [], extra)
        saver.close()


@pytest.fixture(scope="module")
def runs(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs."""
    root = tmp_path_factory.mktemp("runs")
    for name, (objective, config) in RUNS.items():
        tree = {
            **RECIPE,
            "name": name,
            "objective": objective,
            "model": {"config": config},
            "data": RECIPE["data"]
            | {"sources": [{"path": str(texts / "train"), "name": "stdlib"}]},
        }
        (root / name).mkdir()
        (root / name / "recipe.yaml").write_text(yaml.safe_dump(tree))
    manifest = scan(loads((root / "llama/recipe.yaml").read_text(), "").data.sources, "causal")
    trained = train_tokenizer(manifest, Selection(), 512, 0.3, 0)
    trained.chat_template = TEMPLATE
    for name in RUNS:
        save_tokenizer(trained, str(root / name / "tokenizer"))
        (root / name / "manifest.json").write_text(json.dumps({"train": manifest.to_json()}))
        (root / name / "metrics.jsonl").write_text('{"step": 2, "validation/loss": 3.25}\n')
    run_ranks(2, root / "pg" / "store", save, str(root), list(RUNS))
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder."""
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


# prints by how many MB the peak resident memory, as the kernel counts it, grew:
# by an export, and then by building the model
MEASURE = """
import sys, re, pathlib, json
from sevenfold.engine.checkpoint import latest_checkpoint
from sevenfold.export.hugging_face import export
from sevenfold.model import build
from sevenfold.data.manifest import Manifest
from sevenfold.recipe import loads

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1e3

def run(name, shard):
    root = pathlib.Path(sys.argv[1], name)
    recipe = loads((root / "recipe.yaml").read_text(), name)
    checkpoint = latest_checkpoint(str(root / "checkpoints"))
    manifest = Manifest.from_json(json.loads((root / "manifest.json").read_text())["train"])
    tokenizer, out = str(root / "tokenizer"), str(root / "model")
    export(recipe, checkpoint, tokenizer, manifest, {}, out, shard=shard)
    return recipe

run("llama", 10**5)  # loads all modules
begin = peak()
recipe = run("large", 8 * 10**6)
streamed = peak()
build.build(recipe, build.config_of(recipe, 512), weights=True)
print(streamed - begin, peak() - streamed)
"""


def test_memory_is_bounded_by_the_file_size_and_not_by_the_model(runs: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, runs], capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr
    streamed, full = map(float, process.stdout.split())
    files = sorted((runs / "large/model").glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files) / 1e6
    assert size > 130 and len(files) > 16 and max(f.stat().st_size for f in files) < 8.1e6
    assert streamed < 40 < 100 < full, (streamed, full)


def export_run(runs: Path, name: str, out: Path, shard: int, start: Path | None = None) -> Recipe:
    """Exports step 2 of a run and returns its recipe.

    With `start`, the recipe is changed to that of a run that began from this model.
    """
    recipe = loads((runs / name / "recipe.yaml").read_text(), name)
    if start is not None:
        recipe = recipe.override({"model": {"path": str(start)}, "tokenizer": {}})
    checkpoint = latest_checkpoint(str(runs / name / "checkpoints"))
    manifest = Manifest.from_json(json.loads((runs / name / "manifest.json").read_text())["train"])
    assert checkpoint is not None
    export(recipe, checkpoint, str(runs / name / "tokenizer"), manifest, {}, str(out), shard=shard)
    return recipe


# transformers holds the experts of an MoE differently from how it saves them
@pytest.mark.parametrize("name", ["llama", "moe", "bert", "t5"])
def test_exported_tensors_equal_the_checkpoint_and_can_start_a_run(
    runs: Path, tmp_path: Path, name: str
) -> None:
    recipe = export_run(runs, name, tmp_path / "x", 20_000)
    expected, expected_logits = torch.load(runs / name / "expected.pt")
    index = json.loads((tmp_path / "x/model.safetensors.index.json").read_text())
    exported = weights(tmp_path / "x")
    assert (
        len(set(index["weight_map"].values())) > 3 and index["weight_map"].keys() == exported.keys()
    )
    if name != "moe":
        assert all(torch.equal(tensor, expected[key]) for key, tensor in exported.items())

    kind = getattr(transformers, build.MODEL_CLASSES[recipe.objective][0].__name__)
    model = kind.from_pretrained(tmp_path / "x")
    parameters = list(model.parameters())  # tied parameters are listed once
    assert all(p.dtype == torch.float32 for p in parameters) and sum(
        tensor.numel() for tensor in exported.values()
    ) == sum(map(torch.numel, parameters))
    assert torch.allclose(logits(model, recipe.objective), expected_logits, rtol=0, atol=1e-5)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    if name != "bert":  # BERT has no generation_config.json
        settings = json.loads((tmp_path / "x/generation_config.json").read_text())
        (tmp_path / "x/generation_config.json").write_text(
            json.dumps(settings | {"max_new_tokens": 7})
        )
        (tmp_path / "x/checksums.json").unlink()  # the change is intended
    next_recipe = export_run(runs, name, tmp_path / "y", 10**6, start=tmp_path / "x")
    next_weights = build.build(
        next_recipe, build.config_of(next_recipe, 512), weights=True
    ).state_dict()
    assert next_weights.keys() == expected.keys() and all(
        torch.equal(next_weights[key], expected[key]) for key in next_weights
    )
    assert build.check_model(next_recipe, 512) == sum(map(torch.numel, parameters))
    single_file = load_file(tmp_path / "y/model.safetensors")
    assert single_file.keys() == exported.keys() and all(
        torch.equal(single_file[key], exported[key]) for key in exported
    )
    assert (
        name == "bert"
        or json.loads((tmp_path / "y/generation_config.json").read_text())["max_new_tokens"] == 7
    )
    assert all(str(tmp_path) not in file.read_text() for file in (tmp_path / "y").glob("*.[jm]*"))


def test_the_files_of_an_export(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "llama"
    shutil.copytree(runs / "llama", run)
    assert (
        cli.main(["export", str(run)]) == 0
        and f"llama, step 2: {run / 'model'}" in capsys.readouterr().out
    )
    written = {p.name for p in (run / "model").iterdir()}
    assert written == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "checksums.json",
    }
    for file in (run / "model").glob("*.[jm]*"):
        assert str(tmp_path) not in file.read_text() and str(runs) not in file.read_text()
    card = (run / "model/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sevenfold"],
    }
    recipe = loads((run / "recipe.yaml").read_text(), "")
    for text in (
        recipe.hash(),
        "| 2 (1,024 tokens with padding) |",
        "3.2500 nats",
        "- stdlib, version `",
        "sevenfold 0, torch 2",
        "random weights",
    ):
        assert text in card, card
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(run / "model")), names)
    tokenizer, config = names["tokenizer"], names["model"].generation_config
    assert (
        tokenizer.apply_chat_template([{"content": "a"}], tokenize=False)
        == f"a{tokenizer.eos_token}"
    )
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)

    # another step to another folder, and again over the run's own model
    assert cli.main(["export", str(run), "--step", "1", "--out", str(tmp_path / "new/one")]) == 0
    assert (
        "| 1 (512 tokens" in (tmp_path / "new/one/README.md").read_text()
        and "not measured" in (tmp_path / "new/one/README.md").read_text()
    )
    # a leftover of an earlier export with another number of files
    (run / "model/model-00001-of-00009.safetensors").touch()
    (run / "model/notes.txt").touch()  # a file of the user
    assert cli.main(["export", str(run), "--out", str(run / "model") + "/"]) == 0
    assert {p.name for p in (run / "model").iterdir()} - written == {"notes.txt"}
    assert sorted(p.name for p in run.iterdir() if "unfinished" in p.name) == []


def damage(run: Path, step: int) -> None:
    file = next((run / "checkpoints" / f"step-{step:08d}.00").glob("__0*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def test_bad_input_is_refused_in_one_line_and_writes_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, not_a_run = tmp_path / "llama", tmp_path / "full"
    shutil.copytree(runs / "llama", run)
    not_a_run.mkdir()
    (not_a_run / "file").touch()

    def refused(*argv: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(["export", *argv]) == 2
        message = capsys.readouterr().err
        assert (
            message.startswith("error: ")
            and message.count("\n") == 1
            and sorted(tmp_path.rglob("*")) == before
        )
        return message

    assert "expected a run" in refused(str(not_a_run))
    assert "expected a checkpoint of step 3, found 1, 2" in refused(str(run), "--step", "3")
    assert f"--out {not_a_run}: expected a new or empty folder" in refused(
        str(run), "--out", str(not_a_run)
    )
    assert "expected a folder, found a file" in refused(str(run), "--out", str(not_a_run / "file"))
    damage(run, 2)
    message = refused(str(run), "--step", "2")
    assert (
        "checksum does not match" in message and "choose another one with --step: 1, 2" in message
    )
    # exports the latest valid checkpoint
    assert cli.main(["export", str(run)]) == 0 and "llama, step 1:" in capsys.readouterr().out
    damage(run, 1)
    assert "expected a valid checkpoint, found only damaged ones: 1, 2" in refused(str(run))
    shutil.rmtree(run / "checkpoints")
    assert "expected a valid checkpoint, found none" in refused(str(run))


def test_a_full_disk_keeps_the_previous_export(runs: Path, tmp_path: Path) -> None:
    export_run(runs, "llama", tmp_path / "x", 10**6)
    before = {p: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(RunError, match=r"could not be written .*File too large"):
            export_run(runs, "llama", tmp_path / "x", 10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {p: p.read_bytes() for p in (tmp_path / "x").iterdir()} == before and len(
        list(tmp_path.iterdir())
    ) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # of Vicuna 1.5, which has settings of sampling without do_sample
        ({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}, {"do_sample": True}),
        ({"temperature": 0.0}, {}),
        ({"num_beams": 1, "num_return_sequences": 3}, {}),
    ],
)
def test_a_base_whose_generation_config_is_invalid_is_exported(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    base = tmp_path / "base"
    export_run(runs, "llama", base, 10**9)
    (base / "generation_config.json").write_text(json.dumps(settings))
    (base / "checksums.json").unlink()  # as in a directory from elsewhere
    shutil.copytree(runs / "llama", tmp_path / "tuned")
    recipe = yaml.safe_load((runs / "llama/recipe.yaml").read_text())
    recipe |= {"model": {"path": str(base)}, "tokenizer": {"path": str(base)}}
    (tmp_path / "tuned/recipe.yaml").write_text(yaml.safe_dump(recipe))
    capsys.readouterr()
    export_run(tmp_path, "tuned", tmp_path / "exported", 10**9)
    assert "generation_config.json" in capsys.readouterr().out
    saved = json.loads((tmp_path / "exported/generation_config.json").read_text())
    assert expected.items() <= saved.items() and saved.get("temperature") != 0
    transformers.GenerationConfig(**saved).validate(strict=True)
