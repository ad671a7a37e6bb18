"""Formats of fine-tuning data.

Formats are recognised, checked row by row, and encoded so that only the replies are targets.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from sevenfold.data import examples
from sevenfold.data.chat_renderer import PLAIN_TEMPLATE
from sevenfold.data.order import CHUNKS_PER_LANE, MAX_GROUPS_PER_CHUNK, DataOrder
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Documents, Selection
from sevenfold.data.sources.messages import Conversation
from sevenfold.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
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
    manifest = scan([Source(path=str(texts / "train"))], "causal")
    trained = train_tokenizer(manifest, Selection(), 600, 0.3, 0)
    trained.chat_template = PLAIN_TEMPLATE
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    save_tokenizer(trained, folder)
    return load_tokenizer(folder)  # type: ignore[return-value]


def write_rows(folder: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    """Writes the rows as JSON lines or Parquet and returns the path."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(
    path: Path,
    objective: str,
    on_bad: str = "error",
    classes: tuple[str, ...] = (),
    **settings: Any,
) -> Documents:
    """Reads the documents of the file's first row group for this objective."""
    manifest = scan([Source(path=str(path), **settings)], objective)
    fields = examples.ENCODERS[objective].fields
    return Selection(fields, on_bad=on_bad, classes=classes).read(manifest, 0)  # type: ignore[arg-type]


def conversation(*messages: tuple[str, str]) -> str:
    return Conversation([{"role": role, "content": text} for role, text in messages]).dump()


