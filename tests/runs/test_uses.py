"""Fine-tuning end to end: rows in, a directory out that transformers and peft go on with, measured beside baselines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import RECIPE, refused, run_job
from test_objectives import BERT, T5
from tiny_models import MODERN

pytestmark = pytest.mark.usefixtures("on_shared_ray")
WORDS = [("dog", "Hund"), ("cat", "Katze"), ("house", "Haus"), ("tree", "Baum"), ("red", "rot"), ("big", "gross")]


def rows(objective: str) -> list[dict[str, Any]]:
    pairs = [(f"the {a} and the {b} {i}", f"{c} und {d} {i}") for i in range(9) for a, c in WORDS for b, d in WORDS if a != b]
    if objective == "sft":
        return [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    if objective == "classify":
        return [{"text": a, "label": "animal" if "dog" in a or "cat" in a else "thing"} for a, _ in pairs]
    if objective == "dpo":
        return [{"prompt": a, "chosen": b, "rejected": b[::-1]} for a, b in pairs]
    names = {"seq2seq": ("src", "tgt"), "embed": ("query", "document")}[objective]
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


def recipe(home: Path, objective: str, **more: Any) -> None:
    (home / f"{objective}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(objective)))
    tree: dict[str, Any] = json.loads(json.dumps(RECIPE))
    tree["data"] |= {"sources": [{}], "held_out": 0.1, "executor": "inline"}
    tree |= {"name": objective, "objective": objective}
    tree["train"] |= {"steps": 40, "log_every": 5}
    tree |= {"validation": {"every": 5, "rows": 16, "max_new_tokens": 12}} | more
    (home / f"{objective}.yaml").write_text(yaml.safe_dump(tree))


def trained(home: Path, objective: str, *words: str) -> tuple[Path, dict[str, Any], str]:
    said = run_job("finetune", f"{objective}.yaml", f"data.path={home / objective}.jsonl", *words, home=home)
    run = home / "runs" / objective
    said += run_job("evaluate", f"runs/{objective}", "--workers", "1", home=home)
    return run, json.loads((run / "metrics.json").read_text()), said


@pytest.mark.slow
def test_classes(tmp_path: Path) -> None:
    recipe(
        tmp_path,
        "classify",
        model={"config": MODERN},
        validation={"every": 10, "rows": 16, "metric": "validation/f1_macro", "patience": 3},
    )
    run, measured, said = trained(tmp_path, "classify")
    assert "270 examples of" in said and "0 examples are cut" in said
    assert measured["accuracy"] > 0.75 and set(measured["per_class"]) == {"animal", "thing"}
    assert list(measured["baselines"]) == ["the commonest class", "TF-IDF and logistic regression"]
    assert "f1_macro" in (run / "model/README.md").read_text()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for p in predictions[:5]:  # plain transformers says the same
        with torch.no_grad():
            found = model(input_ids=tokenizer(p["text"], return_tensors="pt").input_ids).logits.argmax(-1)
        assert model.config.id2label[int(found)] == p["predicted"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["best_step"] <= summary["steps"]


@pytest.mark.slow
def test_source_to_target(tmp_path: Path) -> None:
    recipe(tmp_path, "seq2seq", model={"config": T5}, validation={"every": 10, "rows": 16, "generate": 8, "max_new_tokens": 12})
    run, measured, said = trained(tmp_path, "seq2seq")
    assert "bleu_signature: nrefs:1" in said and measured["prompts"] > 10 and "chrf" in measured
    assert (
        "dictionary, word for word (IBM 1)" in measured["baselines"]
        and measured["baselines"]["copy of the prompt"]["bleu"] < 90
    )
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/chrf" in m for m in logged)


@pytest.mark.slow
def test_an_adapter_of_an_encoder_decoder(tmp_path: Path) -> None:
    recipe(tmp_path, "seq2seq", model={"config": T5}, validation={"every": 10, "rows": 16, "max_new_tokens": 12})
    data = f"data.path={tmp_path / 'seq2seq'}.jsonl"
    run_job("finetune", "seq2seq.yaml", data, home=tmp_path)
    run = tmp_path / "runs/seq2seq"
    words = ("name=more", f"model={{path: {run}}}", "tokenizer={}", "adapter={rank: 4, dora: true}", "train.steps=4")
    run_job("finetune", "seq2seq.yaml", data, *words, home=tmp_path)
    out = {name: str(tmp_path / name) for name in ("alone", "merged", "no")}
    run_job("export", "runs/more", "--out", out["alone"], home=tmp_path)
    assert "merged" in run_job("export", "runs/more", "--out", out["merged"], "--merge", home=tmp_path)
    assert "has no adapter" in run_job("export", "runs/seq2seq", "--out", out["no"], "--merge", home=tmp_path, code=2)
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        base = AutoModelForSeq2SeqLM.from_pretrained(run / "model").eval()
        merged = AutoModelForSeq2SeqLM.from_pretrained(out["merged"]).eval()(input_ids=ids, decoder_input_ids=ids).logits
        plain = base(input_ids=ids, decoder_input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, out["alone"]).eval()(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4) and not torch.allclose(plain, adapted, atol=1e-4)
    assert "Against seq2seq, by paired bootstrap" in run_job("evaluate", "runs/seq2seq", "runs/more", home=tmp_path)


@pytest.mark.slow
def test_search(tmp_path: Path) -> None:
    recipe(tmp_path, "embed", model={"config": BERT})
    run, measured, _ = trained(tmp_path, "embed", "cluster.num_workers=2")
    assert measured["corpus"] == 270 and 0 <= measured["mrr@10"] <= 1 and "ndcg@10" in measured["baselines"]["BM25"]
    assert json.loads((run / "model/1_Pooling/config.json").read_text())["pooling_mode_mean_tokens"]


@pytest.mark.slow
def test_conversations_then_preferences(tmp_path: Path) -> None:
    recipe(tmp_path, "sft", tokenizer={"vocab_size": 512, "chat_template": "plain"})
    run, measured, said = trained(tmp_path, "sft")
    assert "reply to the nearest training prompt" in measured["baselines"] and "masked" in said
    assert (
        "user: " in (run / "model/chat_template.jinja").read_text()
        or "message['role']" in (run / "model/chat_template.jinja").read_text()
    )
    for name, adapter in (("dpo", None), ("lora", {"rank": 4})):
        more = {"optimizer": {"learning_rate": 3e-3}, "model": {"path": str(run)}, "tokenizer": {}, "adapter": adapter}
        recipe(tmp_path, "dpo", **more)
        words = (f"data.path={tmp_path / 'dpo'}.jsonl", f"name={name}", "cluster.num_workers=2")
        run_job("finetune", "dpo.yaml", *words, home=tmp_path)
        metrics = json.loads((tmp_path / "runs" / name / "summary.json").read_text())["metrics"]
        assert metrics["validation/accuracy"] > 0.7 and metrics["validation/loss"] < 0.6
    run_job("evaluate", "runs/dpo", home=tmp_path)
    measured = json.loads((tmp_path / "runs/dpo/metrics.json").read_text())
    assert measured["accuracy"] > 0.7 and measured["loss"] < 0.6 and measured["pairs"] > 10


def test_bad_input_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEVENFOLD_HOME", str(tmp_path))
    (tmp_path / "runs/sft").mkdir(parents=True)
    (tmp_path / "runs/sft/notes.md").write_text("theirs")

    def told(objective: str, lines: list[dict[str, Any]], *words: str) -> str:
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        said = refused(capsys, "finetune", str(tmp_path / f"{objective}.yaml"), f"data.path={tmp_path / 'bad.jsonl'}", *words)
        assert [p for p in tmp_path.glob("runs/**/*") if p.is_file()] == [tmp_path / "runs/sft/notes.md"]
        return said

    recipe(tmp_path, "classify", model={"config": BERT})
    assert "found 1: only: name their column" in told("classify", [{"text": "a", "label": "only"}] * 3)
    assert "found en, de: say which is which" in told("classify", [{"en": "a", "de": "b"}])
    assert "give data.path=FILE_OR_FOLDER" in refused(capsys, "finetune", str(tmp_path / "classify.yaml"))
    split = "data.sources=[{filters: [{column: label, one_of: [train]}]}]"
    two = [{"text": "a", "label": "one"}, {"text": "b", "label": "two"}]
    said = told("classify", two, split)
    assert "train data: " in said and "no document passes the filters on label" in said
    assert "0.1 of 2 documents holds out none: choose a greater part" in told("classify", two)
    recipe(tmp_path, "sft")
    good = rows("sft")[:40]
    bad = {"messages": good[0]["messages"][:1]}
    said = told("sft", [bad, *good, bad], "tokenizer.chat_template=plain")
    assert "bad.jsonl: line 1: a conversation without a reply: " in said and "; line 42: a conversation" in said
    assert "the tokenizer has none: give one (tokenizer.chat_template=plain" in told("sft", good)
    assert "above the model's 16 positions" in told("sft", good, "model.config.max_position_embeddings=16")
