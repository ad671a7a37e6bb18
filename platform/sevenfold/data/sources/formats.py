"""The common row formats of fine-tuning data, and how their rows become an objective's texts.

A format (`Shape`) is recognised by the names of its columns. Its rows are converted to the fields
that the encoder of an objective reads (see `sevenfold.data.examples`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sevenfold.errors import InputError
from sevenfold.recipe import Source

# (role, text) of each message. The role is "" if the text is used as it is, without a chat
# template.
Turns = list[tuple[str, str]]

# Role names in data -> our names.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Shape:
    """A row format.

    Attributes:
        name: Its name in recipes.
        roles: What its columns stand for.
        column_names: The usual names of these columns: one or more alternatives, each in the order
            of the roles.
        read: Converts a row: takes the strings of its columns in the order of the roles, returns
            the texts that an encoder reads. Raises ValueError if the row cannot be trained on.
        optional: The roles whose columns may be missing.
    """

    name: str
    roles: tuple[str, ...]
    column_names: tuple[tuple[str, ...], ...]
    read: Callable[..., tuple[str, ...]]
    optional: tuple[str, ...] = ()


def dump_conversation(turns: Turns) -> str:
    """Returns a conversation as a string (JSON)."""
    return json.dumps(turns, ensure_ascii=False)


def load_conversation(text: str) -> Turns:
    """Returns the messages of a conversation that `conversation` converted to a string."""
    return [(role, content) for role, content in json.loads(text)]


def tokenizer_texts(field: str, column: list[str]) -> list[str]:
    """Returns the text in a field of converted rows, to train a tokenizer on.

    Args:
        field: The name of the field.
        column: Its strings.

    Returns:
        The strings themselves; for conversations the contents of their messages, joined by
        newlines; for labels nothing.
    """
    if field == "label":
        return []
    if field not in ("conversation", "prompt"):
        return column
    return ["\n".join(content for _, content in load_conversation(text)) for text in column]


def validate_conversation(messages: Any) -> Turns:
    """Returns the messages of a conversation that can be trained on.

    The first may be a system message; then user and assistant must alternate. Messages after the
    last reply of the assistant are left out, and so are empty system messages.

    Raises:
        ValueError: The conversation breaks these rules.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("expected a list of messages")
    valid: Turns = []
    for number, message in enumerate(messages, 1):
        role_name = message.get("role", message.get("from"))
        text = message.get("content", message.get("value"))
        role = _ROLES.get(str(role_name))
        if role is None:
            raise ValueError(
                f"message {number}: expected a role (system, user, assistant), found {role_name!r}"
            )
        if role == "system" and not text:
            continue
        if not isinstance(text, str) or not text.strip():
            kind = "none" if not text else type(text).__name__
            raise ValueError(f"message {number}: expected text, found {kind}")
        previous = valid[-1][0] if valid else None
        if role == "system" and previous is not None:
            raise ValueError(
                f"roles out of order: message {number} is system, which is allowed only as the "
                "first message"
            )
        if role == previous or (role == "assistant" and previous in (None, "system")):
            raise ValueError(
                f"roles out of order: message {number} is {role} after {previous or 'nothing'}"
            )
        valid.append((role, text))
    while valid and valid[-1][0] != "assistant":
        valid.pop()
    if not valid:
        raise ValueError("a conversation without a reply: expected a message of the assistant")
    return valid


