"""The base of the encoders of fine-tuning data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sevenfold.data.backends import REFERENCE, Backend
from sevenfold.data.encode import Encoded, TextEncoder
from sevenfold.data.sources.documents import Documents, UnusableExampleError, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """The tokens of one example."""

    ids: list[int]
    targets: list[bool]  # for each id, whether the model learns to predict it
    cut: bool  # whether tokens were left out because the example was too long


class ExampleEncoder(TextEncoder):
    """The base of the encoders of examples.

    They add BOS and EOS themselves, so that `head` and `tail` are None.

    Attributes:
        begin: The ids with which an example begins: BOS, or none if the tokenizer has no BOS.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        backend: Backend = REFERENCE,
        classes: Sequence[str] = (),
        today: str | None = None,
    ):
        super().__init__(tokenizer, sequence_length, backend, classes, today)
        self.begin = [] if self._bos is None else [self._bos]
        self.head = self.tail = None

    def encode(self, groups: Sequence[Documents]) -> list[Encoded]:
        """Encodes the examples of each row group.

        Raises:
            BadDocumentsError: A document cannot be encoded, and is not to be skipped.
        """
        return [self._encode_group(documents) for documents in groups]

    def _encode_group(self, documents: Documents) -> Encoded:
        results = self._examples(texts(documents))
        bad = [(i, str(r)) for i, r in enumerate(results) if isinstance(r, UnusableExampleError)]
        skipped = documents.reject(bad)
        examples = [r for r in results if not isinstance(r, UnusableExampleError)]
        offsets = np.cumsum([0, *(len(e.ids) for e in examples)], dtype=np.int64)
        total = int(offsets[-1])
        return Encoded(
            np.fromiter((i for e in examples for i in e.ids), np.uint32, total),
            offsets,
            np.fromiter((t for e in examples for t in e.targets), bool, total),
            np.delete(documents.origin, [i for i, _ in bad]),
            skipped,
            sum(e.cut for e in examples),
        )

    def _examples(self, columns: list[list[str]]) -> Sequence[Example | UnusableExampleError]:
        """Returns one example per document, or the reason why it cannot be encoded.

        Args:
            columns: For each of `fields`, the texts of all documents.
        """
        raise NotImplementedError

    def _shorten(self, ids: list[int], max_tokens: int) -> list[int]:
        """Removes the middle of a prompt that is too long: its question is often at the end."""
        if len(ids) <= max_tokens:
            return ids
        tail = max_tokens // 2
        return ids[: max_tokens - tail] + (ids[-tail:] if tail else [])


def prompt_and_reply(prompt: list[int], reply: list[int], cut: bool) -> Example:
    """Returns an example whose targets are the reply."""
    return Example(prompt + reply, [False] * len(prompt) + [True] * len(reply), cut)


def short_hash(text: str) -> str:
    """Returns the first 8 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
