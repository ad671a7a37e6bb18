"""Encoders and encoder-decoders end to end: a job in, a directory out that plain transformers goes on with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RECIPE, run_job
from test_objectives import BERT, T5

KINDS = {"masked": BERT | {"initializer_range": 0.06}, "denoise": T5}


@pytest.mark.slow
@pytest.mark.usefixtures("on_shared_ray")
@pytest.mark.parametrize("objective", ["masked", "denoise"])
def test_a_family(texts: Path, tmp_path: Path, objective: str) -> None:
    tree: dict[str, Any] = json.loads(json.dumps(RECIPE))
    tree["data"] |= {"sources": [{"path": str(texts / "train")}], "validation": [{"path": str(texts / "heldout")}]}
    tree |= {"objective": objective, "model": {"config": KINDS[objective]}, "corruption": {"rate": 0.3}}
    tree["train"] |= {"global_batch": 16, "micro_batch": 8, "steps": 30}
    tree |= {
        "checkpoint": {"every": "auto", "keep": 9, "keep_every": 15},
        "validation": {"every": 10, "rows": 16},
        "cluster": {"num_workers": 2},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    out = run_job("pretrain", "r.yaml", home=tmp_path)
    assert "step 30/30  validation loss" in out and "bits/byte" not in out
    run = tmp_path / "runs/tiny"
    # 10 and 25 as 10 steps on from the start and from 15; then the interval that it told, which is longer than the run
    saved = sorted(int(p.name[5:13]) for p in (run / "checkpoints").iterdir())
    assert saved == [10, 15, 25, 30] and "fails each 25,350.0 h (checkpoint.mtbf_hours)" in out
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {m["step"]: m["train/loss"] for m in logged if "train/loss" in m}
    validated = [m["validation/loss"] for m in logged if "validation/loss" in m]
    assert sorted(losses) == list(range(1, 31)) and losses[30] < losses[1] - 0.3 and validated[-1] < validated[0]
    assert 0 < logged[-2]["train/goodput"] <= 1

    sys.path.insert(0, str(Path(__file__).parents[2] / "platform"))
    from sevenfold.data.tokens import load_tokenizer
    from sevenfold.engine import tuning
    from sevenfold.model import build
    from sevenfold.recipe import loads
    from sevenfold.runs import prepare
    from sevenfold.storage import RunFolder

    folder = RunFolder(str(run))
    recipe = loads((run / "recipe.yaml").read_text(), "recipe")
    _, held = prepare.reopen(folder, recipe)
    assert held is not None
    tokenizer = load_tokenizer(folder.tokenizer)
    config = build.config_of(recipe, len(tokenizer), tokenizer)
    batch = tuning.of(recipe, tokenizer, config).collate(held.epoch(16), 0)
    from safetensors.torch import save_file

    same = batch.documents[:, :, None] == batch.documents[:, None, :]
    tensors = {"input_ids": batch.input_ids, "attention_mask": same[:, None], "labels": batch.labels}
    if batch.decoder is None:
        tensors["position_ids"] = batch.position_ids
    else:
        tensors |= {"asking": batch.decoder.documents, "decoder_input_ids": batch.decoder.input_ids, "mine": batch.documents}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "batch.safetensors")
    code = f"""
import sys, torch, transformers
from safetensors.torch import load_file
b = load_file({str(tmp_path / "batch.safetensors")!r})
kind = {{"masked": transformers.AutoModelForMaskedLM, "denoise": transformers.AutoModelForSeq2SeqLM}}[{objective!r}]
model = kind.from_pretrained({str(run / "model")!r}, dtype=torch.float32)
if "asking" in b:
    asking, mine = b.pop("asking"), b.pop("mine")
    encoded = model.encoder(input_ids=b.pop("input_ids"), attention_mask=b.pop("attention_mask"))
    t = asking.shape[1]
    b["decoder_attention_mask"] = (asking[:, :, None] == asking[:, None, :])[:, None] & torch.ones(t, t, dtype=bool).tril()
    b["attention_mask"] = ((asking[:, :, None] == mine[:, None, :]) | (asking < 0)[:, :, None])[:, None]
    b["encoder_outputs"] = encoded
optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
model.eval()
loss = model(**b).loss
loss.backward(); optimizer.step()
assert not [m for m in sys.modules if "sevenfold" in m]
print(float(loss))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(validated[-1], abs=1e-4)
    said = run_job("evaluate", "runs/tiny", home=tmp_path)
    measured = json.loads((run / "metrics.json").read_text())
    assert "held-out" in said and measured["targets"] > 50 and abs(measured["loss"] - validated[-1]) < 0.5
