"""Rows of fine-tuning data to token ids. One example is one document of the stream, never cut in two: what is to be learnt
of it is marked by its targets, and by them an objective finds its parts again."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from sevenfold.data import formats
from sevenfold.data.documents import Documents, texts
from sevenfold.data.encode import REFERENCE, Encoded, TextEncoder
from sevenfold.data.formats import Turns
from sevenfold.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what `tokenizer.chat_template: plain` stands for: no token that the vocabulary would have to learn first
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
Example = tuple[list[int], list[bool], bool]  # ids, which are targets, whether targets were cut off


class ExampleEncoder(TextEncoder):
    """What all examples share."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, backend: str = REFERENCE, classes: Sequence[str] = ()
    ):
        super().__init__(tokenizer, sequence_length, backend)
        self.begin = [] if self._bos is None else [self._bos]
        self.head = self.tail = None

    def encode(self, groups: Sequence[Documents]) -> list[Encoded]:
        return [self._group(d) for d in groups]

    def _group(self, documents: Documents) -> Encoded:
        made = self._examples(texts(documents))
        offsets = np.cumsum([0, *(len(ids) for ids, _, _ in made)], dtype=np.int64)
        ids = np.fromiter((t for example, _, _ in made for t in example), np.uint32, int(offsets[-1]))
        targets = np.fromiter((m for _, mask, _ in made for m in mask), bool, int(offsets[-1]))
        return Encoded(ids, offsets, targets, documents.origin, documents.skipped, sum(cut for _, _, cut in made))

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        """One a document. columns: a list of texts a field."""
        raise NotImplementedError

    def _shorten(self, ids: list[int], room: int) -> list[int]:
        """Without the middle: what is asked often stands at the end."""
        if len(ids) <= room:
            return ids
        tail = room // 2
        return ids[: room - tail] + (ids[-tail:] if tail else [])


class ConversationEncoder(ExampleEncoder):
    """Conversations by the tokenizer's chat template, what the assistant says and the template's end of it alone targets; and
    pairs without a template: BOS prompt completion EOS.

    A conversation that leaves no room loses its oldest exchanges, then the middle of what is asked last, so that the whole
    reply stays; a reply longer than a row is cut. Each part is encoded by itself, as it is when a model is asked.
    """

    fields: tuple[str, ...] = ("conversation",)

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, backend: str = REFERENCE, classes: Sequence[str] = ()
    ):
        super().__init__(tokenizer, sequence_length, backend)
        self._template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        self._special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}

    def identity(self) -> str:
        plain = super().identity()
        return plain if self._template is None else f"{plain}-{_digest(self._template)}"

    def prompt(self, text: str, room: int) -> list[int]:
        """Ids, at most `room`, after which a model is to give the last reply of a conversation, or complete a prompt."""
        *turns, _ = formats.turns(text)
        if not turns[0][0]:
            return self._shorten([*self.begin, *self.ids([turns[0][1]])[0]], room)
        first = 1 if turns[0][0] == "system" else 0
        while len(ids := self.question(turns)) > room and len(turns) - first > 1:
            turns = turns[:first] + turns[first + 2 :]
        return self._shorten(ids, room)

    def question(self, turns: Turns) -> list[int]:
        """Ids of a conversation that a reply is to follow: those of its training, where the template allows of any."""
        try:
            return [t for part, _ in self._parts(turns) for t in part]
        except _UnsteadyError:
            return self._ids(self._render(turns, True))

    @staticmethod
    def asked(columns: list[list[str]]) -> list[tuple[str, str, str]]:
        """(what `prompt` takes, what a person is shown of it, the reply that is there) of each document."""
        said = [(text, formats.turns(text)) for text in columns[0]]
        return [(text, turns[-2][1], turns[-1][1]) for text, turns in said]

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        return [self._example(formats.turns(c)) for c in columns[0]]

    def _example(self, turns: Turns) -> Example:
        if not turns[0][0]:
            prompt, completion = (ids for ids in self.ids([t for _, t in turns]))
            return self._fitted([*self.begin, *prompt], [*completion, self._eos])
        first, whole = 1 if turns[0][0] == "system" else 0, len(turns)
        while True:
            parts = self._parts(turns)
            if sum(len(p) for p, _ in parts) <= self._room or len(turns) - first <= 2:
                break
            turns = turns[:first] + turns[first + 2 :]
        ids = [t for p, _ in parts for t in p]
        if len(ids) <= self._room:
            return ids, [learnt for p, learnt in parts for _ in p], len(turns) < whole
        return self._fitted(parts[0][0], parts[1][0])

    def _fitted(self, asked: list[int], answer: list[int]) -> Example:
        learnt = answer[: self._room - 1]
        given = self._shorten(asked, self._room - len(learnt))
        return given + learnt, [False] * len(given) + [True] * len(learnt), len(given) + len(learnt) < len(asked) + len(answer)

    def _parts(self, turns: Turns) -> list[tuple[list[int], bool]]:
        """What is asked and what is replied, in turns: (ids, whether they are targets). What is asked last may be without."""
        out: list[tuple[list[int], bool]] = []
        done = ""
        for i, (role, _) in enumerate([*turns, ("", "")]):
            if role == "assistant" or (i == len(turns) and turns[-1][0] != "assistant"):
                out.append((self._ids(_after(done, asked := self._render(turns[:i], True))), False))
                done = asked
            if role == "assistant":
                out.append((self._ids(_after(done, replied := self._render(turns[: i + 1], False))), True))
                done = replied
        return out

    def _render(self, turns: Turns, asks: bool) -> str:
        if self._template is None:
            raise InputError(
                "conversations need a chat template, and the tokenizer has none: give one (tokenizer.chat_template=plain, or a "
                "file), or prompt and completion columns"
            )
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template  # brings torch: only who needs it

        messages = [{"role": role, "content": content} for role, content in turns]
        special: dict[str, Any] = self._special
        try:
            made: Any = render_jinja_template([messages], chat_template=self._template, add_generation_prompt=asks, **special)
        except TemplateError as e:
            said = json.dumps(messages[0], ensure_ascii=False)[:80]
            raise InputError(f"the tokenizer's chat template refuses a conversation (it begins {said}): {e}") from None
        return str(made[0][0])

    def _ids(self, text: str) -> list[int]:
        """The spelling of a special token is that token here, since a template writes them so."""
        return list(_spelled(self._json).encode(text, add_special_tokens=False).ids)