CHAT = conversation(("user", "Hi there"), ("assistant", "Hello"))
LONG_CHAT = conversation(*((m["role"], m["content"]) for m in LONG))
NOT_LEARNED = Conversation([HI[0], {**HI[1], "train": False}, *LONG[3:]]).dump()
HISTORY = [["Hi there", "Hello"]]
JSON_TEXTS = [
    json.dumps({"from": "Berlin", "to": "Paris"}),
    json.dumps({"role": "assistant", "content": "hello"}),
    json.dumps([{"role": "engineer"}]),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("objective", "row", "expected"),
    [
        ("sft", {"messages": HI, "id": 7}, [CHAT]),
        ("sft", {"messages": json.dumps(HI)}, [CHAT]),
        (
            "sft",
            {
                "conversations": [
                    {"from": "human", "value": "Hi there"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            [CHAT],
        ),
        (
            "sft",
            {"instruction": "Add", "input": "1 2", "output": "3"},
            [conversation(("user", "Add\n\n1 2"), ("assistant", "3"))],
        ),
        (
            "sft",
            {"instruction": "Add", "output": "3"},
            [conversation(("user", "Add"), ("assistant", "3"))],
        ),
        (
            "sft",
            {"prompt": "Once", "completion": " upon"},
            [conversation(("", "Once"), ("", " upon"))],
        ),
        ("sft", {"prompt": HI[:1], "completion": HI[1:]}, [CHAT]),
        (
            "sft",
            {"prompt": "As JSON", "completion": '[{"a": 1}]'},
            [conversation(("", "As JSON"), ("", '[{"a": 1}]'))],
        ),
        ("sft", {"prompt": "Hi there", "completion": HI[1:]}, [CHAT]),
        ("sft", {"messages": [{"role": "system", "content": ""}, *HI]}, [CHAT]),
        # columns beside the messages
        (
            "sft",
            {"system": "Be brief.", "instruction": "Bye", "output": "So long", "history": HISTORY},
            [LONG_CHAT],
        ),
        ("sft", {"messages": LONG[1:], "system": "Be brief."}, [LONG_CHAT]),
        # text that is JSON stays text, whatever its keys
        *(
            ("sft", {"prompt": "p", "completion": text}, [conversation(("", "p"), ("", text))])
            for text in JSON_TEXTS
        ),
        (
            "dpo",
            {"prompt": "p", "chosen": JSON_TEXTS[0], "rejected": JSON_TEXTS[1]},
            [conversation(("", "p")), JSON_TEXTS[0], JSON_TEXTS[1]],
        ),
        # which replies are learned
        *(
            ("sft", {"messages": [HI[0], {**HI[1], key: 0}, *LONG[3:]]}, [NOT_LEARNED])
            for key in ("weight", "train")
        ),
        ("sft", {"messages": [{**m, "weight": 1, "train": True} for m in HI]}, [CHAT]),
        # parts that are all text
        (
            "sft",
            {
                "messages": [
                    {
                        **m,
                        "content": [
                            {"type": "text", "text": m["content"][:2]},
                            {"type": "text", "text": m["content"][2:]},
                        ],
                    }
                    for m in HI
                ]
            },
            [CHAT],
        ),
        (
            "dpo",
            {"prompt": "Q", "chosen": "good", "rejected": "bad"},
            [conversation(("", "Q")), "good", "bad"],
        ),
        (
            "dpo",
            {"prompt": "Hi there", "chosen": HI, "rejected": [HI[0], NO]},
            [conversation(("user", "Hi there")), "Hello", "No"],
        ),
        (
            "dpo",
            {"prompt": HI[:1], "chosen": HI[1:], "rejected": [NO]},
            [conversation(("user", "Hi there")), "Hello", "No"],
        ),
        (
            "dpo",
            {"chosen": HI, "rejected": [HI[0], NO]},
            [conversation(("user", "Hi there")), "Hello", "No"],
        ),
        ("classify", {"text": "fine", "label": "good"}, ["fine", "good"]),
        ("classify", {"text": "fine", "label": 1}, ["fine", "1"]),
        ("seq2seq", {"src": "one", "tgt": "eins", "source": "a book"}, ["one", "eins"]),
        ("seq2seq", {"source": "one", "target": "eins"}, ["one", "eins"]),
        ("embed", {"query": "q", "document": "d"}, ["q", "d"]),
    ],
)
def test_formats_are_recognised(
    tmp_path: Path, kind: str, objective: str, row: dict[str, Any], expected: list[str]
) -> None:
    documents = read(write_rows(tmp_path, [row] * 2, kind), objective)
    assert [f.to_pylist() for f in documents.fields] == [[e] * 2 for e in expected]


def test_other_column_names_need_a_mapping(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"en": "one", "de": "eins"}], "jsonl")
    with pytest.raises(
        InputError,
        match=r"rows.jsonl: expected the columns of objective seq2seq.*found en, de: map them with",
    ):
        read(path, "seq2seq")
    documents = read(path, "seq2seq", columns={"source": "en", "target": "de"})
    assert [f.to_pylist() for f in documents.fields] == [["one"], ["eins"]]


def test_an_optional_column_may_be_missing_in_the_first_line(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add", "output": "3"},
        {"instruction": "Add", "input": "1 2", "output": "3"},
    ]
    documents = read(write_rows(tmp_path, rows, "jsonl"), "sft")
    assert documents.fields[0].to_pylist()[1] == conversation(
        ("user", "Add\n\n1 2"), ("assistant", "3")
    )


def test_rows_that_are_filtered_out_are_not_checked(tmp_path: Path) -> None:
    rows = [
        {"source": "one", "target": "eins", "split": "train"},
        {"source": "", "target": "", "split": "test"},
    ]
    documents = read(
        write_rows(tmp_path, rows, "parquet"),
        "seq2seq",
        filters=[{"column": "split", "one_of": ["train"]}],
    )
    assert documents.skipped.count == 0 and documents.fields[0].to_pylist() == ["one"]


def test_a_json_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps([{"source": "one", "target": "eins"}]))
    with pytest.raises(
        InputError,
        match=r"rows.jsonl: first line: expected one JSON object per line, found an array.*jq",
    ):
        read(path, "seq2seq")


