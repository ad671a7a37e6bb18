"""Tokenization of fine-tuning data, and the encoder of each objective.

An example is one document of the stream and is never split over two rows. Its targets mark the
part that the model learns to predict. An objective also uses them to find the parts of an example
(such as prompt and answer) in the rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sevenfold.data.backends import REFERENCE, Backend
from sevenfold.data.conversations import ConversationEncoder, PreferenceEncoder
from sevenfold.data.encode import TextEncoder
from sevenfold.data.example_encoder import Example, ExampleEncoder, prompt_and_reply, short_hash
from sevenfold.data.pair_frames import Frame, PairFrames
from sevenfold.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sevenfold.data.stream import Stream

__all__ = [
    "ENCODERS",
    "ClassEncoder",
    "ConversationEncoder",
    "ExampleEncoder",
    "PairEncoder",
    "PreferenceEncoder",
    "RetrievalEncoder",
    "first_pairs",
]


class ClassEncoder(ExampleEncoder):
    """Encodes BOS text EOS, then the index of the text's class as the one target.

    A long text is cut at its end.
    """

    fields = ("text", "label")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        backend: Backend = REFERENCE,
        classes: Sequence[str] = (),
        today: str | None = None,
    ):
        super().__init__(tokenizer, sequence_length, backend, classes, today)
        self.classes = list(classes)
        if len(self.classes) > self.vocab_size:  # the class is stored as if it was a token
            raise InputError(
                f"classify: expected at most {self.vocab_size} classes (the tokenizer's vocabulary "
                f"size), found {len(self.classes)}"
            )

    def identity(self) -> str:
        """Returns the hash of `TextEncoder.identity`, extended by one of the classes."""
        return f"{super().identity()}-{short_hash(chr(0).join(self.classes))}"

    def framed(self, ids: list[int]) -> list[int]:
        """Returns the ids of a text between BOS and EOS, cut to fit into a row with the class."""
        return [*self.begin, *ids[: self._max_tokens - len(self.begin) - 2], self._eos]

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        examples = []
        for ids, label in zip(self.ids(columns[0]), columns[1], strict=True):
            body = self.framed(ids)
            cut = len(body) < len(self.begin) + len(ids) + 1
            examples.append(prompt_and_reply(body, [self.classes.index(label)], cut))
        return examples


class PairEncoder(ExampleEncoder):
    """Encodes source and target for an encoder-decoder, each in a frame of special tokens.

    The model learns to predict the target and its frame.

    A source is cut at its end to leave room for the target. A target is cut only if it is longer
    than half a row, and longer than what the source leaves.

    Attributes:
        frames: The frames.
    """

    fields = ("source", "target")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        backend: Backend = REFERENCE,
        classes: Sequence[str] = (),
        today: str | None = None,
        frames: PairFrames | None = None,
    ):
        super().__init__(tokenizer, sequence_length, backend, classes, today)
        self._given_frames = frames
        default = PairFrames(Frame(tuple(self.begin), (self._eos,)), Frame((), (self._eos,)))
        self.frames = frames or default

    def identity(self) -> str:
        """Returns a hash of all that determines the ids; see `TextEncoder.identity`."""
        own = super().identity()
        if self._given_frames is None:
            return own
        return short_hash(own + json.dumps(self.frames.to_json()))

    def prompt(self, text: str, room: int) -> list[int]:
        """Returns what the encoder reads: the text in the source's frame, at most `room` ids."""
        return self.frames.source.around(self.ids([text])[0], room)

    @staticmethod
    def prompts(columns: list[list[str]]) -> list[tuple[str, str, str]]:
        """Returns the same as `ConversationEncoder.prompts`."""
        return [(source, source, target) for source, target in zip(*columns, strict=True)]

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        examples = []
        frame = len(self.frames.source)
        for source, target in zip(*(self.ids(column) for column in columns), strict=True):
            max_target = max(self._max_tokens // 2, self._max_tokens - frame - len(source))
            whole_target = self.frames.target.around(target)
            kept_target = whole_target[:max_target]
            prompt = self.frames.source.around(source, self._max_tokens - len(kept_target))
            cut = len(prompt) + len(kept_target) < frame + len(source) + len(whole_target)
            examples.append(prompt_and_reply(prompt, kept_target, cut))
        return examples


class RetrievalEncoder(ExampleEncoder):
    """Encodes BOS query EOS BOS document EOS.

    The document is marked as targets, so that an objective can tell it from the query.
    The query has at most half a row, the document the rest.
    """

    fields = ("query", "document")

    def _examples(self, columns: list[list[str]]) -> list[Example]:
        examples = []
        frame = len(self.begin) + 1  # BOS and EOS
        for query, document in zip(*(self.ids(column) for column in columns), strict=True):
            kept_query = [*self.begin, *query[: self._max_tokens // 2 - frame], self._eos]
            max_document = self._max_tokens - len(kept_query) - frame
            kept_document = [*self.begin, *document[:max_document], self._eos]
            cut = len(kept_query) + len(kept_document) < 2 * frame + len(query) + len(document)
            examples.append(prompt_and_reply(kept_query, kept_document, cut))
        return examples


# By objective. The name of a class is part of its identity(), and with it of a token cache's key.
ENCODERS: dict[str, type[TextEncoder]] = {
    "causal": TextEncoder,
    "masked": TextEncoder,
    "denoise": TextEncoder,
    "sft": ConversationEncoder,
    "dpo": PreferenceEncoder,
    "classify": ClassEncoder,
    "seq2seq": PairEncoder,
    "embed": RetrievalEncoder,
}


def first_pairs(
    stream: Stream, limit: int | None = None, shuffle: bool = False
) -> list[tuple[str, str, str]]:
    """Returns the prompts and the reference replies of the first documents of a stream.

    Args:
        stream: A stream of conversations or pairs.
        limit: The number of pairs. None: all of them.
        shuffle: Takes the documents in the stream's shuffled order; see `Stream.documents`.

    Returns:
        For each document the same as `ConversationEncoder.prompts`.
    """
    encoder = stream.encoder
    assert isinstance(encoder, ConversationEncoder | PairEncoder)
    pairs = (pair for columns in stream.documents(shuffle) for pair in encoder.prompts(columns))
    return list(itertools.islice(pairs, limit))