class PreferenceEncoder(ConversationEncoder):
    """BOS prompt chosen EOS BOS prompt rejected EOS; both answers are targets. Each half has half a row."""

    fields = ("prompt", "chosen", "rejected")

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        whole, self._room = self._room, self._room // 2
        try:
            made = []
            for prompt, *answers in zip(*columns, strict=True):
                asked = formats.turns(prompt)
                role = "assistant" if asked[0][0] else ""
                (a, targets_a, cut_a), (b, targets_b, cut_b) = (self._example([*asked, (role, text)]) for text in answers)
                targets_a, targets_b = _last_run(targets_a), _last_run(targets_b)
                made.append((a + b, targets_a + targets_b, cut_a or cut_b))
            return made
        finally:
            self._room = whole


class ClassEncoder(ExampleEncoder):
    """A text framed as plain documents are, then the number of its class, the one target."""

    fields = ("text", "label")

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, backend: str = REFERENCE, classes: Sequence[str] = ()
    ):
        super().__init__(tokenizer, sequence_length, backend)
        self.classes = list(classes)
        if len(self.classes) > self.vocab_size:
            raise InputError(f"classify: {len(self.classes)} classes are more than the tokenizer's {self.vocab_size} tokens")

    def identity(self) -> str:
        return f"{super().identity()}-{_digest(chr(0).join(self.classes))}"

    def framed(self, ids: list[int]) -> list[int]:
        """What the model reads of a text."""
        return [*self.begin, *ids[: self._room - len(self.begin) - 2], self._eos]

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        made = []
        for ids, label in zip(self.ids(columns[0]), columns[1], strict=True):
            body = self.framed(ids)
            cut = len(body) < len(self.begin) + len(ids) + 1
            made.append(([*body, self.classes.index(label)], [False] * len(body) + [True], cut))
        return made


class PairEncoder(ExampleEncoder):
    """Source EOS target EOS, the target and its EOS targets: the encoder's and the decoder's side. BOS where there is one. A
    source that leaves no room is cut at its end; a target longer than half a row and than what the source leaves, too."""

    fields = ("source", "target")

    def prompt(self, text: str, room: int) -> list[int]:
        """What the encoder reads, at most `room` ids."""
        return [*self.begin, *self.ids([text])[0][: room - len(self.begin) - 1], self._eos]

    @staticmethod
    def asked(columns: list[list[str]]) -> list[tuple[str, str, str]]:
        """As ConversationEncoder's."""
        return [(source, source, target) for source, target in zip(*columns, strict=True)]

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        made = []
        for source, target in zip(*(self.ids(c) for c in columns), strict=True):
            most = max(self._room // 2, self._room - len(self.begin) - len(source) - 1)
            learnt = [*target, self._eos][:most]
            given = [*self.begin, *source[: self._room - len(learnt) - len(self.begin) - 1], self._eos]
            cut = len(given) + len(learnt) < len(self.begin) + len(source) + len(target) + 2
            made.append((given + learnt, [False] * len(given) + [True] * len(learnt), cut))
        return made


class RetrievalEncoder(ExampleEncoder):
    """Query, then document, each framed as plain documents are; the document's ids are marked as targets. A query has at most
    half a row, the document the rest."""

    fields = ("query", "document")

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        made = []
        frame = len(self.begin) + 1
        for query, document in zip(*(self.ids(c) for c in columns), strict=True):
            asked = [*self.begin, *query[: self._room // 2 - frame], self._eos]
            found = [*self.begin, *document[: self._room - len(asked) - frame], self._eos]
            cut = len(asked) + len(found) < 2 * frame + len(query) + len(document)
            made.append((asked + found, [False] * len(asked) + [True] * len(found), cut))
        return made


ENCODERS: dict[str, type[TextEncoder]] = {
    "causal": TextEncoder,
    "masked": TextEncoder,
    "denoise": TextEncoder,
    "sft": ConversationEncoder,
    "dpo": PreferenceEncoder,
    "classify": ClassEncoder,
    "seq2seq": PairEncoder,
    "embed": RetrievalEncoder,
}  # by objective


class _UnsteadyError(InputError):
    """A template that renders the beginning of a conversation otherwise than the whole."""


def _after(done: str, text: str) -> str:
    if not text.startswith(done):
        raise _UnsteadyError(
            "the tokenizer's chat template renders the beginning of a conversation otherwise than the whole: what the "
            "assistant says cannot be told apart; give another (tokenizer.chat_template)"
        )
    return text[len(done) :]


def _last_run(targets: list[bool]) -> list[bool]:
    """The last stretch of targets alone: earlier replies are part of what is asked."""
    begin = len(targets) - 1
    while begin and targets[begin - 1]:
        begin -= 1
    return [False] * begin + [True] * (len(targets) - begin)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@functools.lru_cache(maxsize=4)
def _spelled(serialized: str) -> Any:
    backend = tokenizers.Tokenizer.from_str(serialized)
    backend.no_truncation()
    backend.no_padding()
    return backend
