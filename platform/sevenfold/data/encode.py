"""Tokenization of documents: the two tokenizer backends, and the encoder of plain text.

The backend `gigatoken` is fast, but does not support every tokenizer; the backend `tokenizers` is
the reference.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import tokenizers

from sevenfold.data.sources.documents import Documents, Skipped, buffers
from sevenfold.errors import InputError

if TYPE_CHECKING:
    # transformers imports torch: 250 MB and some seconds for each data task, which needs only
    # `tokenizers`
    from transformers import PreTrainedTokenizerBase

FAST, REFERENCE = "gigatoken", "tokenizers"


class _TokenLists(NamedTuple):
    """The token ids of several texts, concatenated: text i has ids[offsets[i] : offsets[i + 1]]."""

    offsets: np.ndarray  # int64 [texts + 1]
    ids: np.ndarray  # uint32 [total]

    def of_text(self, index: int) -> list[int]:
        """Returns the ids of one text."""
        ids: list[int] = self.ids[self.offsets[index] : self.offsets[index + 1]].tolist()
        return ids


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
        backend: FAST or REFERENCE.
        classes: The labels of a classification task. Used by `ClassEncoder` alone; all encoders
            take the same arguments.
        today: The date (ISO 8601) for chat templates that write it. Default: the current date.
            Used by the encoders of conversations alone.

    Raises:
        InputError: The tokenizer has no EOS token.

    Attributes:
        fields: The fields of a document that the encoder reads.
        backend: The backend. Both give the same ids (see `choose_backend`).
        vocab_size: All ids are below it.
        head: The id before each document's own ids, or None.
        tail: The id after them, or None.
    """

    fields: tuple[str, ...] = ("text",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        backend: str = REFERENCE,
        classes: Sequence[str] = (),
        today: str | None = None,
    ):
        self._max_tokens = sequence_length
        end = eos_id(tokenizer)
        # encoder models have CLS in the place of BOS
        begin = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if end is None:
            raise InputError(
                "the tokenizer has no end-of-text token (eos_token or sep_token), which is needed "
                "to separate documents"
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

    def _tokenize(self, strings: pa.Array) -> _TokenLists:
        return _tokenize_function(self._serialized, self.backend)(strings)

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


def choose_backend(tokenizer: PreTrainedTokenizerBase, sample: Sequence[str]) -> tuple[str, str]:
    """Chooses the backend: the fast one only if it gives the same ids as the reference.

    Both backends encode the sample, characters of all of Unicode, and texts that contain the
    special tokens' spellings.

    Args:
        tokenizer: The tokenizer.
        sample: Texts of the data that will be encoded.

    Returns:
        The backend, and a sentence for the user that gives the reason.
    """
    serialized = tokenizer.backend_tokenizer.to_str()
    try:
        version = importlib.metadata.version(FAST)
        fast = _tokenize_function(serialized, FAST)
        special = (f"a {token} b{token}" for token in tokenizer.all_special_tokens)
        texts = [*sample, *_unicode_texts(), *special]
        strings = pa.array(texts, pa.large_string())
        tokens = fast(strings)
    except BaseException as e:  # a panic in gigatoken's Rust code is not an Exception
        if isinstance(e, KeyboardInterrupt | SystemExit):
            raise
        return (
            REFERENCE,
            f"{FAST} does not support this tokenizer ({type(e).__name__}: {str(e)[:80]}): "
            f"encoding with {REFERENCE}, which is slower",
        )
    different = _first_difference(_tokenize_function(serialized, REFERENCE)(strings), tokens)
    if different is not None:
        return (
            REFERENCE,
            f"{FAST} {version} and {REFERENCE} give different ids for {texts[different][:40]!r}: "
            f"encoding with {REFERENCE}, which is slower",
        )
    return (
        FAST,
        f"encoding with {FAST} {version}: the same ids as {REFERENCE} on {len(tokens.ids):,} "
        "tokens",
    )


def _first_difference(expected: _TokenLists, actual: _TokenLists) -> int | None:
    """Returns the index of the first text whose ids differ, or None."""
    if np.array_equal(expected.offsets, actual.offsets) and np.array_equal(
        expected.ids, actual.ids
    ):
        return None
    texts = range(len(expected.offsets) - 1)
    return next(i for i in texts if actual.of_text(i) != expected.of_text(i))


def _unicode_texts() -> list[str]:
    """Returns texts with the assigned characters of Unicode, between letters and doubled.

    Of the large uniform blocks from U+3400 on (Chinese, Korean and others), one character in 16 is
    taken.
    """
    texts = []
    for first in range(0, sys.maxunicode + 1, 64):
        points = range(first, first + 64, 16 if first >= 0x3400 else 1)
        # Cn: unassigned, Cs: surrogate, Co: private use
        assigned = [
            chr(p) for p in points if unicodedata.category(chr(p)) not in ("Cn", "Cs", "Co")
        ]
        if assigned:
            texts += ["".join(assigned), " ".join(f"a{c}b{c}{c}1" for c in assigned)]
    return texts


@functools.lru_cache(maxsize=4)
def _tokenize_function(serialized: str, backend: str) -> Callable[[pa.Array], _TokenLists]:
    """Returns the backend's function.

    It is built once per process: parsing a vocabulary of 128k takes half a second.
    """
    return _fast(serialized) if backend == FAST else _reference(serialized)


def _reference(serialized: str) -> Callable[[pa.Array], _TokenLists]:
    backend = tokenizers.Tokenizer.from_str(serialized)
    backend.encode_special_tokens = True  # their spelling in a text is encoded as text
    backend.no_truncation()
    backend.no_padding()

    def tokenize(strings: pa.Array) -> _TokenLists:
        encodings = backend.encode_batch_fast(strings.to_pylist(), add_special_tokens=False)
        lists = [encoding.ids for encoding in encodings]
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        flat = (token for ids in lists for token in ids)
        return _TokenLists(offsets, np.fromiter(flat, np.uint32, int(offsets[-1])))

    return tokenize


def _fast(serialized: str) -> Callable[[pa.Array], _TokenLists]:
    import awkward
    import gigatoken
    from awkward.contents import ListOffsetArray, NumpyArray

    tree = json.loads(serialized)
    # without the special tokens, their spelling in a text is encoded as text
    tree["added_tokens"] = [t for t in tree["added_tokens"] if not t["special"]]
    tree["post_processor"] = None  # no BOS and EOS
    backend = gigatoken.Tokenizer.from_json(json.dumps(tree))

    def tokenize(strings: pa.Array) -> _TokenLists:
        if not len(strings):
            return _TokenLists(np.zeros(1, np.int64), np.zeros(0, np.uint32))
        # gigatoken takes and returns awkward arrays; the bytes of the strings are not copied
        offsets, data = buffers(strings)
        characters = NumpyArray(np.frombuffer(data, np.uint8), parameters={"__array__": "char"})
        lists = ListOffsetArray(
            awkward.index.Index64(offsets), characters, parameters={"__array__": "string"}
        )
        tokens: Any = awkward.to_layout(
            awkward.to_packed(backend.encode_batch(awkward.Array(lists), parallel=False))
        )
        return _TokenLists(
            np.asarray(tokens.offsets.data, np.int64), np.asarray(tokens.content.data)
        )

    return tokenize
