"""A tokenizer's chat template: renders conversations, and finds in them what the assistant says.

The ids of a conversation are those of the whole rendered text, as with transformers'
`apply_chat_template`. What the assistant says is found by its position in the text, not by encoding
parts of it, since the parts of a text can have other ids than the whole.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from sevenfold.data.chat_layout import (
    Layout,
    Span,
    find_pieces,
    message_texts,
    piece_owners,
)
from sevenfold.data.chat_renderer import ChatRenderer
from sevenfold.data.sources.documents import UnusableExampleError
from sevenfold.data.sources.messages import Conversation, Message
from sevenfold.data.special_tokens import SpecialTokenEncoder, any_of
from sevenfold.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: The text.
        contents: Where the texts of the messages are.
        replies: What the assistant says in each of its messages, with the token that ends it.
    """

    text: str
    contents: list[Span]
    replies: list[Span]


class ChatTemplate:
    """Renders conversations with the template of a tokenizer.

    Args:
        tokenizer: The tokenizer.
        today: The date (ISO 8601) that a template which writes the date gets. Default: the current
            date.
        serialized: The tokenizer's JSON, if the caller has it already.

    Raises:
        InputError: The tokenizer has no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        today: str | None = None,
        serialized: str | None = None,
    ):
        self._renderer = ChatRenderer(tokenizer, today)
        self._encoder = SpecialTokenEncoder(serialized or tokenizer.backend_tokenizer.to_str())

    def identity(self) -> str:
        """Returns what the ids depend on: the template, and the date if the template writes it."""
        return self._renderer.source

    def ids(self, conversation: Conversation, add_generation_prompt: bool = False) -> list[int]:
        """Returns the ids of a conversation.

        Args:
            conversation: The conversation.
            add_generation_prompt: Whether to add what comes before a reply.

        Raises:
            UnusableExampleError: The template rejects the conversation.
        """
        self._refuse_special_tokens(conversation)
        text = self._renderer.render(conversation, add_generation_prompt)
        contents: list[Span] = []
        if self._encoder.special.search("\0".join(message_texts(conversation))):
            contents = find_pieces(
                self._renderer.layout(conversation, add_generation_prompt), conversation, text
            )
        return list(self._encoder.encode(text, contents).ids)

    def ids_and_targets(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Returns the ids of a conversation, and which of them the assistant says.

        Replies that are not to be learned (`train` is false) have no targets.

        Raises:
            UnusableExampleError: The assistant's messages cannot be found in the rendered text.
        """
        rendered = self.locate(conversation)
        encoding = self._encoder.encode(rendered.text, rendered.contents)
        learned = [
            span
            for span, message in zip(
                rendered.replies, assistant_messages(conversation), strict=True
            )
            if message.get("train", True)
        ]
        targets = [
            any(start < span.stop and stop > span.start for span in learned)
            for start, stop in encoding.offsets
        ]
        return list(encoding.ids), targets

    def locate(self, conversation: Conversation) -> Rendered:
        """Renders a conversation that ends with a reply, and finds the messages in its text.

        Raises:
            UnusableExampleError: They cannot be found, or a reply has no token that ends it.
        """
        self._refuse_special_tokens(conversation)
        text = self._renderer.render(conversation)
        layout = self._renderer.layout(conversation)
        places = find_pieces(layout, conversation, text)
        if self._renderer.marks_replies:
            return Rendered(text, places, self._generation_marks(conversation, text))
        owners = piece_owners(conversation)
        replies: list[Span] = []
        position = 0  # where the message before ends
        for index, message in enumerate(conversation.messages):
            own = [i for i, piece in enumerate(layout.order) if owners[piece] == index]
            if message["role"] == "assistant":
                header = self._header(conversation, index)
                reply = _Reply(index + 1, message, own, position, header)
                replies.append(self._find_reply(reply, text, layout, places))
                position = replies[-1].stop
            elif own:
                position = places[own[-1]].stop
        return Rendered(text, places, replies)

    def _refuse_special_tokens(self, conversation: Conversation) -> None:
        """Raises UnusableExampleError if a call or a tool has the spelling of a special token.

        Templates write them as JSON. Where their strings are in the rendered text is not known, so
        that such a string would be encoded as the token itself.
        """
        if not conversation.tools and not any("tool_calls" in m for m in conversation.messages):
            return
        given = [m.get("tool_calls") for m in conversation.messages]
        text = json.dumps([given, conversation.tools], ensure_ascii=False)
        match = self._encoder.special.search(text)
        if match is not None:
            raise UnusableExampleError(
                f"tool_calls or tools contain {match[0]!r}, which is a special token of the "
                "tokenizer: expected other text there"
            )

    def end_tokens(self) -> list[int]:
        """Returns the ids of the tokens with which the template ends the last reply.

        Raises:
            InputError: The template ends it without a token, so that a model would never stop.
        """
        try:
            last = self._ends.last
        except UnusableExampleError as e:
            raise InputError(str(e)) from None
        return [self._encoder.id_of(last)]

    @functools.cached_property
    def _ends(self) -> _Ends:
        """The tokens, as text, that end replies: the last one, and those that others follow.

        Some templates (of gpt-oss) end those differently; others do not end them at all.
        """
        try:
            _, after_user, between, _, after_last = self._probe(2)
            other = self._end_in(between)
        except UnusableExampleError:  # the template may be for a single exchange
            (_, after_user, after_last), other = self._probe(1), None
        last = self._end_in(after_last)
        if last is None:
            raise InputError(_NO_END)
        # What is only at the start of the next message does not end this one.
        user_end = self._encoder.end.search(after_user)
        if other is None or user_end is None or user_end[0] != other:
            other = last
        return _Ends(last, any_of([last, other]))

    def _probe(self, exchanges: int) -> list[str]:
        """Returns the template's texts around the messages of some exchanges."""
        roles = ("user", "assistant") * exchanges
        messages = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
        return self._renderer.layout(Conversation(messages)).fixed

    def _end_in(self, gap: str) -> str | None:
        """Returns the token that ends a reply, in the template's text after it, or None.

        It is the tokenizer's EOS if only special tokens come before it, else the first token.
        """
        tokens = list(self._encoder.end.finditer(gap))
        for match in tokens:
            if self._encoder.end.sub("", gap[: match.start()]).strip():
                break
            if match[0] == self._renderer.special_tokens.get("eos_token"):
                return match[0]
        return tokens[0][0] if tokens else None

    def _find_reply(self, reply: _Reply, text: str, layout: Layout, places: Sequence[Span]) -> Span:
        """Returns where a reply is.

        It starts where the model starts to generate, so that it includes what the template writes
        before the reply's text, such as an empty <think> block; and ends with the first token that
        can end a text.
        """
        if reply.own:
            opening = layout.fixed[reply.own[0]]
            start = places[reply.own[0]].start - len(_after_header(opening, reply.header))
            stop = places[reply.own[-1]].stop
            following = reply.own[-1] + 1
        elif reply.message.get("tool_calls"):
            found = text.find(reply.header, reply.position) if reply.header else -1
            if found < 0:
                raise UnusableExampleError(f"message {reply.number} (tool_calls) is not found")
            start = stop = found + len(reply.header)
            following = next(
                (i for i, place in enumerate(places) if place.start >= start), len(places)
            )
        else:
            raise UnusableExampleError(
                f"the chat template leaves out message {reply.number}, a reply"
            )
        limit = places[following].start if following < len(places) else len(text)
        for call in reply.message.get("tool_calls", ()):
            name = call.get("function", call).get("name", "")
            stop = text.find(name, stop, limit) + len(name)
            if stop < len(name):
                raise UnusableExampleError(
                    f"message {reply.number}: the chat template does not write the call of "
                    f"{name!r} (tool_calls)"
                )
        end = self._ends.pattern.search(text, stop, limit)
        if end is not None:
            return Span(start, end.end())
        if limit == len(text) or reply.message.get("tool_calls"):
            raise UnusableExampleError(_NO_END)
        return Span(start, stop)

    def _header(self, conversation: Conversation, index: int) -> str:
        """Returns what the template writes to ask for a reply at this place."""
        roles = tuple(m["role"] for m in conversation.messages[:index])
        return self._renderer.header_after(roles)

    def _generation_marks(self, conversation: Conversation, text: str) -> list[Span]:
        """Returns what the template itself marks as generated, by `{% generation %}`."""
        spans = [Span(*mark) for mark in self._renderer.generation_marks(conversation)]
        if len(spans) != len(assistant_messages(conversation)):
            raise UnusableExampleError(
                "the chat template marks another number of replies ({% generation %}) than there "
                "are messages of the assistant"
            )
        # without the end as a target the model would never learn to stop
        if self._ends.last not in text[spans[-1].start : spans[-1].stop]:
            raise UnusableExampleError(
                "the chat template does not mark the token that ends a reply as generated "
                "({% generation %}), so that the model would never learn to stop"
            )
        return spans


