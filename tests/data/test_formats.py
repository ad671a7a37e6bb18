"""Forms of fine-tuning data: recognised, checked row by row, and encoded so that the reply alone is learnt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from sevenfold.data import examples, formats, tokens
from sevenfold.data.documents import Documents, Selection
from sevenfold.data.manifest import scan
from sevenfold.data.order import MAX_GROUPS, WINDOWS_PER_LANE, Plan
from sevenfold.errors import InputError
from sevenfold.recipe import Source

HI = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]
NO = {"role": "assistant", "content": "No"}
LONG = [
    {"role": "system", "content": "Be brief."},
    *HI,
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


@pytest.fixture(scope="module")
def tokenizer(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    found = scan([Source(path=str(texts / "train"))], "causal")
    made = tokens.train_tokenizer(found, Selection(), 600, 0.3, 0)
    made.chat_template = examples.PLAIN_TEMPLATE
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tokens.save_tokenizer(made, folder)
    return tokens.load_tokenizer(folder)  # type: ignore[return-value]


def written(at: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    path = at / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(path: Path, objective: str, on_bad: str = "error", classes: tuple[str, ...] = (), **settings: Any) -> Documents:
    found = scan([Source(path=str(path), **settings)], objective)
    fields = examples.ENCODERS[objective].fields
    return Selection(fields, on_bad=on_bad, classes=classes).read(found, 0)  # type: ignore[arg-type]


def turns(*said: tuple[str, str]) -> str:
    return formats.conversation(list(said))


CHAT = turns(("user", "Hi there"), ("assistant", "Hello"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("objective", "row", "expected"),
    [
        ("sft", {"messages": HI, "id": 7}, [CHAT]),
        ("sft", {"messages": json.dumps(HI)}, [CHAT]),
        ("sft", {"conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello"}]}, [CHAT]),
        ("sft", {"instruction": "Add", "input": "1 2", "output": "3"}, [turns(("user", "Add\n\n1 2"), ("assistant", "3"))]),
        ("sft", {"instruction": "Add", "output": "3"}, [turns(("user", "Add"), ("assistant", "3"))]),
        ("sft", {"prompt": "Once", "completion": " upon"}, [turns(("", "Once"), ("", " upon"))]),
        ("sft", {"prompt": HI[:1], "completion": HI[1:]}, [CHAT]),
        ("sft", {"prompt": "As JSON", "completion": '[{"a": 1}]'}, [turns(("", "As JSON"), ("", '[{"a": 1}]'))]),
        ("sft", {"prompt": "Hi there", "completion": HI[1:]}, [CHAT]),
        ("sft", {"messages": [{"role": "system", "content": ""}, *HI]}, [CHAT]),
        ("dpo", {"prompt": "Q", "chosen": "good", "rejected": "bad"}, [turns(("", "Q")), "good", "bad"]),
        ("dpo", {"prompt": "Hi there", "chosen": HI, "rejected": [HI[0], NO]}, [turns(("user", "Hi there")), "Hello", "No"]),
        ("dpo", {"prompt": HI[:1], "chosen": HI[1:], "rejected": [NO]}, [turns(("user", "Hi there")), "Hello", "No"]),
        ("dpo", {"chosen": HI, "rejected": [HI[0], NO]}, [turns(("user", "Hi there")), "Hello", "No"]),
        ("classify", {"text": "fine", "label": "good"}, ["fine", "good"]),
        ("classify", {"text": "fine", "label": 1}, ["fine", "1"]),
        ("seq2seq", {"src": "one", "tgt": "eins", "source": "a book"}, ["one", "eins"]),
        ("seq2seq", {"source": "one", "target": "eins"}, ["one", "eins"]),
        ("embed", {"query": "q", "document": "d"}, ["q", "d"]),
    ],
)  # fmt: skip
def test_recognised(tmp_path: Path, kind: str, objective: str, row: dict[str, Any], expected: list[str]) -> None:
    made = read(written(tmp_path, [row] * 2, kind), objective)
    assert [f.to_pylist() for f in made.fields] == [[e] * 2 for e in expected]


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = written(tmp_path, [{"en": "one", "de": "eins"}], "jsonl")
    with pytest.raises(InputError, match=r"rows.jsonl: expected the columns of objective seq2seq.*found en, de: say which"):
        read(path, "seq2seq")
    made = read(path, "seq2seq", columns={"source": "en", "target": "de"})
    assert [f.to_pylist() for f in made.fields] == [["one"], ["eins"]]


def test_an_optional_column_that_the_first_line_is_without(tmp_path: Path) -> None:
    rows = [{"instruction": "Add", "output": "3"}, {"instruction": "Add", "input": "1 2", "output": "3"}]
    made = read(written(tmp_path, rows, "jsonl"), "sft")
    assert made.fields[0].to_pylist()[1] == turns(("user", "Add\n\n1 2"), ("assistant", "3"))


def test_a_row_that_is_filtered_out_may_be_bad(tmp_path: Path) -> None:
    rows = [{"source": "one", "target": "eins", "split": "train"}, {"source": "", "target": "", "split": "test"}]
    made = read(written(tmp_path, rows, "parquet"), "seq2seq", filters=[{"column": "split", "one_of": ["train"]}])
    assert made.skipped.count == 0 and made.fields[0].to_pylist() == ["one"]


def test_an_array_of_rows_is_told_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps([{"source": "one", "target": "eins"}]))
    with pytest.raises(InputError, match=r"rows.jsonl: its first line: expected one JSON object a line, found an array: jq"):
        read(path, "seq2seq")


BAD = [
    ("sft", {"messages": HI}, {"messages": HI[:1]}, "a conversation without a reply"),
    ("sft", {"messages": HI}, {"messages": [HI[0], HI[0], HI[1]]}, "roles out of order: message 2 is user after user"),
    ("sft", {"messages": HI}, {"messages": HI[1:]}, "roles out of order: message 1 is assistant after nothing"),
    ("sft", {"messages": HI}, {"messages": [*HI, {"role": "system", "content": "x"}]}, "message 3 is system"),
    ("sft", {"messages": HI}, {"messages": [HI[0], {"role": "robot", "content": "x"}]}, "expected a role .*'robot'"),
    ("sft", {"messages": HI}, {"messages": [HI[0], {"role": "assistant", "content": ""}]}, "message 2: expected text"),
    ("sft", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}, "no text in 'completion'"),
    ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "a"}, "equal texts"),
    ("classify", {"text": "a", "label": "x"}, {"text": "a", "label": "z"}, "unknown class 'z': the training data has x, y"),
    ("embed", {"query": "a", "document": "b"}, {"query": "a", "document": "a"}, "equal texts: query and document"),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "good", "bad", "why"), BAD)
def test_bad_rows_are_named_and_counted(
    tmp_path: Path, objective: str, good: dict[str, Any], bad: dict[str, Any], why: str
) -> None:
    classes = ("x", "y") if objective == "classify" else ()
    path = written(tmp_path, [good, bad, good, bad], "jsonl")
    with pytest.raises(InputError, match=rf"rows.jsonl: line 2: .*{why}.*; line 4: .*mend it, or leave such documents out"):
        read(path, objective, classes=classes)
    made = read(path, objective, "skip", classes)
    assert made.skipped.count == 2 and made.origin.tolist() == [0, 2] and all(len(f) == 2 for f in made.fields)


def test_replies_alone_are_targets(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    encoder = examples.ConversationEncoder(tokenizer, 96)
    (made,) = encoder.encode([read(written(tmp_path, [{"messages": LONG}], "jsonl"), "sft")])
    assert made.targets is not None and made.cut == 0
    whole = tokenizer.decode(made.ids)
    assert whole == tokenizer.apply_chat_template(LONG, tokenize=False)
    runs = np.split(np.arange(len(made.ids)), np.flatnonzero(np.diff(made.targets.astype(int))) + 1)
    learnt = [tokenizer.decode(made.ids[r]) for r in runs if made.targets[r[0]]]
    assert learnt == ["Hello<|eos|>\n", "So long<|eos|>\n"]
    asked = encoder.prompt(turns(*((m["role"], m["content"]) for m in LONG)), 96)
    assert tokenizer.decode(asked) == tokenizer.apply_chat_template(LONG[:-1], tokenize=False, add_generation_prompt=True)


def test_a_long_conversation_keeps_its_last_reply(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    said = [{"role": ("user", "assistant")[i % 2], "content": f"word {i} " * 4} for i in range(12)]
    documents = read(written(tmp_path, [{"messages": said}], "jsonl"), "sft")
    (made,) = examples.ConversationEncoder(tokenizer, 90).encode([documents])
    assert made.targets is not None and made.cut == 1 and len(made.ids) <= 90 and "word 11" in tokenizer.decode(made.ids)
    (made,) = examples.ConversationEncoder(tokenizer, 16).encode([documents])
    assert made.cut == 1 and len(made.ids) == 16 and made.targets is not None and made.targets.sum() == 15


def test_no_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|eos|>")
    documents = read(written(tmp_path, [{"messages": HI}], "jsonl"), "sft")
    with pytest.raises(InputError, match=r"the tokenizer has none: give one \(tokenizer.chat_template=plain"):
        examples.ConversationEncoder(bare, 64).encode([documents])


def test_templates_that_refuse_or_look_ahead(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = examples.ConversationEncoder(tokenizer, 64)
    encoder._template = "{{ raise_exception('no system here') }}"
    with pytest.raises(InputError, match=r"refuses a conversation \(it begins .*Hi there.*\): no system here"):
        encoder.question([("user", "Hi there")])
    encoder._template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = [("user", "Hi there"), ("assistant", "Hello"), ("user", "Bye")]
    assert tokenizer.decode(encoder.question(talk)) == "3Hi thereHelloBye"


def test_what_is_asked_is_told_in_the_ids_of_training(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    encoder = examples.ConversationEncoder(tokenizer, 96)
    encoder._template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # a token could reach over the edge of a turn
    said = [("user", "an"), ("assistant", "other"), ("user", "with"), ("assistant", "out")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    (made,) = encoder.encode([read(written(tmp_path, [row], "jsonl"), "sft")])
    asked = encoder.question(said[:3])
    assert made.ids[: len(asked)].tolist() == asked


@pytest.mark.parametrize("objective", ["dpo", "classify", "seq2seq", "embed"])
def test_examples_fit_into_a_row(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, objective: str) -> None:
    long, short = "some words " * 60, "few words"
    row = {
        "dpo": {"prompt": long, "chosen": short, "rejected": long},
        "classify": {"text": long, "label": "b"},
        "seq2seq": {"source": long, "target": long},
        "embed": {"query": long, "document": short + long},
    }[objective]
    encoder = examples.ENCODERS[objective](tokenizer, 48, classes=("a", "b"))
    (made,) = encoder.encode([read(written(tmp_path, [row], "parquet"), objective)])
    assert made.targets is not None and len(made.ids) == 48 and 0 < made.targets.sum() < 48
    assert made.cut == 1
    edges = np.flatnonzero(np.diff(made.targets.astype(int)))
    assert len(edges) == (3 if objective == "dpo" else 1)
    if objective == "classify":
        assert made.ids[-1] == 1 and made.ids[-2] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_sorted_rows_are_mixed(tmp_path: Path, kind: str) -> None:
    labels = [f"class {i // 2000}" for i in range(8000)]
    path = written(tmp_path, [{"text": f"a text with the number {i} in it", "label": c} for i, c in enumerate(labels)], kind)
    found = scan([Source(path=str(path))], "classify", 2 * WINDOWS_PER_LANE * MAX_GROUPS)
    plan, chosen = Plan(found, seed=0, lanes=2), Selection(examples.ENCODERS["classify"].fields)
    for window in range(plan.windows_per_epoch - 1):  # the last goes on into the next epoch
        made = [chosen.read(found, g).fields[1].to_pylist() for g in plan.window(window)]
        assert len({label for part in made for label in part}) >= 3
