"""Tokenization of documents: the encoder of plain text, the base of all encoders."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from sevenfold.data.backends import REFERENCE, Backend, TokenLists, tokenize_function
from sevenfold.data.sources.documents import Documents, Skipped
from sevenfold.errors import InputError

if TYPE_CHECKING:
    # transformers imports torch: 250 MB and some seconds for each data task, which needs only
    # `tokenizers`
    from transformers import PreTrainedTokenizerBase


@dataclass
class Encoded:
    """The token ids of the documents of a row group, concatenated.

    Attributes:
        ids: Unsigned [total], without the `head` and `tail` that the encoder adds to each document.
        offsets: int64 [documents + 1]; document i has ids[offsets[i] : offsets[i + 1]].
        targets: bool [total], True for tokens that the model learns to predict; None if it learns
            all of them.
        origin: int64 [documents], the index of each document in the row group before any was left
            out.
        skipped: The bad documents that were left out.
        cut: The number of documents that were too long and were shortened.
    """

    ids: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray | None
    origin: np.ndarray
    skipped: Skipped
    cut: int = 0


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the id of the EOS token, or None.

    Tokenizers of encoder models have no EOS; for them it is the id of SEP.
    """
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return None if end is None else int(end)


class TextEncoder:
    """Encodes plain documents as BOS text EOS. All tokens but the first one are targets.

    There is no BOS if the tokenizer has none. If a text contains the spelling of a special token,
    it is encoded as ordinary text.

    Args:
        tokenizer: The tokenizer.
        sequence_length: Tokens per row. The encoders of fine-tuning examples shorten an example to
            fit; plain documents are not shortened.
        backend: What encodes the texts; all backends give the same ids.
        classes: The labels of a classification task. Used by `ClassEncoder` alone; all encoders
            take the same arguments.
        today: The date (ISO 8601) for chat templates that write it. Default: the current date.
            Used by the encoders of conversations alone.

    Raises:
        InputError: The tokenizer has no EOS token.

    Attributes:
        fields: The fields of a document that the encoder reads.
        backend: The backend.
        vocab_size: All ids are below it.
        head: The id before each document's own ids, or None.
        tail: The id after them, or None.
    """

    fields: tuple[str, ...] = ("text",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        backend: Backend = REFERENCE,
        classes: Sequence[str] = (),
        today: str | None = None,
    ):
        self._max_tokens = sequence_length
        end = eos_id(tokenizer)
        # encoder models have CLS in the place of BOS
        begin = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if end is None:
            place = f" in {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
            raise InputError(
                f"the tokenizer{place} has no end-of-text token (eos_token or sep_token in "
                "tokenizer_config.json), which is needed to separate documents"
            )
        self._serialized = tokenizer.backend_tokenizer.to_str()
        self.backend = backend
        self.vocab_size = len(tokenizer)
        self._bos: int | None = None if begin is None else int(begin)
        self._eos = end
        self.head: int | None = self._bos
        self.tail: int | None = self._eos

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest type that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def identity(self) -> str:
        """Returns a hash of all that determines the ids.

        The backend is not a part of it, since all backends give the same ids.
        """
        settings = [
            type(self).__name__,
            self._serialized,
            self._bos,
            self._eos,
            # whole documents (which have a tail) do not depend on the row's length
            self._max_tokens if self.tail is None else None,
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, without BOS and EOS."""
        offsets, ids = self._tokenize(pa.array(texts, pa.large_string()))
        return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]

    def _tokenize(self, strings: pa.Array) -> TokenLists:
        return tokenize_function(self._serialized, self.backend)(strings)

    def encode(self, groups: Sequence[Documents]) -> list[Encoded]:
        """Encodes the documents of several row groups.

        One call encodes all of them, since each call of the backend has a fixed cost.
        """
        offsets, ids = self._tokenize(pa.concat_arrays([d.fields[0] for d in groups]))
        encoded, first = [], 0
        for documents in groups:
            bounds = offsets[first : first + len(documents.origin) + 1]
            encoded.append(
                Encoded(
                    ids[bounds[0] : bounds[-1]],
                    bounds - bounds[0],
                    None,
                    documents.origin,
                    documents.skipped,
                )
            )
            first += len(documents.origin)
        return encoded
