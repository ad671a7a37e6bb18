"""Fine-tuning end to end: transformers and peft load the results, evaluation compares baselines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import RECIPE, refused, run_job
from helpers.objectives import BERT, T5
from helpers.tiny_models import MODERN

pytestmark = pytest.mark.usefixtures("on_shared_ray")
WORDS = [
    ("dog", "Hund"),
    ("cat", "Katze"),
    ("house", "Haus"),
    ("tree", "Baum"),
    ("red", "rot"),
    ("big", "gross"),
]


def rows(objective: str) -> list[dict[str, Any]]:
    """Returns 270 training examples in the format of an objective."""
    pairs = [
        (f"the {a} and the {b} {i}", f"{c} und {d} {i}")
        for i in range(9)
        for a, c in WORDS
        for b, d in WORDS
        if a != b
    ]
    if objective == "sft":
        return [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in pairs
        ]
    if objective == "classify":
        return [
            {"text": a, "label": "animal" if "dog" in a or "cat" in a else "thing"}
            for a, _ in pairs
        ]
    if objective == "dpo":
        return [{"prompt": a, "chosen": b, "rejected": b[::-1]} for a, b in pairs]
    names = {"seq2seq": ("src", "tgt"), "embed": ("query", "document")}[objective]
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


def write_recipe(home: Path, objective: str, **sections: Any) -> None:
    """Writes the objective's data (.jsonl) and a recipe (.yaml) with these sections added."""
    (home / f"{objective}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(objective)))
    tree: dict[str, Any] = json.loads(json.dumps(RECIPE))
    tree["data"] |= {"sources": [{}], "held_out": 0.1, "executor": "inline"}
    tree |= {"name": objective, "objective": objective}
    tree["train"] |= {"steps": 40, "log_every": 5}
    tree |= {"validation": {"every": 5, "rows": 16, "max_new_tokens": 12}} | sections
    (home / f"{objective}.yaml").write_text(yaml.safe_dump(tree))


def finetune(home: Path, objective: str, *words: str) -> tuple[Path, dict[str, Any], str]:
    """Fine-tunes and evaluates a model; returns the run, its metrics and the jobs' output."""
    output = run_job(
        "finetune", f"{objective}.yaml", f"data.path={home / objective}.jsonl", *words, home=home
    )
    run = home / "runs" / objective
    output += run_job("evaluate", f"runs/{objective}", "--workers", "1", home=home)
    return run, json.loads((run / "metrics.json").read_text()), output


@pytest.mark.slow
def test_classification(tmp_path: Path) -> None:
    write_recipe(
        tmp_path,
        "classify",
        model={"config": MODERN},
        validation={"every": 10, "rows": 16, "metric": "validation/f1_macro", "patience": 3},
    )
    run, metrics, output = finetune(tmp_path, "classify")
    # what is trained on, and what is held out
    assert "train data: 244 examples of" in output and "0 examples are truncated" in output
    assert "held-out data: 26 examples of" in output
    assert metrics["accuracy"] > 0.75 and set(metrics["per_class"]) == {"animal", "thing"}
    assert list(metrics["baselines"]) == ["the commonest class", "TF-IDF and logistic regression"]
    assert "f1_macro" in (run / "model/README.md").read_text()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    predictions = [
        json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()
    ]
    # Plain transformers predicts the same labels.
    for p in predictions[:5]:
        input_ids = tokenizer(p["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            label = model(input_ids=input_ids).logits.argmax(-1)
        assert model.config.id2label[int(label)] == p["predicted"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["best_step"] <= summary["steps"]


@pytest.mark.slow
def test_source_to_target(tmp_path: Path) -> None:
    write_recipe(
        tmp_path,
        "seq2seq",
        model={"config": T5},
        validation={"every": 10, "rows": 16, "generate": 8, "max_new_tokens": 12},
    )
    run, metrics, output = finetune(tmp_path, "seq2seq")
    assert "bleu_signature: nrefs:1" in output and metrics["prompts"] > 10 and "chrf" in metrics
    assert "dictionary, word for word (IBM 1)" in metrics["baselines"]
    assert metrics["baselines"]["copy of the prompt"]["bleu"] < 90
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/chrf" in m for m in logged)


@pytest.mark.nightly
def test_an_adapter_of_an_encoder_decoder(tmp_path: Path) -> None:
    write_recipe(
        tmp_path,
        "seq2seq",
        model={"config": T5},
        validation={"every": 10, "rows": 16, "max_new_tokens": 12},
    )
    data = f"data.path={tmp_path / 'seq2seq'}.jsonl"
    run_job("finetune", "seq2seq.yaml", data, home=tmp_path)
    run = tmp_path / "runs/seq2seq"
    overrides = ["name=more", f"model={{path: {run}}}", "tokenizer={}"]
    overrides += ["adapter={rank: 4, dora: true}", "train.steps=4"]
    run_job("finetune", "seq2seq.yaml", data, *overrides, home=tmp_path)
    folders = {name: str(tmp_path / name) for name in ("alone", "merged", "no")}
    run_job("export", "runs/more", "--out", folders["alone"], home=tmp_path)
    export = ("export", "runs/more", "--out", folders["merged"], "--merge")
    assert "merged" in run_job(*export, home=tmp_path)
    export = ("export", "runs/seq2seq", "--out", folders["no"], "--merge")
    assert "has no adapter" in run_job(*export, home=tmp_path, code=2)
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        base = AutoModelForSeq2SeqLM.from_pretrained(run / "model").eval()
        merged_model = AutoModelForSeq2SeqLM.from_pretrained(folders["merged"]).eval()
        merged = merged_model(input_ids=ids, decoder_input_ids=ids).logits
        plain = base(input_ids=ids, decoder_input_ids=ids).logits
        adapted_model = PeftModel.from_pretrained(base, folders["alone"]).eval()
        adapted = adapted_model(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert not torch.allclose(plain, adapted, atol=1e-4)
    output = run_job("evaluate", "runs/seq2seq", "runs/more", home=tmp_path)
    assert "Compared with seq2seq (paired bootstrap)" in output
    # the model that a run began with has the metrics of that run
    first, second = (
        json.loads((tmp_path / f"runs/{name}/metrics.json").read_text())
        for name in ("seq2seq", "more")
    )
    before = second["baselines"]["the model it began with"]
    assert "the model it began with" not in first["baselines"]
    assert before.items() <= first.items() and before["chrf"] != second["chrf"]


@pytest.mark.nightly
def test_embeddings(tmp_path: Path) -> None:
    write_recipe(tmp_path, "embed", model={"config": BERT})
    run, metrics, _ = finetune(tmp_path, "embed", "cluster.num_workers=2")
    assert metrics["corpus"] == 270 and 0 <= metrics["mrr@10"] <= 1
    assert "ndcg@10" in metrics["baselines"]["BM25"]
    assert json.loads((run / "model/1_Pooling/config.json").read_text())["pooling_mode_mean_tokens"]


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param({"rank": 4}, marks=pytest.mark.nightly),
    ],
)
def test_sft_then_dpo(adapter: dict[str, int] | None, tmp_path: Path) -> None:
    write_recipe(tmp_path, "sft", tokenizer={"vocab_size": 512, "chat_template": "plain"})
    run, metrics, output = finetune(tmp_path, "sft")
    assert "reply to the nearest training prompt" in metrics["baselines"] and "masked" in output
    template = (run / "model/chat_template.jinja").read_text()
    assert "user: " in template or "message['role']" in template
    sections = {
        "optimizer": {"learning_rate": 3e-3},
        "model": {"path": str(run)},
        "tokenizer": {},
        "adapter": adapter,
    }
    write_recipe(tmp_path, "dpo", **sections)
    words = (f"data.path={tmp_path / 'dpo'}.jsonl", "cluster.num_workers=2")
    run_job("finetune", "dpo.yaml", *words, home=tmp_path)
    metrics = json.loads((tmp_path / "runs/dpo/summary.json").read_text())["metrics"]
    assert metrics["validation/accuracy"] > 0.7 and metrics["validation/loss"] < 0.6
    run_job("evaluate", "runs/dpo", home=tmp_path)
    metrics = json.loads((tmp_path / "runs/dpo/metrics.json").read_text())
    assert metrics["accuracy"] > 0.7 and metrics["loss"] < 0.6 and metrics["pairs"] > 10


def test_bad_data_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEVENFOLD_HOME", str(tmp_path))
    (tmp_path / "runs/sft").mkdir(parents=True)
    (tmp_path / "runs/sft/notes.md").write_text("theirs")

    def error_of(objective: str, examples: list[dict[str, Any]], *words: str) -> str:
        data = tmp_path / "bad.jsonl"
        data.write_text("".join(json.dumps(r) + "\n" for r in examples))
        path = str(tmp_path / f"{objective}.yaml")
        error = refused(capsys, "finetune", path, f"data.path={data}", *words)
        files = [p for p in tmp_path.glob("runs/**/*") if p.is_file()]
        assert files == [tmp_path / "runs/sft/notes.md"]
        return error

    write_recipe(tmp_path, "classify", model={"config": BERT})
    error = error_of("classify", [{"text": "a", "label": "only"}] * 3)
    assert "found 1 (only): name the column" in error
    assert "found en, de: map them with" in error_of("classify", [{"en": "a", "de": "b"}])
    error = refused(capsys, "finetune", str(tmp_path / "classify.yaml"))
    assert "give data.path=FILE_OR_FOLDER" in error
    split = "data.sources=[{filters: [{column: label, one_of: [train]}]}]"
    two = [{"text": "a", "label": "one"}, {"text": "b", "label": "two"}]
    error = error_of("classify", two, split)
    assert "train data: " in error and "no document passes the filters on label" in error
    error = error_of("classify", two)
    assert "held_out=0.1 holds out none of the 2 documents: choose a larger" in error
    write_recipe(tmp_path, "sft")
    good = rows("sft")[:40]
    bad = {"messages": good[0]["messages"][:1]}
    error = error_of("sft", [bad, *good, bad], "tokenizer.chat_template=plain")
    assert "bad.jsonl: line 1: a conversation without a reply: " in error
    assert "; line 42: a conversation" in error
    error = error_of("sft", good)
    assert "the tokenizer has none: set tokenizer.chat_template" in error
    error = error_of("sft", good, "model.config.max_position_embeddings=16")
    assert "above the model's 16 positions" in error
