"""Documents to token ids: the fast encoder and its fall-back, and plain documents."""

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
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tokenizers

from sevenfold.data.documents import Documents, Skipped, buffers
from sevenfold.errors import InputError

if TYPE_CHECKING:  # transformers brings torch: 250 MB and seconds for each data task, which needs only `tokenizers`
    from transformers import PreTrainedTokenizerBase

FAST, REFERENCE = "gigatoken", "tokenizers"
Flat = tuple[np.ndarray, np.ndarray]  # offsets int64 [documents + 1], ids uint32 [total]


@dataclass
class Encoded:
    """The documents of a row group as ids, end to end.

    Attributes:
        ids: unsigned [total], without what the encoder's `head` and `tail` add to each document.
        offsets: int64 [documents + 1].
        targets: bool [total], whether an id is to be predicted; None where all are.
        origin: int64 [documents], each one's number within the row group.
        cut: documents that lost target tokens since they were too long.
    """

    ids: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray | None
    origin: np.ndarray
    skipped: Skipped
    cut: int = 0


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Its eos token, or what encoders have in its place (sep)."""
    found = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return None if found is None else int(found)


class TextEncoder:
    """Plain documents: BOS text EOS, every token but the first a target.

    The spelling of a special token in the text stays text. Raises InputError where the tokenizer has no EOS token.

    Attributes:
        backend: who encodes; both give the same ids (see `admit`).
        head, tail: ids that each document begins and ends with, beside its own.
        vocab_size: ids are below it.
    """

    fields: tuple[str, ...] = ("text",)

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, backend: str = REFERENCE, classes: Sequence[str] = ()
    ):
        self._room = sequence_length
        end = end_of_text(tokenizer)
        begin = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if end is None:
            raise InputError(
                "the tokenizer has no end-of-text token (eos_token or sep_token): documents could not be told apart"
            )
        self._json = tokenizer.backend_tokenizer.to_str()
        self.backend = backend
        self.vocab_size = len(tokenizer)
        self._bos: int | None = None if begin is None else int(begin)
        self._eos = end
        self.head: int | None = self._bos
        self.tail: int | None = self._eos

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def identity(self) -> str:
        """Hash of all that decides the ids; not of who computes them."""
        what = [type(self).__name__, self._json, self._bos, self._eos, self._room if self.tail is None else None]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        offsets, ids = self._flat(pa.array(texts, pa.large_string()))
        return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]

    def _flat(self, strings: pa.Array) -> Flat:
        return _encoder(self._json, self.backend)(strings)

    def encode(self, groups: Sequence[Documents]) -> list[Encoded]:
        """Of each row group; in one go, since the encoder has a price a call."""
        offsets, ids = self._flat(pa.concat_arrays([d.fields[0] for d in groups]))
        out, first = [], 0
        for d in groups:
            at = offsets[first : first + len(d.origin) + 1]
            out.append(Encoded(ids[at[0] : at[-1]], at - at[0], None, d.origin, d.skipped))
            first += len(d.origin)
        return out


def admit(tokenizer: PreTrainedTokenizerBase, sample: Sequence[str]) -> tuple[str, str]:
    """Which backend may encode for this tokenizer: the fast one only where it gives the reference's ids on a sample, on
    every kind of Unicode character and on the spellings of special tokens.

    Returns:
        (backend, a sentence that says why).
    """
    text = tokenizer.backend_tokenizer.to_str()
    try:
        version = importlib.metadata.version(FAST)
        fast = _encoder(text, FAST)
        checked = [*sample, *_sweep(), *(f"a {t} b{t}" for t in tokenizer.all_special_tokens)]
        strings = pa.array(checked, pa.large_string())
        offsets, ids = fast(strings)
    except BaseException as e:  # a panic of its Rust code is no Exception
        if isinstance(e, KeyboardInterrupt | SystemExit):
            raise
        return (
            REFERENCE,
            f"{FAST} does not take this tokenizer ({type(e).__name__}: {str(e)[:80]}): encoding by {REFERENCE}, slower",
        )
    at, expected = _encoder(text, REFERENCE)(strings)
    if not (np.array_equal(at, offsets) and np.array_equal(expected, ids)):
        wrong = next(
            i for i in range(len(checked)) if ids[offsets[i] : offsets[i + 1]].tolist() != expected[at[i] : at[i + 1]].tolist()
        )
        return (
            REFERENCE,
            f"{FAST} {version} encodes {checked[wrong][:40]!r} otherwise than {REFERENCE}: encoding by {REFERENCE}, slower",
        )
    return FAST, f"encoding by {FAST} {version}: the same ids as {REFERENCE} on {len(ids):,} checked tokens"


def _sweep() -> list[str]:
    """Every assigned character of Unicode (of the large uniform blocks one in 16), between letters and doubled."""
    out = []
    for first in range(0, sys.maxunicode + 1, 64):
        points = range(first, first + 64, 16 if first >= 0x3400 else 1)
        known = [chr(p) for p in points if unicodedata.category(chr(p)) not in ("Cn", "Cs", "Co")]
        if known:
            out += ["".join(known), " ".join(f"a{c}b{c}{c}1" for c in known)]
    return out


@functools.lru_cache(maxsize=4)
def _encoder(serialized: str, backend: str) -> Callable[[pa.Array], Flat]:
    """One a process: parsing a vocabulary of 128k takes half a second."""
    return _fast(serialized) if backend == FAST else _reference(serialized)


def _reference(serialized: str) -> Callable[[pa.Array], Flat]:
    backend = tokenizers.Tokenizer.from_str(serialized)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode(strings: pa.Array) -> Flat:
        made = [e.ids for e in backend.encode_batch_fast(strings.to_pylist(), add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, made)], dtype=np.int64)
        return offsets, np.fromiter((t for ids in made for t in ids), np.uint32, int(offsets[-1]))

    return encode


def _fast(serialized: str) -> Callable[[pa.Array], Flat]:
    import awkward
    import gigatoken
    from awkward.contents import ListOffsetArray, NumpyArray

    tree = json.loads(serialized)
    tree["added_tokens"] = [t for t in tree["added_tokens"] if not t["special"]]  # their spelling in a text is text
    tree["post_processor"] = None
    backend = gigatoken.Tokenizer.from_json(json.dumps(tree))

    def encode(strings: pa.Array) -> Flat:
        if not len(strings):
            return np.zeros(1, np.int64), np.zeros(0, np.uint32)
        at, data = buffers(strings)
        characters = NumpyArray(np.frombuffer(data, np.uint8), parameters={"__array__": "char"})
        lists = ListOffsetArray(awkward.index.Index64(at), characters, parameters={"__array__": "string"})
        made: Any = awkward.to_layout(awkward.to_packed(backend.encode_batch(awkward.Array(lists), parallel=False)))
        return np.asarray(made.offsets.data, np.int64), np.asarray(made.content.data)

    return encode
