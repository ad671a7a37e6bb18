"""The forms in which fine-tuning data lies about, recognised by their columns, and what a row of each comes to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sevenfold.errors import InputError
from sevenfold.recipe import Source

Turns = list[tuple[str, str]]  # (role, text); the role is "" where a text is meant as it stands, without a chat template

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"} | {
    r: r for r in ("system", "user", "assistant")
}


@dataclass(frozen=True)
class Shape:
    """One form.

    Attributes:
        roles: what its columns are for.
        names: what they are called, all ways that are known; those of `optional` may be missing.
        read: the columns of a row, in the order of the roles -> the texts that an encoder takes. Raises ValueError.
    """

    name: str
    roles: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    read: Callable[..., tuple[str, ...]]
    optional: tuple[str, ...] = ()


def conversation(turns: Turns) -> str:
    return json.dumps(turns, ensure_ascii=False)


def turns(text: str) -> Turns:
    """What `conversation` made a text of."""
    return [(role, content) for role, content in json.loads(text)]


def plain(field: str, column: list[str]) -> list[str]:
    """What is text in a field of canonical rows: of conversations what is said in them, of labels nothing."""
    if field == "label":
        return []
    if field not in ("conversation", "prompt"):
        return column
    return ["\n".join(said for _, said in turns(text)) for text in column]


def checked(messages: Any) -> Turns:
    """A conversation that can be learnt from: system first if at all, then user and assistant in turns; what comes after the
    last reply is left out. Raises ValueError, which says what is wrong."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("expected a list of messages")
    out: Turns = []
    for number, message in enumerate(messages, 1):
        said, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
        role = _ROLES.get(str(said))
        if role is None:
            raise ValueError(f"message {number}: expected a role (system, user, assistant), found {said!r}")
        if role == "system" and not text:
            continue
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"message {number}: expected text, found {'none' if not text else type(text).__name__}")
        before = out[-1][0] if out else None
        if role == "system" and before is not None:
            raise ValueError(f"roles out of order: message {number} is system, which can only be the first")
        if role == before or (role == "assistant" and before in (None, "system")):
            raise ValueError(f"roles out of order: message {number} is {role} after {before or 'nothing'}")
        out.append((role, text))
    while out and out[-1][0] != "assistant":
        out.pop()
    if not out:
        raise ValueError("a conversation without a reply: expected a message of the assistant")
    return out