class _Ends(NamedTuple):
    """The tokens that end replies.

    Attributes:
        last: The one after the last reply.
        pattern: Matches it and the one after a reply that others follow.
    """

    last: str
    pattern: re.Pattern[str]


class _Reply(NamedTuple):
    """A reply that is to be found in the rendered text.

    Attributes:
        number: The number of its message.
        message: The message.
        own: The indices of its pieces in the order of the layout.
        position: Where the message before it ends.
        header: What the template writes to ask for a reply.
    """

    number: int
    message: Message
    own: list[int]
    position: int
    header: str


_NO_END = (
    "the chat template ends a reply with no special token of the tokenizer, so that the model "
    "would never learn to stop: use a template that writes eos_token after a reply "
    "(tokenizer.chat_template)"
)


def reply_end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids with which a tokenizer's chat template ends a reply; [] without a template.

    A template that cannot be trained with, or without such a token, has none.
    """
    if not tokenizer.chat_template:
        return []
    try:
        return ChatTemplate(tokenizer).end_tokens()
    except InputError:
        return []


def assistant_messages(conversation: Conversation) -> list[Message]:
    """Returns the messages of the assistant."""
    return [m for m in conversation.messages if m["role"] == "assistant"]


def _after_header(opening: str, header: str) -> str:
    """Returns what follows the header of a reply in the text before it.

    Args:
        opening: The template's text between the message before the reply and the reply's text.
        header: What the template writes to ask for a reply; the opening may have a part of it.
    """
    for length in range(len(header), 0, -1):
        if length == len(header):
            position = opening.rfind(header)
            if position >= 0:
                return opening[position + length :]
        elif opening.endswith(header[:length]):
            return ""
    return ""
