"""Encoders and encoder-decoders end to end: plain transformers computes the same loss."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RECIPE, run_job
from helpers.objectives import BERT, T5

KINDS = {"masked": BERT | {"initializer_range": 0.06}, "denoise": T5}


@pytest.mark.usefixtures("on_shared_ray")
@pytest.mark.parametrize(
    "objective",
    [
        pytest.param("masked", marks=pytest.mark.slow),
        pytest.param("denoise", marks=pytest.mark.nightly),
    ],
)
def test_pretrain_and_load_with_transformers(texts: Path, tmp_path: Path, objective: str) -> None:
    tree: dict[str, Any] = json.loads(json.dumps(RECIPE))
    tree["data"] |= {
        "sources": [{"path": str(texts / "train")}],
        "validation": [{"path": str(texts / "heldout")}],
    }
    tree |= {
        "objective": objective,
        "model": {"config": KINDS[objective]},
        "corruption": {"rate": 0.3},
    }
    tree["train"] |= {"global_batch": 16, "micro_batch": 8, "steps": 30}
    tree |= {
        "checkpoint": {"every": "auto", "keep": 9, "keep_every": 15},
        "validation": {"every": 10, "rows": 16},
        "cluster": {"num_workers": 2},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    output = run_job("pretrain", "r.yaml", home=tmp_path)
    assert "step 30/30  validation loss" in output and "bits/byte" not in output
    run = tmp_path / "runs/tiny"
    # `every: auto` first saves 10 steps after the start and 10 steps after the checkpoint of step
    # 15; the interval that it then computes is longer than the run.
    saved = sorted(int(p.name[5:13]) for p in (run / "checkpoints").iterdir())
    assert saved == [10, 15, 25, 30]
    assert "expected every 25,350.0 h (checkpoint.mtbf_hours)" in output
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {m["step"]: m["train/loss"] for m in logged if "train/loss" in m}
    validated = [m["validation/loss"] for m in logged if "validation/loss" in m]
    assert sorted(losses) == list(range(1, 31)) and losses[30] < losses[1] - 0.3
    assert len(validated) == 3 and validated[-1] < losses[1] - 0.3
    assert 0 < logged[-2]["train/goodput"] <= 1

    sys.path.insert(0, str(Path(__file__).parents[2] / "platform"))
    from sevenfold.data.draw import draw_rows
    from sevenfold.data.tokenizer import load_tokenizer
    from sevenfold.engine.objectives import Support, build_objective
    from sevenfold.model import build
    from sevenfold.prepare.streams import open_streams
    from sevenfold.recipe import loads
    from sevenfold.run_folder import RunFolder

    folder = RunFolder(str(run))
    recipe = loads((run / "recipe.yaml").read_text(), "recipe")
    _, validation = open_streams(folder, recipe)
    assert validation is not None
    tokenizer = load_tokenizer(folder.tokenizer)
    config = build.config_of(recipe, len(tokenizer), tokenizer)
    batch = build_objective(recipe, tokenizer, config, Support()).collate(
        draw_rows(validation, 16), 0
    )
    from safetensors.torch import save_file

    # Several documents share a row; attention is limited to tokens of the same document.
    same = batch.documents[:, :, None] == batch.documents[:, None, :]
    tensors = {
        "input_ids": batch.input_ids,
        "attention_mask": same[:, None],
        "labels": batch.labels,
    }
    if batch.decoder is None:
        tensors["position_ids"] = batch.position_ids
    else:
        tensors |= {
            "decoder_documents": batch.decoder.documents,
            "decoder_input_ids": batch.decoder.input_ids,
            "documents": batch.documents,
        }
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "batch.safetensors")
    code = f"""
import sys, torch, transformers
from safetensors.torch import load_file
batch = load_file({str(tmp_path / "batch.safetensors")!r})
classes = dict(
    masked=transformers.AutoModelForMaskedLM, denoise=transformers.AutoModelForSeq2SeqLM
)
model = classes[{objective!r}].from_pretrained({str(run / "model")!r}, dtype=torch.float32)
if "decoder_documents" in batch:
    # `target` has the document of each position of the decoder (below 0: padding), `source` that
    # of each position of the encoder.
    target, source = batch.pop("decoder_documents"), batch.pop("documents")
    encoded = model.encoder(
        input_ids=batch.pop("input_ids"), attention_mask=batch.pop("attention_mask")
    )
    causal = torch.ones(target.shape[1], target.shape[1], dtype=bool).tril()
    same = target[:, :, None] == target[:, None, :]
    batch["decoder_attention_mask"] = same[:, None] & causal
    cross = (target[:, :, None] == source[:, None, :]) | (target < 0)[:, :, None]
    batch["attention_mask"] = cross[:, None]
    batch["encoder_outputs"] = encoded
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
model.eval()
loss = model(**batch).loss
loss.backward(); optimizer.step()
assert not [m for m in sys.modules if "sevenfold" in m]
print(float(loss))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(validated[-1], abs=1e-4)
    output = run_job("evaluate", "runs/tiny", home=tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    assert "held-out" in output and metrics["targets"] > 50
    assert abs(metrics["loss"] - validated[-1]) < 0.5
