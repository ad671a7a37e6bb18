"""The common row formats of fine-tuning data, and how their rows become an objective's texts.

A format (`Shape`) is recognised by the names of its columns. Its rows are converted to the fields
that the encoder of an objective reads (see `sevenfold.data.examples`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sevenfold.data.sources.messages import (
    Conversation,
    Message,
    MessageKeys,
    nested_value,
    pair,
    parse_list,
    read_messages,
)
from sevenfold.errors import InputError
from sevenfold.recipe import Source
from sevenfold.recipe.keys import did_you_mean


@dataclass(frozen=True)
class Shape:
    """A row format.

    Attributes:
        name: Its name in recipes.
        roles: What its columns stand for.
        column_names: The usual names of these columns: one or more alternatives, each in the order
            of the roles.
        read: Converts a row: takes the `MessageKeys`, and
            the strings of the row's columns in the order of the roles; returns the texts that an
            encoder reads. Raises ValueError if the row cannot be trained on.
        optional: The roles whose columns may be missing.
    """

    name: str
    roles: tuple[str, ...]
    column_names: tuple[tuple[str, ...], ...]
    read: Callable[..., tuple[str, ...]]
    optional: tuple[str, ...] = ()


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
    return ["\n".join(m["content"] for m in Conversation.load(text).messages) for text in column]


def _read_chat(
    keys: MessageKeys, messages: str, system: str = "", tools: str = ""
) -> tuple[str, ...]:
    value = parse_list(messages)
    if value is None:
        raise ValueError(f"expected a list of messages, found {messages[:40]!r}")
    return (_conversation(value, keys, system, tools).dump(),)


def _conversation(
    messages: list[Any], keys: MessageKeys, system: str = "", tools: str = ""
) -> Conversation:
    """Returns a conversation of messages, a system message and tools from columns of their own."""
    valid = read_messages(messages, keys)
    if system.strip() and valid[0]["role"] == "system":
        raise ValueError("two system messages: one in the messages, one in the column system")
    listed = parse_list(tools) if tools.strip() else None
    if tools.strip() and listed is None:
        raise ValueError(f"tools: expected a list, found {tools[:40]!r}")
    return Conversation([*_system_message(system), *valid], listed or None)


def _system_message(system: str) -> list[Message]:
    return [{"role": "system", "content": system}] if system.strip() else []


def _refuse_system(system: str, beside: str) -> None:
    """Raises ValueError if there is a system message, which plain text has no place for."""
    if system.strip():
        raise ValueError(
            f"a system message beside {beside} plain text: give messages instead, or name the "
            "column in data.ignore_columns"
        )


def _as_messages(text: str) -> list[Any] | None:
    """Returns the message or messages in a column; None if it has text."""
    value = nested_value(text)
    if value is None:
        return None
    messages = value if isinstance(value, list) else [value]
    return messages if all(isinstance(m, dict) for m in messages) else None


def _messages_or_text(role: str, text: str) -> list[Any]:
    """Returns the messages in a column; plain text becomes one message of the given role."""
    messages = _as_messages(text)
    return [{"role": role, "content": text}] if messages is None else messages


def _read_pair(
    keys: MessageKeys, prompt: str, completion: str, system: str = ""
) -> tuple[str, ...]:
    if _as_messages(prompt) is None and _as_messages(completion) is None:
        _refuse_system(system, "a prompt and completion that are")
        prompt = _require_text(prompt, "prompt")
        completion = _require_text(completion, "completion")
        return (pair(prompt, completion).dump(),)
    messages = [*_messages_or_text("user", prompt), *_messages_or_text("assistant", completion)]
    return (_conversation(messages, keys, system).dump(),)


def _read_alpaca(
    keys: MessageKeys,
    instruction: str,
    output: str,
    context: str = "",
    system: str = "",
    history: str = "",
) -> tuple[str, ...]:
    question = _require_text(instruction, "instruction")
    if context.strip():
        question += f"\n\n{context}"
    earlier = parse_list(history) if history.strip() else []
    if earlier is None or not all(isinstance(p, list) and len(p) == 2 for p in earlier):
        raise ValueError(f"history: expected pairs of question and answer, found {history[:40]!r}")
    texts = [text for exchange in earlier for text in exchange]
    messages = [
        {"role": role, "content": text}
        for role, text in zip(
            ("user", "assistant") * (len(earlier) + 1),
            [*texts, question, _require_text(output, "output")],
            strict=True,
        )
    ]
    return (_conversation(messages, keys, system).dump(),)


def _read_preference(
    keys: MessageKeys, prompt: str, chosen: str, rejected: str, system: str = ""
) -> tuple[str, ...]:
    answers = [_as_messages(text) for text in (chosen, rejected)]
    # Whole conversations, each with the prompt in it: the column `prompt` is not needed.
    if all(answer and len(answer) > 1 for answer in answers):
        return _read_preference_messages(keys, chosen, rejected, system)
    if _as_messages(prompt) is None and answers == [None, None]:
        _refuse_system(system, "a prompt that is")
        chosen = _require_text(chosen, "chosen")
        rejected = _require_text(rejected, "rejected")
        _require_different(chosen, rejected, "chosen and rejected")
        return pair(_require_text(prompt, "prompt")).dump(), chosen, rejected
    good, bad = (
        _conversation(
            [*_messages_or_text("user", prompt), *_messages_or_text("assistant", text)],
            keys,
            system,
        )
        for text in (chosen, rejected)
    )
    return _split_replies(good, bad)


def _read_preference_messages(
    keys: MessageKeys, chosen: str, rejected: str, system: str = ""
) -> tuple[str, ...]:
    pairs = [parse_list(text) for text in (chosen, rejected)]
    if pairs[0] is None or pairs[1] is None:
        raise ValueError("expected lists of messages in chosen and rejected")
    good, bad = (_conversation(messages or [], keys, system) for messages in pairs)
    return _split_replies(good, bad)


def _split_replies(chosen: Conversation, rejected: Conversation) -> tuple[str, ...]:
    """Returns the common prompt of two conversations, and the last message of each."""
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise ValueError("expected chosen and rejected to differ only in their last message")
    good, bad = chosen.messages[-1], rejected.messages[-1]
    for message in (good, bad):
        if extra := message.keys() - {"role", "content"}:
            raise ValueError(
                f"preferences compare texts, found {', '.join(sorted(extra))} in an answer"
            )
    _require_different(good["content"], bad["content"], "chosen and rejected")
    return chosen.with_messages(chosen.messages[:-1]).dump(), good["content"], bad["content"]


def _read_label(keys: MessageKeys, text: str, label: str) -> tuple[str, ...]:
    return _require_text(text, "text"), _require_text(label, "label")


def _read_translation(keys: MessageKeys, source: str, target: str) -> tuple[str, ...]:
    return _require_text(source, "source"), _require_text(target, "target")


def _read_retrieval(keys: MessageKeys, query: str, document: str) -> tuple[str, ...]:
    _require_different(query, document, "query and document")
    return _require_text(query, "query"), _require_text(document, "document")


def _require_text(text: str, role: str) -> str:
    if nested_value(text) is not None:
        raise ValueError(f"expected text in {role!r}, found a list or an object")
    if not text.strip():
        raise ValueError(f"no text in {role!r}")
    return text


def _require_different(first: str, second: str, names: str) -> None:
    if first == second:
        raise ValueError(f"a pair with equal texts: {names} are the same")


# The formats of each objective.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "sft": (
        Shape(
            "messages",
            ("messages", "system", "tools"),
            (("messages", "system", "tools"),),
            _read_chat,
            ("system", "tools"),
        ),
        Shape(
            "sharegpt",
            ("conversations", "system", "tools"),
            (("conversations", "system", "tools"),),
            _read_chat,
            ("system", "tools"),
        ),
        Shape(
            "alpaca",
            ("instruction", "output", "input", "system", "history"),
            (
                ("instruction", "output", "input", "system", "history"),
                ("instruction", "response", "context", "system", "history"),
            ),
            _read_alpaca,
            ("input", "system", "history"),
        ),
        Shape(
            "pair",
            ("prompt", "completion", "system"),
            (("prompt", "completion", "system"), ("prompt", "response", "system")),
            _read_pair,
            ("system",),
        ),
    ),
    "dpo": (
        Shape(
            "preference",
            ("prompt", "chosen", "rejected", "system"),
            (("prompt", "chosen", "rejected", "system"),),
            _read_preference,
            ("system",),
        ),
        Shape(
            "preference-messages",
            ("chosen", "rejected", "system"),
            (("chosen", "rejected", "system"),),
            _read_preference_messages,
            ("system",),
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
    source: Source,
    objective: str,
    columns: Sequence[str],
    path: str,
    more: bool = False,
    ignored: Sequence[str] = (),
) -> Source:
    """Returns a source with its shape, and the column of each role, filled in.

    Args:
        source: The source. It is returned unchanged if the objective reads plain text.
        objective: The training objective.
        columns: The names of the columns of the source's first shard.
        path: The path of this shard, for messages.
        more: Whether other rows may have columns that are not among these.
        ignored: Columns that are not read.

    Raises:
        InputError: No format of this objective has these columns.
    """
    readable = [column for column in columns if column not in ignored]
    for shape in SHAPES.get(objective, ()):
        if source.shape not in (None, shape.name):
            continue
        for names in shape.column_names:
            mapping = _match_columns(source, shape, names, readable, more, ignored)
            if mapping is not None:
                return source.model_copy(update={"shape": shape.name, "columns": mapping})
    if objective not in SHAPES:
        return source
    shapes = [shape.name for shape in SHAPES[objective]]
    if source.shape is not None and source.shape not in shapes:
        raise InputError(
            f"{path}: shape: expected one of {', '.join(shapes)} for objective {objective}, found "
            f"{source.shape!r}{did_you_mean(source.shape, shapes)}"
        )
    known = "; ".join(f"{', '.join(s.roles)} ({s.name})" for s in SHAPES[objective])
    raise InputError(
        f"{path}: expected the columns of objective {objective}, one of: {known}; "
        f"found {', '.join(columns)}: map them with `columns: {{role: column}}` in the source"
    )


def _match_columns(
    source: Source,
    shape: Shape,
    names: Sequence[str],
    columns: Sequence[str],
    more: bool,
    ignored: Sequence[str],
) -> dict[str, str] | None:
    """Returns the column of each role of a format, or None if the format does not fit.

    It fits if no required column is missing, and every role that the source maps is used.

    Args:
        source: The source; the columns that it maps take precedence over `names`.
        shape: The format.
        names: Its usual column names, one for each role.
        columns: The names of the columns in the data.
        more: Whether other rows may have further columns; then optional ones are always mapped.
        ignored: Columns that are not read.
    """
    candidates = {
        role: source.columns.get(role, name) for role, name in zip(shape.roles, names, strict=True)
    }
    present = {role: name for role, name in candidates.items() if name in columns}
    possible = {
        role: candidates[role]
        for role in shape.optional
        if more and candidates[role] not in ignored
    }
    missing = candidates.keys() - present.keys() - set(shape.optional)
    unused = source.columns.keys() - present.keys() - possible.keys()
    return None if missing or unused else present | possible


def columns_to_read(source: Source) -> list[str]:
    """Returns the names of the columns that documents are made from."""
    return list(source.columns.values()) if source.shape else [source.text]


def convert_rows(
    source: Source,
    field_count: int,
    columns: Sequence[pa.Array],
    classes: Sequence[str],
    keys: MessageKeys,
) -> tuple[list[pa.Array], list[tuple[int, str]]]:
    """Converts rows to the fields that an encoder reads.

    Args:
        source: The source, with its shape.
        field_count: The number of fields that the objective reads.
        columns: The source's columns, in its order.
        classes: The labels that may occur; empty: any.
        keys: The keys of messages that are ignored, and a counter of those not understood.

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
            converted = shape.read(keys, *(values.get(role) or "" for role in shape.roles))
            if classes and converted[1] not in classes:
                known = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
                raise ValueError(f"unknown class {converted[1]!r}: the training data has {known}")
        except ValueError as e:
            converted = ("",) * field_count
            bad.append((i, str(e)))
        for field, text in zip(fields, converted, strict=True):
            field.append(text)
    return [pa.array(field, pa.large_string()) for field in fields], bad