def _listed(text: str) -> list[Any] | None:
    """Messages, where the text is JSON of some, or of one; an answer may well be other JSON."""
    if not re.match(r"\s*(\[\s*)?\{", text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = found if isinstance(found, list) else [found]
    return found if all(isinstance(m, dict) and m.keys() & {"role", "from"} for m in found) else None


def _messages(text: str) -> tuple[str, ...]:
    found = _listed(text)
    if found is None:
        raise ValueError(f"expected a list of messages, found {text[:40]!r}")
    return (conversation(checked(found)),)


def _pair(prompt: str, completion: str) -> tuple[str, ...]:
    if _listed(prompt) is None and _listed(completion) is None:
        return (conversation([("", _there(prompt, "prompt")), ("", _there(completion, "completion"))]),)
    return (conversation(checked([*_said("user", prompt), *_said("assistant", completion)])),)


def _said(role: str, text: str) -> list[Any]:
    """The messages of a column; a text without a role is one of this role."""
    return _listed(text) or [{"role": role, "content": text}]


def _alpaca(instruction: str, output: str, more: str = "") -> tuple[str, ...]:
    asked = _there(instruction, "instruction") + (f"\n\n{more}" if more.strip() else "")
    return (conversation([("user", asked), ("assistant", _there(output, "output"))]),)


def _preference(prompt: str, chosen: str, rejected: str) -> tuple[str, ...]:
    answers = [_listed(t) for t in (chosen, rejected)]
    if all(answer and len(answer) > 1 for answer in answers):  # whole conversations, what is asked in each of them
        return _implicit(chosen, rejected)
    if _listed(prompt) is None and answers == [None, None]:
        _apart(_there(chosen, "chosen"), _there(rejected, "rejected"), "chosen and rejected")
        return conversation([("", _there(prompt, "prompt"))]), chosen, rejected
    good, bad = (checked([*_said("user", prompt), *_said("assistant", t)]) for t in (chosen, rejected))
    return _differing(good, bad)


def _implicit(chosen: str, rejected: str) -> tuple[str, ...]:
    return _differing(checked(_listed(chosen)), checked(_listed(rejected)))


def _differing(good: Turns, bad: Turns) -> tuple[str, ...]:
    if good[:-1] != bad[:-1]:
        raise ValueError("expected chosen and rejected to differ in their last message alone")
    _apart(good[-1][1], bad[-1][1], "chosen and rejected")
    return conversation(good[:-1]), good[-1][1], bad[-1][1]


def _label(text: str, label: str) -> tuple[str, ...]:
    return _there(text, "text"), _there(label, "label")


def _translation(source: str, target: str) -> tuple[str, ...]:
    return _there(source, "source"), _there(target, "target")


def _retrieval(query: str, document: str) -> tuple[str, ...]:
    _apart(query, document, "query and document")
    return _there(query, "query"), _there(document, "document")


def _there(text: str, what: str) -> str:
    if not text.strip():
        raise ValueError(f"no text in {what!r}")
    return text


def _apart(a: str, b: str, what: str) -> None:
    if a == b:
        raise ValueError(f"a pair with equal texts: {what} are the same")


SHAPES: dict[str, tuple[Shape, ...]] = {  # by objective
    "sft": (
        Shape("messages", ("messages",), (("messages",),), _messages),
        Shape("sharegpt", ("conversations",), (("conversations",),), _messages),
        Shape(
            "alpaca", ("instruction", "output", "input"),
            (("instruction", "output", "input"), ("instruction", "response", "context")), _alpaca, ("input",),
        ),
        Shape("pair", ("prompt", "completion"), (("prompt", "completion"), ("prompt", "response")), _pair),
    ),
    "dpo": (
        Shape("preference", ("prompt", "chosen", "rejected"), (("prompt", "chosen", "rejected"),), _preference),
        Shape("preference-messages", ("chosen", "rejected"), (("chosen", "rejected"),), _implicit),
    ),
    "classify": (Shape("label", ("text", "label"), (("text", "label"), ("sentence", "label")), _label),),
    "seq2seq": (
        Shape(
            "source-target", ("source", "target"),
            (("source", "target"), ("src", "tgt"), ("document", "summary"), ("article", "highlights"),
             ("prompt", "completion")),
            _translation,
        ),
    ),
    "embed": (
        Shape(
            "query-document", ("query", "document"),
            (("query", "document"), ("anchor", "positive"), ("query", "positive"), ("question", "context")), _retrieval,
        ),
    ),
}  # fmt: skip


def recognise(source: Source, objective: str, columns: Sequence[str], path: str, more: bool = False) -> Source:
    """The source with its shape, and the column of each role, put in; as it is where the objective reads plain text.

    Args:
        columns: of its first shard, which lies at `path`.
        more: other rows may have columns that these are without.

    Raises:
        InputError: no form of this objective has these columns.
    """
    for shape in SHAPES.get(objective, ()):
        for names in shape.names if source.shape in (None, shape.name) else ():
            named = {role: source.columns.get(role, name) for role, name in zip(shape.roles, names, strict=True)}
            found = {role: name for role, name in named.items() if name in columns}
            maybe = {role: named[role] for role in shape.optional if more}
            if not (set(named) - set(found) - set(shape.optional) or source.columns.keys() - found.keys() - maybe.keys()):
                return source.model_copy(update={"shape": shape.name, "columns": found | maybe})
    if objective not in SHAPES:
        return source
    forms = "; ".join(f"{', '.join(s.roles)} ({s.name})" for s in SHAPES[objective])
    raise InputError(
        f"{path}: expected the columns of objective {objective}, one of: {forms}; found {', '.join(columns)}: say which "
        "is which in the source (columns: {ROLE: COLUMN})"
    )


def read_columns(source: Source) -> list[str]:
    """The columns that make a document."""
    return list(source.columns.values()) if source.shape else [source.text]


def canonical(
    source: Source, objective_fields: int, columns: Sequence[pa.Array], classes: Sequence[str]
) -> tuple[list[pa.Array], list[tuple[int, str]]]:
    """The texts that an encoder takes, from the columns of a source's shape.

    Args:
        objective_fields: how many those are.
        classes: the labels that are known; none: all are.

    Returns:
        (one array a field; (index, what is wrong) of the rows that cannot be learnt from, which are empty).
    """
    shape = next(s for kinds in SHAPES.values() for s in kinds if s.name == source.shape)
    out: list[list[str]] = [[] for _ in range(objective_fields)]
    bad = []
    for i, row in enumerate(zip(*(c.to_pylist() for c in columns), strict=True)):
        given = dict(zip(source.columns, row, strict=True))
        try:
            made = shape.read(*(given.get(role) or "" for role in shape.roles))
            if classes and made[1] not in classes:
                known = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
                raise ValueError(f"unknown class {made[1]!r}: the training data has {known}")
        except ValueError as e:
            made = ("",) * objective_fields
            bad.append((i, str(e)))
        for column, text in zip(out, made, strict=True):
            column.append(text)
    return [pa.array(c, pa.large_string()) for c in out], bad
