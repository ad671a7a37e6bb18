"""Exports of checkpoints that two real ranks wrote: small in memory, the same to the bit, and where to start from again."""

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
from safetensors.torch import load_file
from test_objectives import BERT, T5

from sevenfold import cli
from sevenfold.data import tokens
from sevenfold.data.documents import Selection
from sevenfold.data.manifest import Manifest, scan
from sevenfold.engine import checkpoint as ckpt
from sevenfold.engine.objectives import Causal, Words, attach
from sevenfold.errors import RunError
from sevenfold.model import build, parallel
from sevenfold.model.export import export
from sevenfold.recipe import Recipe, loads

LLAMA = RECIPE["model"]["config"]
LARGE = LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}  # of 136 MB
MOE = LLAMA | {"model_type": "qwen3_moe", "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
RUNS = {
    "llama": ("causal", LLAMA), "large": ("causal", LARGE), "moe": ("causal", MOE), "bert": ("masked", BERT),
    "t5": ("denoise", T5),
}  # fmt: skip
IDS = torch.arange(5, 45)[None]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def logits(model: Any, objective: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **({"decoder_input_ids": IDS} if objective == "denoise" else {})).logits


def save(root: str, names: list[str]) -> None:
    """A checkpoint of step 2 of each run, of llama of step 1 too, and what the models were."""
    rank = torch.distributed.get_rank()
    for name in names:
        recipe = loads(Path(root, name, "recipe.yaml").read_text(), name)
        model = build.build(recipe, build.config_of(recipe, 512), weights=rank == 0)
        if rank == 0:
            with torch.no_grad():
                for p in model.parameters():
                    p.normal_(std=0.05)
            torch.save((model.state_dict(), logits(model, recipe.objective)), Path(root, name, "expected.pt"))
        attach(model, Causal(Words(512), 0, 0.15, 3))
        sharded = parallel.shard(model, torch.device("cpu"), recipe.train, recipe.parallel)
        saver = ckpt.Saver(str(Path(root, name, "checkpoints")))
        extra = {"recipe": recipe.hash(), "versions": {"sevenfold": "0", "torch": "2"}}
        for step in (1, 2) if name == "llama" else (2,):
            saver.save(step, sharded, [], extra)
        saver.close()


@pytest.fixture(scope="module")
def runs(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs."""
    root = tmp_path_factory.mktemp("runs")
    for name, (objective, config) in RUNS.items():
        tree = {
            **RECIPE, "name": name, "objective": objective, "model": {"config": config},
            "data": RECIPE["data"] | {"sources": [{"path": str(texts / "train"), "name": "stdlib"}]},
        }  # fmt: skip
        (root / name).mkdir()
        (root / name / "recipe.yaml").write_text(yaml.safe_dump(tree))
    manifest = scan(loads((root / "llama/recipe.yaml").read_text(), "").data.sources, "causal")
    made = tokens.train_tokenizer(manifest, Selection(), 512, 0.3, 0)
    made.chat_template = TEMPLATE
    for name in RUNS:
        tokens.save_tokenizer(made, str(root / name / "tokenizer"))
        (root / name / "manifest.json").write_text(json.dumps({"train": manifest.to_json()}))
        (root / name / "metrics.jsonl").write_text('{"step": 2, "validation/loss": 3.25}\n')
    run_ranks(2, root / "pg" / "store", save, str(root), list(RUNS))
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


# prints how far the resident memory (its peak, which the kernel keeps) grew: by an export, then by the model itself
MEASURE = """
import sys, re, pathlib, json
from sevenfold.engine import checkpoint as ckpt
from sevenfold.model.export import export
from sevenfold.model import build
from sevenfold.data.manifest import Manifest
from sevenfold.recipe import loads

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1e3

def run(name, shard):
    root = pathlib.Path(sys.argv[1], name)
    recipe = loads((root / "recipe.yaml").read_text(), name)
    found = ckpt.latest(str(root / "checkpoints"))
    manifest = Manifest.from_json(json.loads((root / "manifest.json").read_text())["train"])
    export(recipe, found, str(root / "tokenizer"), manifest, {}, str(root / "model"), shard=shard)
    return recipe

run("llama", 10**5)  # brings all that is imported
begin = peak()
recipe = run("large", 8 * 10**6)
streamed = peak()
build.build(recipe, build.config_of(recipe, 512), weights=True)
print(streamed - begin, peak() - streamed)
"""


def test_memory_is_bounded_by_a_file_and_not_by_the_model(runs: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, runs], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    streamed, whole = map(float, done.stdout.split())
    files = sorted((runs / "large/model").glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files) / 1e6
    assert size > 130 and len(files) > 16 and max(f.stat().st_size for f in files) < 8.1e6
    assert streamed < 40 < 100 < whole, (streamed, whole)


def made(runs: Path, name: str, to: Path, shard: int, start: Path | None = None) -> Recipe:
    """Exports step 2 of a run; start: as of a run that began from this model. Returns the recipe."""
    recipe = loads((runs / name / "recipe.yaml").read_text(), name)
    if start is not None:
        recipe = recipe.override({"model": {"path": str(start)}, "tokenizer": {}})
    found = ckpt.latest(str(runs / name / "checkpoints"))
    manifest = Manifest.from_json(json.loads((runs / name / "manifest.json").read_text())["train"])
    assert found is not None
    export(recipe, found, str(runs / name / "tokenizer"), manifest, {}, str(to), shard=shard)
    return recipe


@pytest.mark.parametrize(
    "name", ["llama", "moe", "bert", "t5"]
)  # transformers keeps a moe's experts otherwise than it saves them
def test_each_tensor_is_the_checkpoints_and_starts_another_run(runs: Path, tmp_path: Path, name: str) -> None:
    recipe = made(runs, name, tmp_path / "x", 20_000)
    expected, asked = torch.load(runs / name / "expected.pt")
    index = json.loads((tmp_path / "x/model.safetensors.index.json").read_text())
    found = weights(tmp_path / "x")
    assert len(set(index["weight_map"].values())) > 3 and index["weight_map"].keys() == found.keys()
    if name != "moe":
        assert all(torch.equal(v, expected[k]) for k, v in found.items())

    kind = getattr(transformers, build.CLASSES[recipe.objective][0].__name__)
    model = kind.from_pretrained(tmp_path / "x")
    parameters = list(model.parameters())  # each once, however often it is tied
    assert all(p.dtype == torch.float32 for p in parameters) and sum(v.numel() for v in found.values()) == sum(
        map(torch.numel, parameters)
    )
    assert torch.allclose(logits(model, recipe.objective), asked, rtol=0, atol=1e-5)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    if name != "bert":  # which has none
        told = json.loads((tmp_path / "x/generation_config.json").read_text())
        (tmp_path / "x/generation_config.json").write_text(json.dumps(told | {"max_new_tokens": 7}))
    again = made(runs, name, tmp_path / "y", 10**6, start=tmp_path / "x")
    ours = build.build(again, build.config_of(again, 512), weights=True).state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in ours)
    assert build.check(again, 512) == sum(map(torch.numel, parameters))
    whole = load_file(tmp_path / "y/model.safetensors")
    assert whole.keys() == found.keys() and all(torch.equal(whole[k], found[k]) for k in found)
    assert name == "bert" or json.loads((tmp_path / "y/generation_config.json").read_text())["max_new_tokens"] == 7
    assert all(str(tmp_path) not in f.read_text() for f in (tmp_path / "y").glob("*.[jm]*"))


def test_the_directory(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "llama"
    shutil.copytree(runs / "llama", run)
    assert cli.main(["export", str(run)]) == 0 and f"llama, step 2: {run / 'model'}" in capsys.readouterr().out
    written = {p.name for p in (run / "model").iterdir()}
    assert written == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md",
    }  # fmt: skip
    for file in (run / "model").glob("*.[jm]*"):
        assert str(tmp_path) not in file.read_text() and str(runs) not in file.read_text()
    card = (run / "model/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sevenfold"]}
    recipe = loads((run / "recipe.yaml").read_text(), "")
    for said in (
        recipe.hash(),
        "| 2 (1,024 tokens with padding) |",
        "3.2500 nats",
        "- stdlib, version `",
        "sevenfold 0, torch 2",
        "random weights",
    ):
        assert said in card, card
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(run / "model")), names)
    words, config = names["tokenizer"], names["model"].generation_config
    assert words.apply_chat_template([{"content": "a"}], tokenize=False) == f"a{words.eos_token}"
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)

    # another step, to another folder; and over the run's own model
    assert cli.main(["export", str(run), "--step", "1", "--out", str(tmp_path / "new/one")]) == 0
    assert (
        "| 1 (512 tokens" in (tmp_path / "new/one/README.md").read_text()
        and "not measured" in (tmp_path / "new/one/README.md").read_text()
    )
    (run / "model/model-00001-of-00009.safetensors").touch()  # of an earlier export, in another number of files
    (run / "model/notes.txt").touch()  # a person's
    assert cli.main(["export", str(run), "--out", str(run / "model") + "/"]) == 0
    assert {p.name for p in (run / "model").iterdir()} - written == {"notes.txt"}
    assert sorted(p.name for p in run.iterdir() if "unfinished" in p.name) == []


def damage(run: Path, step: int) -> None:
    file = next((run / "checkpoints" / f"step-{step:08d}.00").glob("__0*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def test_bad_input_is_one_line_and_leaves_nothing(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, full = tmp_path / "llama", tmp_path / "full"
    shutil.copytree(runs / "llama", run)
    full.mkdir()
    (full / "file").touch()

    def refused(*argv: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(["export", *argv]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
        return said

    assert "expected a run" in refused(str(full))
    assert "expected a checkpoint of step 3, found 1, 2" in refused(str(run), "--step", "3")
    assert f"--out {full}: expected a new or empty folder" in refused(str(run), "--out", str(full))
    assert "expected a folder, found a file" in refused(str(run), "--out", str(full / "file"))
    damage(run, 2)
    assert "its checksum is not the manifest's; choose another by --step, of 1, 2" in refused(str(run), "--step", "2")
    assert cli.main(["export", str(run)]) == 0 and "llama, step 1:" in capsys.readouterr().out  # the newest that is whole
    damage(run, 1)
    assert "expected a whole checkpoint, found only damaged ones: 1, 2" in refused(str(run))
    shutil.rmtree(run / "checkpoints")
    assert "expected a whole checkpoint, found none" in refused(str(run))


def test_a_full_disk_leaves_what_was_there(runs: Path, tmp_path: Path) -> None:
    made(runs, "llama", tmp_path / "x", 10**6)
    before = {p: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, whole[1]))
    try:
        with pytest.raises(RunError, match=r"could not be written .*File too large"):
            made(runs, "llama", tmp_path / "x", 10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert {p: p.read_bytes() for p in (tmp_path / "x").iterdir()} == before and len(list(tmp_path.iterdir())) == 1