BAD = [
    (
        "sft",
        {"messages": HI},
        {"messages": [HI[0], {**HI[1], "weight": 0.5}]},
        "message 2: weight: expected 0 or 1, found 0.5",
    ),
    (
        "sft",
        {"messages": HI},
        {"messages": [HI[0], {**HI[1], "train": False}]},
        "every reply is ex",
    ),
    (
        "sft",
        {"messages": HI},
        {"messages": [HI[0], {**HI[1], "function_call": {"name": "f"}}]},
        "'function_call' is not supported: use tool_calls",
    ),
    (
        "sft",
        {"messages": HI},
        {"messages": [HI[0], {**HI[1], "tool_calls": [{"function": {"arguments": {}}}]}]},
        "message 2: tool_calls: expected a list of calls with names",
    ),
    ("sft", {"messages": HI}, {"messages": [HI[0], {**HI[1], "tool_calls": 5}]}, "tool_calls"),
    (
        "sft",
        {"messages": HI},
        {"messages": [HI[0], {**HI[1], "reasoning": ["a"]}]},
        "message 2: reasoning_content: expected text, found list",
    ),
    (
        "sft",
        {"messages": HI},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, HI[1]]},
        "message 1: expected text, found parts of type image",
    ),
    (
        "sft",
        {"messages": HI, "system": ""},
        {"messages": LONG, "system": "two"},
        "two system messages",
    ),
    (
        "sft",
        {"prompt": "a", "completion": "b", "system": ""},
        {"prompt": "a", "completion": "b", "system": "s"},
        "a system message beside",
    ),
    (
        "sft",
        {"instruction": "a", "output": "b", "history": []},
        {"instruction": "a", "output": "b", "history": ["one"]},
        "history: expected pairs",
    ),
    (
        "seq2seq",
        {"source": "a", "target": "b"},
        {"source": ["a"], "target": "b"},
        "expected text in 'source', found a list",
    ),
    ("sft", {"messages": HI}, {"messages": HI[:1]}, "a conversation without a reply"),
    (
        "sft",
        {"messages": HI},
        {"messages": [HI[0], HI[0], HI[1]]},
        "roles out of order: message 2 is user after user",
    ),
    (
        "sft",
        {"messages": HI},
        {"messages": HI[1:]},
        "roles out of order: message 1 is assistant after nothing",
    ),
    (
        "sft",
        {"messages": HI},
        {"messages": [*HI, {"role": "system", "content": "x"}]},
        "message 3 is system",
    ),
    (
        "sft",
        {"messages": HI},
        {"messages": [HI[0], {"role": "robot", "content": "x"}]},
        "expected a role .*'robot'",
    ),
    (
        "sft",
        {"messages": HI},
        {"messages": [HI[0], {"role": "assistant", "content": ""}]},
        "message 2: expected text",
    ),
    (
        "sft",
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": " "},
        "no text in 'completion'",
    ),
    (
        "dpo",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        "equal texts",
    ),
    (
        "classify",
        {"text": "a", "label": "x"},
        {"text": "a", "label": "z"},
        "unknown class 'z': the training data has x, y",
    ),
    (
        "embed",
        {"query": "a", "document": "b"},
        {"query": "a", "document": "a"},
        "equal texts: query and document",
    ),
]


@pytest.mark.parametrize(("objective", "good", "bad", "why"), BAD)
def test_bad_rows_are_named_and_counted(
    tmp_path: Path, objective: str, good: dict[str, Any], bad: dict[str, Any], why: str
) -> None:
    classes = ("x", "y") if objective == "classify" else ()
    path = write_rows(tmp_path, [good, bad, good, bad], "jsonl")
    with pytest.raises(
        InputError, match=rf"rows.jsonl: line 2: .*{why}.*; line 4: .*on_bad_document=skip"
    ):
        read(path, objective, classes=classes)
    documents = read(path, objective, "skip", classes)
    assert (
        documents.skipped.count == 2
        and documents.origin.tolist() == [0, 2]
        and all(len(f) == 2 for f in documents.fields)
    )


def test_only_replies_are_targets(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    encoder = examples.ConversationEncoder(tokenizer, 96)
    (encoded,) = encoder.encode([read(write_rows(tmp_path, [{"messages": LONG}], "jsonl"), "sft")])
    assert encoded.targets is not None and encoded.cut == 0
    text = tokenizer.decode(encoded.ids)
    assert text == tokenizer.apply_chat_template(LONG, tokenize=False)
    runs = np.split(
        np.arange(len(encoded.ids)), np.flatnonzero(np.diff(encoded.targets.astype(int))) + 1
    )
    replies = [tokenizer.decode(encoded.ids[run]) for run in runs if encoded.targets[run[0]]]
    assert replies == [" Hello<|eos|>", " So long<|eos|>"]
    prompt = encoder.prompt(conversation(*((m["role"], m["content"]) for m in LONG)), 96)
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        LONG[:-1], tokenize=False, add_generation_prompt=True
    )


