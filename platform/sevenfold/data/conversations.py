"""Tokenization of conversations, of pairs of prompt and completion, and of preferences."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sevenfold.data.backends import REFERENCE, Backend
from sevenfold.data.chat_renderer import no_template_error
from sevenfold.data.chat_template import ChatTemplate
from sevenfold.data.example_encoder import Example, ExampleEncoder, prompt_and_reply, short_hash
from sevenfold.data.sources.documents import UnusableExampleError
from sevenfold.data.sources.messages import Conversation, Message
from sevenfold.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ConversationEncoder(ExampleEncoder):
    """Encodes conversations with the tokenizer's chat template.

    Pairs of prompt and completion are encoded as BOS prompt completion EOS, without the template.

    The targets are the assistant's messages, each with the token that ends it; of a pair,
    completion and EOS.

    A conversation that is too long loses its oldest exchanges, then the middle of its last prompt,
    so that the whole last reply stays; only a reply that is longer than a row is cut.
    """

    fields: tuple[str, ...] = ("conversation",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        backend: Backend = REFERENCE,
        classes: Sequence[str] = (),
        today: str | None = None,
    ):
        super().__init__(tokenizer, sequence_length, backend, classes, today)
        self._template = (
            ChatTemplate(tokenizer, today, self._serialized) if tokenizer.chat_template else None
        )

    def identity(self) -> str:
        """Returns the hash of `TextEncoder.identity`, extended by one of the chat template."""
        base = super().identity()
        return base if self._template is None else f"{base}-{short_hash(self._template.identity())}"

    def prompt(self, text: str, room: int) -> list[int]:
        """Returns the ids after which the model generates a conversation's last reply.

        Of a pair, these are the ids after which it generates the completion.

        Args:
            text: A conversation, as in the field of a document. Its last reply is left out.
            room: The maximum number of ids.
        """
        conversation = Conversation.load(text)
        asked = conversation.with_messages(conversation.messages[:-1])
        if conversation.is_pair:
            return self._shorten([*self.begin, *self.ids([asked.messages[0]["content"]])[0]], room)
        while len(ids := self.question(asked)) > room:
            shorter = asked.without_oldest_exchange()
            if shorter is None:
                break
            asked = shorter
        return self._shorten(ids, room)

    def question(self, conversation: Conversation) -> list[int]:
        """Returns the ids of a conversation that the model is to reply to.

        Raises:
            InputError: The template rejects the conversation.
        """
        try:
            return self.template.ids(conversation, add_generation_prompt=True)
        except UnusableExampleError as e:
            raise InputError(str(e)) from None

    @property
    def template(self) -> ChatTemplate:
        """The chat template. Raises InputError if the tokenizer has none."""
        if self._template is None:
            raise no_template_error()
        return self._template

    @staticmethod
    def prompts(columns: list[list[str]]) -> list[tuple[str, str, str]]:
        """Returns (input of `prompt`, prompt as readable text, reference reply) per document.

        Args:
            columns: For each of `fields`, the texts of all documents.
        """
        conversations = [(text, Conversation.load(text).messages) for text in columns[0]]
        return [
            (text, messages[-2]["content"], messages[-1]["content"])
            for text, messages in conversations
        ]

    def _examples(self, columns: list[list[str]]) -> list[Example | UnusableExampleError]:
        results: list[Example | UnusableExampleError] = []
        for texts in zip(*columns, strict=True):
            try:
                results.append(self._example(*texts))
            except UnusableExampleError as e:
                results.append(e)
        return results

    def _example(self, *fields: str) -> Example:
        """Returns the example of one document, given the texts of its `fields`."""
        (text,) = fields
        return self._fitted(Conversation.load(text), self._max_tokens)

    def _fitted(self, conversation: Conversation, max_tokens: int) -> Example:
        """Returns the example of a conversation, shortened to a number of tokens."""
        kept: Conversation | None = conversation
        while kept is not None:
            ids, targets = self._ids_and_targets(kept)
            if len(ids) <= max_tokens and any(targets):
                return Example(ids, targets, kept is not conversation)
            kept = kept.without_oldest_exchange()
        # a single exchange is left: its reply begins with the first target
        if True not in targets:
            raise UnusableExampleError("the last reply is excluded from training, the rest is cut")
        begin = targets.index(True)
        prompt, reply = ids[:begin], ids[begin:]
        kept_reply = reply[: max_tokens - 1]
        kept_prompt = self._shorten(prompt, max_tokens - len(kept_reply))
        return Example(
            kept_prompt + kept_reply,
            [False] * len(kept_prompt) + targets[begin:][: len(kept_reply)],
            True,
        )

    def _ids_and_targets(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        if not conversation.is_pair:
            return self.template.ids_and_targets(conversation)
        prompt, completion = (m["content"] for m in conversation.messages)
        prompt_ids = [*self.begin, *self.ids([prompt])[0]]
        reply_ids = [*self._continuation(completion), self._eos]
        return prompt_ids + reply_ids, [False] * len(prompt_ids) + [True] * len(reply_ids)

    def _continuation(self, text: str) -> list[int]:
        """Returns the ids of a text that follows another one.

        Tokenizers like Llama 2's put a space before a text, which must not come between a prompt
        and its completion.
        """
        anchored, anchor, alone = self.ids([f"\n{text}", "\n", text])
        has_anchor = len(anchor) > 0 and anchored[: len(anchor)] == anchor
        return anchored[len(anchor) :] if has_anchor and self._prefixes_space else alone

    @functools.cached_property
    def _prefixes_space(self) -> bool:
        """Whether a text has other ids at the beginning than behind a line break."""
        anchored, anchor, alone = self.ids(["\na", "\n", "a"])
        return anchored[: len(anchor)] == anchor and anchored[len(anchor) :] != alone


class PreferenceEncoder(ConversationEncoder):
    """Encodes preferences, as two conversations (or two pairs) one after the other.

    The first consists of prompt and chosen answer, the second of prompt and rejected answer. Both
    answers are targets. Each of the two has at most half a row, and both have the same prompt: it
    is shortened so that the longer answer fits.
    """

    fields = ("prompt", "chosen", "rejected")

    def _example(self, *fields: str) -> Example:
        text, *answers = fields
        prompt = Conversation.load(text)
        role, room = "" if prompt.is_pair else "assistant", self._max_tokens // 2
        kept: Conversation | None = prompt
        while kept is not None:
            halves = [
                self._prompt_and_answer(kept, {"role": role, "content": answer})
                for answer in answers
            ]
            if all(len(before) + len(answer) <= room for before, answer in halves):
                break
            kept = kept.without_oldest_exchange()
        replies = [answer[: room - 1] for _, answer in halves]
        # the tokens before the answers may differ where an answer's text begins within a token
        prompt_room = room - max(map(len, replies))
        prompts = [self._shorten(before, prompt_room) for before, _ in halves]
        cut = kept is not prompt or any(
            len(before) + len(answer) < len(half[0]) + len(half[1])
            for before, answer, half in zip(prompts, replies, halves, strict=True)
        )
        chosen, rejected = map(prompt_and_reply, prompts, replies, (cut, cut))
        return Example(chosen.ids + rejected.ids, chosen.targets + rejected.targets, cut)

    def _prompt_and_answer(
        self, prompt: Conversation, answer: Message
    ) -> tuple[list[int], list[int]]:
        """Returns the ids of the prompt, and those of the answer, which is the last reply."""
        ids, targets = self._ids_and_targets(prompt.with_messages([*prompt.messages, answer]))
        begin = stop = len(targets) - targets[::-1].index(True)
        while begin and targets[begin - 1]:
            begin -= 1
        return ids[:begin], ids[begin:stop]
