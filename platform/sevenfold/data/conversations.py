"""Tokenization of conversations, of pairs of prompt and completion, and of preferences."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers

from sevenfold.data.encode import REFERENCE
from sevenfold.data.example_encoder import Example, ExampleEncoder, prompt_and_reply, short_hash
from sevenfold.data.sources import formats
from sevenfold.data.sources.formats import Turns
from sevenfold.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The chat template of `tokenizer.chat_template: plain`. It has no special tokens that the model
# would have to learn first.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] }}: "
    "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '' }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class _Part(NamedTuple):
    """The tokens of a conversation up to a reply, or those of the reply."""

    ids: list[int]
    is_reply: bool


class ConversationEncoder(ExampleEncoder):
    """Encodes conversations with the tokenizer's chat template.

    Pairs of prompt and completion are encoded as BOS prompt completion EOS, without the template.

    The targets are the assistant's messages, each with what the template puts at its end; of a
    pair, completion and EOS.

    A conversation that is too long loses its oldest exchanges, then the middle of its last prompt,
    so that the whole last reply stays; only a reply that is longer than a row is cut. Prompts and
    replies are tokenized separately, as they are when the model generates a reply.
    """

    fields: tuple[str, ...] = ("conversation",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        backend: str = REFERENCE,
        classes: Sequence[str] = (),
    ):
        super().__init__(tokenizer, sequence_length, backend)
        self._template = (
            tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        )
        self._special_tokens = {
            name: str(token)
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        }

    def identity(self) -> str:
        """Returns the hash of `TextEncoder.identity`, extended by one of the chat template."""
        base = super().identity()
        return base if self._template is None else f"{base}-{short_hash(self._template)}"

    def prompt(self, text: str, room: int) -> list[int]:
        """Returns the ids after which the model generates a conversation's last reply.

        Of a pair, these are the ids after which it generates the completion.

        Args:
            text: A conversation, as in the field of a document. Its last reply is left out.
            room: The maximum number of ids.
        """
        *turns, _ = formats.load_conversation(text)
        if _is_pair(turns):
            return self._shorten([*self.begin, *self.ids([turns[0][1]])[0]], room)
        while len(ids := self.question(turns)) > room and len(turns) - _system_turns(turns) > 1:
            turns = _without_oldest_exchange(turns)
        return self._shorten(ids, room)

    def question(self, turns: Turns) -> list[int]:
        """Returns the ids of a conversation that the model is to reply to.

        They are the ids that training would use, unless the template does not allow to render a
        conversation turn by turn.
        """
        try:
            return [token for part in self._parts(turns) for token in part.ids]
        except _UnstablePrefixError:
            return self._special_ids(self._render(turns, add_generation_prompt=True))

    @staticmethod
    def prompts(columns: list[list[str]]) -> list[tuple[str, str, str]]:
        """Returns (input of `prompt`, prompt as readable text, reference reply) per document.

        Args:
            columns: For each of `fields`, the texts of all documents.
        """
        conversations = [(text, formats.load_conversation(text)) for text in columns[0]]
        return [(text, turns[-2][1], turns[-1][1]) for text, turns in conversations]

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        return [
            self._conversation(formats.load_conversation(text), self._max_tokens)
            for text in columns[0]
        ]

    def _conversation(self, turns: Turns, max_tokens: int) -> Example:
        if _is_pair(turns):
            prompt, completion = self.ids([text for _, text in turns])
            return self._fitted([*self.begin, *prompt], [*completion, self._eos], max_tokens)
        total_turns = len(turns)
        while True:
            parts = self._parts(turns)
            length = sum(len(part.ids) for part in parts)
            if length <= max_tokens or len(turns) - _system_turns(turns) <= 2:
                break
            turns = _without_oldest_exchange(turns)
        if length > max_tokens:  # a single exchange is left
            return self._fitted(parts[0].ids, parts[1].ids, max_tokens)
        return Example(
            [token for part in parts for token in part.ids],
            [part.is_reply for part in parts for _ in part.ids],
            len(turns) < total_turns,
        )

    def _fitted(self, prompt: list[int], reply: list[int], max_tokens: int) -> Example:
        kept_reply = reply[: max_tokens - 1]
        kept_prompt = self._shorten(prompt, max_tokens - len(kept_reply))
        cut = len(kept_prompt) + len(kept_reply) < len(prompt) + len(reply)
        return prompt_and_reply(kept_prompt, kept_reply, cut)

    def _parts(self, turns: Turns) -> list[_Part]:
        """Returns prompts and replies in turn, each tokenized separately.

        The last prompt may have no reply.
        """
        parts: list[_Part] = []
        rendered = ""
        for i, (role, _) in enumerate([*turns, ("", "")]):
            is_reply = role == "assistant"
            is_open_end = i == len(turns) and turns[-1][0] != "assistant"
            # the new part of the text is what follows the text rendered so far
            if is_reply or is_open_end:
                text = self._render(turns[:i], add_generation_prompt=True)
                parts.append(_Part(self._special_ids(_after(rendered, text)), False))
                rendered = text
            if is_reply:
                text = self._render(turns[: i + 1], add_generation_prompt=False)
                parts.append(_Part(self._special_ids(_after(rendered, text)), True))
                rendered = text
        return parts

    def _render(self, turns: Turns, add_generation_prompt: bool) -> str:
        if self._template is None:
            raise InputError(
                "conversations need a chat template, and the tokenizer has none: set "
                "tokenizer.chat_template (`plain` or a file), or use data with the columns prompt "
                "and completion"
            )
        # imported here because it imports torch, which other encoders do without
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": role, "content": content} for role, content in turns]
        special: dict[str, Any] = self._special_tokens
        try:
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                **special,
            )
        except TemplateError as e:
            start = json.dumps(messages[0], ensure_ascii=False)[:80]
            raise InputError(
                f"the tokenizer's chat template rejects the conversation that begins {start}: {e}"
            ) from None
        return str(rendered[0][0])

    def _special_ids(self, text: str) -> list[int]:
        """Returns ids of a text in which special tokens are written out, as templates do."""
        return list(_special_tokenizer(self._serialized).encode(text, add_special_tokens=False).ids)


class PreferenceEncoder(ConversationEncoder):
    """Encodes preferences, as two conversations (or two pairs) one after the other.

    The first consists of prompt and chosen answer, the second of prompt and rejected answer. Both
    answers are targets. Each of the two has at most half a row.
    """

    fields = ("prompt", "chosen", "rejected")

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        examples = []
        for prompt, *answers in zip(*columns, strict=True):
            turns = formats.load_conversation(prompt)
            role = "" if _is_pair(turns) else "assistant"
            chosen, rejected = (
                self._conversation([*turns, (role, answer)], self._max_tokens // 2)
                for answer in answers
            )
            examples.append(
                Example(
                    chosen.ids + rejected.ids,
                    _last_run(chosen.targets) + _last_run(rejected.targets),
                    chosen.cut or rejected.cut,
                )
            )
        return examples


class _UnstablePrefixError(InputError):
    """The template renders the beginning of a conversation differently if more messages follow."""


def _after(rendered: str, text: str) -> str:
    """Returns what follows `rendered` in `text`."""
    if not text.startswith(rendered):
        raise _UnstablePrefixError(
            "the tokenizer's chat template renders the beginning of a conversation differently if "
            "more messages follow, so that the assistant's tokens cannot be located: use another "
            "template (tokenizer.chat_template)"
        )
    return text[len(rendered) :]


def _is_pair(turns: Turns) -> bool:
    """Returns whether these are a prompt and its completion. They have no roles."""
    return not turns[0][0]


def _system_turns(turns: Turns) -> int:
    """Returns the number of system messages at the beginning: 0 or 1."""
    return 1 if turns[0][0] == "system" else 0


def _without_oldest_exchange(turns: Turns) -> Turns:
    """Returns a conversation without its first user message and the reply to it.

    The system message stays.
    """
    first = _system_turns(turns)
    return turns[:first] + turns[first + 2 :]


def _last_run(targets: list[bool]) -> list[bool]:
    """Sets all targets to False but the last run of True.

    Earlier replies belong to the prompt of a preference.
    """
    begin = len(targets) - 1
    while begin and targets[begin - 1]:
        begin -= 1
    return [False] * begin + [True] * (len(targets) - begin)


@functools.lru_cache(maxsize=4)
def _special_tokenizer(serialized: str) -> Any:
    """Returns a tokenizer that encodes the spelling of a special token as that token."""
    backend = tokenizers.Tokenizer.from_str(serialized)
    backend.no_truncation()
    backend.no_padding()
    return backend