def test_a_long_conversation_keeps_its_last_reply(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": f"word {i} " * 4} for i in range(12)
    ]
    documents = read(write_rows(tmp_path, [{"messages": messages}], "jsonl"), "sft")
    (encoded,) = examples.ConversationEncoder(tokenizer, 90).encode([documents])
    assert (
        encoded.targets is not None
        and encoded.cut == 1
        and len(encoded.ids) <= 90
        and "word 11" in tokenizer.decode(encoded.ids)
    )
    (encoded,) = examples.ConversationEncoder(tokenizer, 16).encode([documents])
    assert (
        encoded.cut == 1
        and len(encoded.ids) == 16
        and encoded.targets is not None
        and encoded.targets.sum() == 15
    )


def test_a_tokenizer_without_a_chat_template_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    without_template = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|eos|>"
    )
    documents = read(write_rows(tmp_path, [{"messages": HI}], "jsonl"), "sft")
    with pytest.raises(
        InputError,
        match=r"need a chat template, and the tokenizer has none: set tokenizer\.chat_template",
    ):
        examples.ConversationEncoder(without_template, 64).encode([documents])


@pytest.mark.parametrize("objective", ["dpo", "classify", "seq2seq", "embed"])
def test_examples_fit_into_a_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, objective: str
) -> None:
    long, short = "some words " * 60, "few words"
    row = {
        "dpo": {"prompt": long, "chosen": short, "rejected": long},
        "classify": {"text": long, "label": "b"},
        "seq2seq": {"source": long, "target": long},
        "embed": {"query": long, "document": short + long},
    }[objective]
    encoder = examples.ENCODERS[objective](tokenizer, 48, classes=("a", "b"))
    (encoded,) = encoder.encode([read(write_rows(tmp_path, [row], "parquet"), objective)])
    # with preferences, the prompt of the shorter answer is shortened as much as that of the longer
    length = 24 + 9 if objective == "dpo" else 48
    assert encoded.targets is not None and len(encoded.ids) == length
    assert 0 < encoded.targets.sum() < length
    assert encoded.cut == 1
    edges = np.flatnonzero(np.diff(encoded.targets.astype(int)))
    assert len(edges) == (3 if objective == "dpo" else 1)
    if objective == "classify":
        assert encoded.ids[-1] == 1 and encoded.ids[-2] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_sorted_rows_are_mixed_within_a_chunk(tmp_path: Path, kind: str) -> None:
    labels = [f"class {i // 2000}" for i in range(8000)]
    path = write_rows(
        tmp_path,
        [
            {"text": f"a text with the number {i} in it", "label": label}
            for i, label in enumerate(labels)
        ],
        kind,
    )
    manifest = scan(
        [Source(path=str(path))], "classify", 2 * CHUNKS_PER_LANE * MAX_GROUPS_PER_CHUNK
    )
    order = DataOrder(manifest, seed=0, lanes=2)
    selection = Selection(examples.ENCODERS["classify"].fields)
    for chunk in range(order.chunks_per_epoch - 1):  # the last one continues in the next epoch
        label_groups = [
            selection.read(manifest, index).fields[1].to_pylist() for index in order.chunk(chunk)
        ]
        assert len({label for group in label_groups for label in group}) >= 3


def test_keys_that_are_not_understood_are_counted(tmp_path: Path) -> None:
    rows = [{"messages": [{**HI[0], "mood": "good"}, {**HI[1], "mood": "bad", "id": 3}]}] * 2
    path = write_rows(tmp_path, rows, "jsonl")
    assert read(path, "sft").unknown_keys == {"mood": 4, "id": 2}
    manifest = scan([Source(path=str(path))], "sft")
    selection = Selection(examples.ENCODERS["sft"].fields, ignored=("mood", "id"))
    assert not selection.read(manifest, 0).unknown_keys


def test_an_ignored_column_is_not_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"messages": HI, "system": "Be brief."}], "parquet")
    manifest = scan([Source(path=str(path))], "sft", ignored_columns=["system"])
    selection = Selection(examples.ENCODERS["sft"].fields)
    assert selection.read(manifest, 0).fields[0].to_pylist() == [CHAT]
