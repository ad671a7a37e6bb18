"""How a chat template arranges the texts of messages, and where they are in a rendered text."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from sevenfold.data.sources.documents import UnusableExampleError
from sevenfold.data.sources.messages import Conversation

# The keys of a message that have its texts, in the order of the pieces.
_TEXT_KEYS = ("reasoning_content", "content")
_MARKER = re.compile(r"sf7q(\d+)q7fs")
# What templates split a message's text at. They leave out or move the part before it.
_SEPARATORS = re.compile(r"(<think>|</think>)")


class Span(NamedTuple):
    """A range of characters of a rendered text."""

    start: int
    stop: int


class Layout(NamedTuple):
    """How a template arranges the texts of a conversation's messages.

    Attributes:
        fixed: The texts of the template: before, between and after the pieces.
        order: The pieces in the order of the rendered text; a piece may occur more than once.
    """

    fixed: list[str]
    order: list[int]


def layout_of(marked_text: str) -> Layout:
    """Returns the layout of a rendered text that has markers in place of the pieces."""
    parts = _MARKER.split(marked_text)
    return Layout(parts[::2], [int(number) for number in parts[1::2]])


def mark_pieces(conversation: Conversation) -> Conversation:
    """Returns the conversation with a marker in place of each piece."""
    numbers = itertools.count()

    def mark(text: str) -> str:
        return "".join(
            f"sf7q{next(numbers)}q7fs" if _is_piece(part) else part
            for part in _SEPARATORS.split(text)
        )

    return conversation.with_messages(
        [
            message | {key: mark(message[key]) for key in _TEXT_KEYS if key in message}
            for message in conversation.messages
        ]
    )


def check_complete(layout: Layout, conversation: Conversation) -> None:
    """Checks that all that was said is in the layout; reasoning may be left out.

    Raises:
        UnusableExampleError: It is not.
    """
    optional = _reasoning_pieces(conversation)
    for piece, owner in enumerate(piece_owners(conversation)):
        if piece not in optional and piece not in layout.order:
            raise UnusableExampleError(f"the chat template leaves out message {owner + 1}")


def find_pieces(layout: Layout, conversation: Conversation, text: str) -> list[Span]:
    """Finds each piece of the layout in the rendered text.

    Raises:
        UnusableExampleError: The text is not what the layout says: the template changes what
            was said.
    """
    changed = UnusableExampleError(
        "the chat template changes what was said, so that the messages cannot be found in its text"
    )
    if not text.startswith(layout.fixed[0]):
        raise changed
    texts, places = pieces(conversation), []
    position = len(layout.fixed[0])
    for piece, fixed in zip(layout.order, layout.fixed[1:], strict=True):
        found = next(
            (
                form
                for form in _forms(texts[piece])
                if text.startswith(form, position) and text.startswith(fixed, position + len(form))
            ),
            None,
        )
        if found is None:
            raise changed
        places.append(Span(position, position + len(found)))
        position += len(found) + len(fixed)
    if position != len(text):
        raise changed
    return places


def message_texts(conversation: Conversation) -> list[str]:
    """Returns the texts of all messages, reasoning before content."""
    return [m[key] for m in conversation.messages for key in _TEXT_KEYS if key in m]


def _is_piece(part: str) -> bool:
    return bool(part.strip()) and not _SEPARATORS.fullmatch(part)


def pieces(conversation: Conversation) -> list[str]:
    """Returns the texts of the messages, split where templates split them."""
    return [
        part
        for text in message_texts(conversation)
        for part in _SEPARATORS.split(text)
        if _is_piece(part)
    ]


def piece_owners(conversation: Conversation) -> list[int]:
    """Returns the index of the message of each piece."""
    return [
        i
        for i, message in enumerate(conversation.messages)
        for _ in pieces(Conversation([message]))
    ]


def _reasoning_pieces(conversation: Conversation) -> set[int]:
    """Returns the indices of the pieces that are reasoning, which templates may leave out."""
    reasoning, index = set(), 0
    for message in conversation.messages:
        for key in _TEXT_KEYS:
            parts = _SEPARATORS.split(message.get(key, ""))
            closed = max((i for i, part in enumerate(parts) if part == "</think>"), default=-1)
            for i, part in enumerate(parts):
                if _is_piece(part):
                    if key == "reasoning_content" or i < closed:
                        reasoning.add(index)
                    index += 1
    return reasoning


def _forms(piece: str) -> dict[str, None]:
    """Returns a text as templates may write it: as it is, or without outer spaces or newlines."""
    stripped = [f(piece) for f in (str.rstrip, str.lstrip, str.strip)]
    lines = [piece.rstrip("\n"), piece.lstrip("\n"), piece.strip("\n")]
    return dict.fromkeys([piece, *lines, *stripped])