def _as_messages(text: str) -> list[Any] | None:
    """Returns the messages in a string, or None if it is not JSON of messages.

    A single message is returned as a list of one. Other JSON is text: an answer may well be JSON.
    """
    if not re.match(r"\s*(\[\s*)?\{", text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    messages = value if isinstance(value, list) else [value]
    if all(isinstance(m, dict) and m.keys() & {"role", "from"} for m in messages):
        return messages
    return None


def _messages_or_text(role: str, text: str) -> list[Any]:
    """Returns the messages in a string; plain text becomes one message of the given role."""
    return _as_messages(text) or [{"role": role, "content": text}]


def _read_messages(text: str) -> tuple[str, ...]:
    messages = _as_messages(text)
    if messages is None:
        raise ValueError(f"expected a list of messages, found {text[:40]!r}")
    return (dump_conversation(validate_conversation(messages)),)


def _read_pair(prompt: str, completion: str) -> tuple[str, ...]:
    if _as_messages(prompt) is None and _as_messages(completion) is None:
        prompt = _require_text(prompt, "prompt")
        completion = _require_text(completion, "completion")
        return (dump_conversation([("", prompt), ("", completion)]),)
    messages = [*_messages_or_text("user", prompt), *_messages_or_text("assistant", completion)]
    return (dump_conversation(validate_conversation(messages)),)


def _read_alpaca(instruction: str, output: str, context: str = "") -> tuple[str, ...]:
    question = _require_text(instruction, "instruction")
    if context.strip():
        question += f"\n\n{context}"
    return (
        dump_conversation([("user", question), ("assistant", _require_text(output, "output"))]),
    )


def _read_preference(prompt: str, chosen: str, rejected: str) -> tuple[str, ...]:
    answers = [_as_messages(text) for text in (chosen, rejected)]
    # Whole conversations, each with the prompt in it: the column `prompt` is not needed.
    if all(answer and len(answer) > 1 for answer in answers):
        return _read_preference_messages(chosen, rejected)
    if _as_messages(prompt) is None and answers == [None, None]:
        chosen = _require_text(chosen, "chosen")
        rejected = _require_text(rejected, "rejected")
        _require_different(chosen, rejected, "chosen and rejected")
        return dump_conversation([("", _require_text(prompt, "prompt"))]), chosen, rejected
    good, bad = (
        validate_conversation(
            [*_messages_or_text("user", prompt), *_messages_or_text("assistant", text)]
        )
        for text in (chosen, rejected)
    )
    return _split_replies(good, bad)


def _read_preference_messages(chosen: str, rejected: str) -> tuple[str, ...]:
    return _split_replies(
        validate_conversation(_as_messages(chosen)), validate_conversation(_as_messages(rejected))
    )


def _split_replies(chosen: Turns, rejected: Turns) -> tuple[str, ...]:
    """Returns the common prompt of two conversations, and the last message of each."""
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("expected chosen and rejected to differ only in their last message")
    _require_different(chosen[-1][1], rejected[-1][1], "chosen and rejected")
    return dump_conversation(chosen[:-1]), chosen[-1][1], rejected[-1][1]


def _read_label(text: str, label: str) -> tuple[str, ...]:
    return _require_text(text, "text"), _require_text(label, "label")


def _read_translation(source: str, target: str) -> tuple[str, ...]:
    return _require_text(source, "source"), _require_text(target, "target")


def _read_retrieval(query: str, document: str) -> tuple[str, ...]:
    _require_different(query, document, "query and document")
    return _require_text(query, "query"), _require_text(document, "document")


def _require_text(text: str, role: str) -> str:
    if not text.strip():
        raise ValueError(f"no text in {role!r}")
    return text


def _require_different(first: str, second: str, names: str) -> None:
    if first == second:
        raise ValueError(f"a pair with equal texts: {names} are the same")


# The formats of each objective.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "sft": (
        Shape("messages", ("messages",), (("messages",),), _read_messages),
        Shape("sharegpt", ("conversations",), (("conversations",),), _read_messages),
        Shape(
            "alpaca",
            ("instruction", "output", "input"),
            (("instruction", "output", "input"), ("instruction", "response", "context")),
            _read_alpaca,
            ("input",),
        ),
        Shape(
            "pair",
            ("prompt", "completion"),
            (("prompt", "completion"), ("prompt", "response")),
            _read_pair,
        ),
    ),
    "dpo": (
        Shape(
            "preference",
            ("prompt", "chosen", "rejected"),
            (("prompt", "chosen", "rejected"),),
            _read_preference,
        ),
        Shape(
            "preference-messages",
            ("chosen", "rejected"),
            (("chosen", "rejected"),),
            _read_preference_messages,
        ),
    ),
    "classify": (
        Shape("label", ("text", "label"), (("text", "label"), ("sentence", "label")), _read_label),
    ),
    "seq2seq": (
        Shape(
            "source-target",
            ("source", "target"),
            (
                ("source", "target"),
                ("src", "tgt"),
                ("document", "summary"),
                ("article", "highlights"),
                ("prompt", "completion"),
            ),
            _read_translation,
        ),
    ),
    "embed": (
        Shape(
            "query-document",
            ("query", "document"),
            (
                ("query", "document"),
                ("anchor", "positive"),
                ("query", "positive"),
                ("question", "context"),
            ),
            _read_retrieval,
        ),
    ),
}


