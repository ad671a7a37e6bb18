"""Conversations in data: their messages, what the keys of a message mean, and their stored form."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sevenfold.recipe.data import number_text

# What a list or an object in a column begins with after it was converted to JSON, the record
# separator of RFC 7464. A column with text has no such character.
NESTED = "\x1e"

# Its keys: role and content, and those of OPTIONAL_KEYS that were given.
Message = dict[str, Any]

# Role names in data -> our names.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

# The keys of a message that chat templates know, besides role and content.
OPTIONAL_KEYS = ("reasoning_content", "tool_calls", "tool_call_id", "name")
_REASONING_ALIASES = {"reasoning", "thinking"}
# Keys that say whether a reply is learned: `weight` of OpenAI's format, `train` of axolotl's.
_LEARN_KEYS = ("weight", "train")
# Keys that change what is said, and that no template of today renders.
_REFUSED = {"function_call": "use tool_calls", "audio": "only text can be trained on"}


@dataclass
class MessageKeys:
    """The keys of messages that have no effect.

    Attributes:
        ignored: Those that are left out because the user says so.
        unknown: Counts those that are not understood.
    """

    ignored: tuple[str, ...] = ()
    unknown: Counter[str] = field(default_factory=Counter)


@dataclass
class Conversation:
    """A conversation.

    Attributes:
        messages: Its messages. A message whose key `train` is false is not learned.
        tools: The tools that the assistant may call, as a chat template takes them; None: none.
    """

    messages: list[Message]
    tools: list[Any] | None = None

    def dump(self) -> str:
        """Returns the conversation as a string (JSON), as it is stored in a document's field.

        A message with role and content alone becomes a pair, and without tools the messages alone
        are stored. The ledger's hashes of documents depend on this form.
        """
        messages = [
            [m["role"], m["content"]] if m.keys() == {"role", "content"} else m
            for m in self.messages
        ]
        stored = {"messages": messages, "tools": self.tools} if self.tools else messages
        return json.dumps(stored, ensure_ascii=False)

    @staticmethod
    def load(text: str) -> Conversation:
        """Returns the conversation that `dump` stored."""
        stored = json.loads(text)
        messages = stored["messages"] if isinstance(stored, dict) else stored
        tools = stored["tools"] if isinstance(stored, dict) else None
        return Conversation(
            [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages],
            tools,
        )

    @property
    def is_pair(self) -> bool:
        """Whether these are a prompt and its completion. They have no roles."""
        return not self.messages[0]["role"]

    def with_messages(self, messages: Sequence[Message]) -> Conversation:
        """Returns the conversation with other messages."""
        return Conversation(list(messages), self.tools)

    def without_oldest_exchange(self) -> Conversation | None:
        """Returns the conversation without its first user message and all up to the next one.

        The system message stays. None: there is only one exchange.
        """
        users = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if len(users) < 2:
            return None
        return self.with_messages(self.messages[: users[0]] + self.messages[users[1] :])


def pair(prompt: str, *completion: str) -> Conversation:
    """Returns a prompt and its completion, which are encoded without a chat template."""
    return Conversation([{"role": "", "content": text} for text in (prompt, *completion)])


def read_messages(value: Any, keys: MessageKeys) -> list[Message]:
    """Returns the messages of a conversation that can be trained on.

    The first may be a system message; then user and assistant must alternate. After an assistant's
    message with `tool_calls`, messages of tools may follow. Messages after the last reply of the
    assistant are left out, and so are empty system messages.

    Args:
        value: The messages as the data has them.
        keys: The keys that are ignored, and a counter of those that are not understood.

    Raises:
        ValueError: The conversation breaks these rules.
    """
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise ValueError("expected a list of messages")
    valid: list[Message] = []
    for number, given in enumerate(value, 1):
        message = _read_message(given, number, keys)
        if message is None:
            continue
        role = message["role"]
        previous = valid[-1]["role"] if valid else None
        if role == "system" and previous is not None:
            raise ValueError(
                f"roles out of order: message {number} is system, which is allowed only as the "
                "first message"
            )
        allowed = {
            None: ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool") if valid and "tool_calls" in valid[-1] else ("user",),
            "tool": ("tool", "assistant"),
        }[previous]
        if role not in allowed:
            raise ValueError(
                f"roles out of order: message {number} is {role} after {previous or 'nothing'}"
            )
        valid.append(message)
    while valid and valid[-1]["role"] != "assistant":
        valid.pop()
    if not valid:
        raise ValueError("a conversation without a reply: expected a message of the assistant")
    if not any(m.get("train", True) for m in valid if m["role"] == "assistant"):
        raise ValueError("every reply is excluded from training (weight: 0 or train: false)")
    return valid


def _read_message(given: Mapping[str, Any], number: int, keys: MessageKeys) -> Message | None:
    """Returns a message; None if it is an empty system message."""
    # null is what Arrow and Parquet give for a key that a message does not have
    present = {
        key: value for key, value in given.items() if value is not None and key not in keys.ignored
    }
    role_key = "role" if "role" in present else "from"
    text_key = "content" if "content" in present else "value"
    role = _ROLES.get(str(present.get(role_key)))
    if role is None:
        raise ValueError(
            f"message {number}: expected a role ({', '.join(sorted(set(_ROLES.values())))}), "
            f"found {present.get(role_key)!r}"
        )
    text = _text(present.get(text_key), number)
    if role == "system" and not text:
        return None
    for key in present.keys() & _REFUSED.keys():
        raise ValueError(f"message {number}: {key!r} is not supported: {_REFUSED[key]}")
    message: Message = {"role": role, "content": text}
    for alias in _REASONING_ALIASES & present.keys():
        present.setdefault("reasoning_content", present.pop(alias))
    message |= {key: present[key] for key in OPTIONAL_KEYS if present.get(key)}
    _check_optional_keys(message, number)
    if role == "assistant":
        message |= {} if _is_learned(present, number) else {"train": False}
    keys.unknown.update(present.keys() - {role_key, text_key, *OPTIONAL_KEYS, *_LEARN_KEYS})
    if not text.strip() and not message.get("tool_calls"):
        raise ValueError(f"message {number}: expected text, found none")
    return message


def _check_optional_keys(message: Message, number: int) -> None:
    """Raises ValueError if an optional key has a value of another type than templates expect."""
    calls = message.get("tool_calls", [])
    listed = calls if isinstance(calls, list) else [None]
    functions = [c.get("function", c) if isinstance(c, dict) else None for c in listed]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise ValueError(f"message {number}: tool_calls: expected a list of calls with names")
    for key in ("reasoning_content", "tool_call_id", "name"):
        if not isinstance(message.get(key, ""), str):
            found = type(message[key]).__name__
            raise ValueError(f"message {number}: {key}: expected text, found {found}")


def _text(content: Any, number: int) -> str:
    """Returns the text of a message's content: a string, or a list of parts that are all text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        kinds = {str(part.get("type")) for part in content}
        if kinds == {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise ValueError(
            f"message {number}: expected text, found parts of type {', '.join(sorted(kinds))}"
        )
    raise ValueError(f"message {number}: expected text, found {type(content).__name__}")


def _is_learned(message: Mapping[str, Any], number: int) -> bool:
    """Returns whether a reply is learned, as its weight or its key `train` says."""
    learned = True
    for key in _LEARN_KEYS:
        value = message.get(key, True)
        if value not in (0, 1):  # also False and True
            raise ValueError(f"message {number}: {key}: expected 0 or 1, found {value!r}")
        learned &= bool(value)
    return learned


def to_json(value: Any, marked: bool = True) -> str:
    """Returns a column's value as JSON.

    Args:
        value: The value.
        marked: Whether lists and objects are marked as such, for `nested_value`.
    """
    if isinstance(value, bool | int | float):
        return number_text(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return NESTED + text if marked and isinstance(value, list | dict) else text


def nested_value(text: str) -> Any:
    """Returns the list or object that a column has, or None if the column has text.

    Text that is JSON stays text: an answer may well be JSON.
    """
    try:
        return json.loads(text[1:]) if text.startswith(NESTED) else None
    except RecursionError:
        raise ValueError("expected a value, found one that is nested too deeply") from None


def parse_list(text: str) -> list[Any] | None:
    """Returns the list of objects that a column has, itself or as JSON; None if it has none."""
    try:
        value = json.loads(text.removeprefix(NESTED))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None