def recognise(
    source: Source, objective: str, columns: Sequence[str], path: str, more: bool = False
) -> Source:
    """Returns a source with its shape, and the column of each role, filled in.

    Args:
        source: The source. It is returned unchanged if the objective reads plain text.
        objective: The training objective.
        columns: The names of the columns of the source's first shard.
        path: The path of this shard, for messages.
        more: Whether other rows may have columns that are not among these.

    Raises:
        InputError: No format of this objective has these columns.
    """
    for shape in SHAPES.get(objective, ()):
        if source.shape not in (None, shape.name):
            continue
        for names in shape.column_names:
            mapping = _match_columns(source, shape, names, columns, more)
            if mapping is not None:
                return source.model_copy(update={"shape": shape.name, "columns": mapping})
    if objective not in SHAPES:
        return source
    known = "; ".join(f"{', '.join(s.roles)} ({s.name})" for s in SHAPES[objective])
    raise InputError(
        f"{path}: expected the columns of objective {objective}, one of: {known}; "
        f"found {', '.join(columns)}: map them with `columns: {{role: column}}` in the source"
    )


def _match_columns(
    source: Source, shape: Shape, names: Sequence[str], columns: Sequence[str], more: bool
) -> dict[str, str] | None:
    """Returns the column of each role of a format, or None if the format does not fit.

    It fits if no required column is missing, and every role that the source maps is used.

    Args:
        source: The source; the columns that it maps take precedence over `names`.
        shape: The format.
        names: Its usual column names, one for each role.
        columns: The names of the columns in the data.
        more: Whether other rows may have further columns; then optional ones are always mapped.
    """
    candidates = {
        role: source.columns.get(role, name) for role, name in zip(shape.roles, names, strict=True)
    }
    present = {role: name for role, name in candidates.items() if name in columns}
    possible = {role: candidates[role] for role in shape.optional if more}
    missing = candidates.keys() - present.keys() - set(shape.optional)
    unused = source.columns.keys() - present.keys() - possible.keys()
    return None if missing or unused else present | possible


def columns_to_read(source: Source) -> list[str]:
    """Returns the names of the columns that documents are made from."""
    return list(source.columns.values()) if source.shape else [source.text]


def convert_rows(
    source: Source, field_count: int, columns: Sequence[pa.Array], classes: Sequence[str]
) -> tuple[list[pa.Array], list[tuple[int, str]]]:
    """Converts rows to the fields that an encoder reads.

    Args:
        source: The source, with its shape.
        field_count: The number of fields that the objective reads.
        columns: The source's columns, in its order.
        classes: The labels that may occur; empty: any.

    Returns:
        One array of strings for each field; and the (index, reason) of the rows that cannot be
        trained on, whose strings are empty.
    """
    shape = next(s for shapes in SHAPES.values() for s in shapes if s.name == source.shape)
    fields: list[list[str]] = [[] for _ in range(field_count)]
    bad = []
    for i, row in enumerate(zip(*(c.to_pylist() for c in columns), strict=True)):
        values = dict(zip(source.columns, row, strict=True))
        try:
            converted = shape.read(*(values.get(role) or "" for role in shape.roles))
            if classes and converted[1] not in classes:
                known = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
                raise ValueError(f"unknown class {converted[1]!r}: the training data has {known}")
        except ValueError as e:
            converted = ("",) * field_count
            bad.append((i, str(e)))
        for field, text in zip(fields, converted, strict=True):
            field.append(text)
    return [pa.array(field, pa.large_string()) for field in fields], bad
