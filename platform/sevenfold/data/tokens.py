"""Text to tokens: the tokenizer, and the two encoders (plain documents; prompt and completion)."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sevenfold import storage
from sevenfold.data.manifest import Manifest
from sevenfold.data.order import shuffled
from sevenfold.errors import InputError

if TYPE_CHECKING:  # transformers brings torch: 250 MB and seconds for each data task, which needs only `tokenizers`
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LAST_WRITTEN = "tokenizer_config.json"  # of a saved tokenizer
_BYTE = re.compile(r"^<0x[0-9A-F]{2}>$")
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


@dataclass
class Documents:
    """Encoded documents end to end.

    Attributes:
        tokens: int64 [total].
        targets: bool [total], whether a token is to be predicted.
        lengths: int64 [documents].
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray


class Encoder(Protocol):
    fields: tuple[str, ...]

    def __call__(self, columns: list[pa.ChunkedArray]) -> Documents: ...


def train_tokenizer(manifest: Manifest, vocab_size: int, megabytes: float, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a sample of row groups of about this much text."""
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[list[str]]:
        left = megabytes * 1e6
        for i in shuffled(len(manifest.groups), seed, 0x746F6B):
            if left <= 0:
                return
            for column in manifest.read(manifest.groups[i]):
                batch = column.to_pylist()
                left -= sum(len(t) for t in batch if t)
                yield [t for t in batch if t]

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    with tempfile.TemporaryDirectory() as aside:
        tokenizer.save_pretrained(aside)
        storage.makedirs(folder)
        for name in sorted(os.listdir(aside), key=lambda n: (n == LAST_WRITTEN, n)):
            with open(os.path.join(aside, name), "rb") as f:
                storage.write(storage.join(folder, name), f.read())


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Raises InputError where the folder holds no tokenizer that can be loaded without remote code."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(storage.local(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise InputError(f"{folder}: expected a Hugging Face tokenizer, found none: {str(e).splitlines()[0]}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{folder}: expected a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}")
    tokenizer.padding_side = "left"
    return tokenizer


class TextEncoder:
    """Plain documents: BOS text EOS, every token but the first a target.

    The spelling of a special token in the text stays text. Raises InputError where the tokenizer has no EOS token.
    """

    fields: tuple[str, ...] = ("text",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int):
        self._room = sequence_length
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-text token (eos_token): documents could not be told apart")
        self._json = tokenizer.backend_tokenizer.to_str()
        self._head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._eos = int(tokenizer.eos_token_id)

    def ids(self, texts: list[str]) -> list[list[int]]:
        encodings = _backend(self._json).encode_batch_fast(texts, add_special_tokens=False)
        return [e.ids for e in encodings]

    def __call__(self, columns: list[pa.ChunkedArray]) -> Documents:
        texts = [t for t in columns[0].to_pylist() if t]
        rows = [[*self._head, *ids, self._eos] for ids in self.ids(texts)]
        lengths = np.array([len(r) for r in rows], np.int64)
        tokens = np.fromiter((t for r in rows for t in r), np.int64, int(lengths.sum()))
        return Documents(tokens, np.ones(len(tokens), bool), lengths)


class CompletionEncoder(TextEncoder):
    """BOS prompt completion EOS, the completion and EOS alone targets. A prompt that leaves no room loses its middle,
    so that what it asks (its end) and the whole completion stay; a completion longer than a row is cut."""

    fields = ("prompt", "completion")

    def prompt(self, text: str, room: int) -> list[int]:
        """Ids of BOS and the prompt in at most `room` tokens."""
        return self._shorten(self.ids([text])[0], room)

    def _shorten(self, ids: list[int], room: int) -> list[int]:
        ids = [*self._head, *ids]
        if len(ids) <= room:
            return ids
        tail = room // 2
        return ids[: room - tail] + (ids[-tail:] if tail else [])

    def __call__(self, columns: list[pa.ChunkedArray]) -> Documents:
        pairs = [(p, c) for p, c in zip(columns[0].to_pylist(), columns[1].to_pylist(), strict=True) if p and c]
        prompts, completions = self.ids([p for p, _ in pairs]), self.ids([c for _, c in pairs])
        rows, masks = [], []
        for asked, answer in zip(prompts, completions, strict=True):
            learnt = [*answer, self._eos][: self._room - 1]
            given = self._shorten(asked, self._room - len(learnt))
            rows.append(given + learnt)
            masks.append([False] * len(given) + [True] * len(learnt))
        lengths = np.array([len(r) for r in rows], np.int64)
        total = int(lengths.sum())
        return Documents(
            np.fromiter((t for r in rows for t in r), np.int64, total),
            np.fromiter((m for r in masks for m in r), bool, total),
            lengths,
        )


ENCODERS: dict[str, type[TextEncoder]] = {"causal": TextEncoder, "sft": CompletionEncoder}  # by objective


@functools.lru_cache(maxsize=4)
def _backend(serialized: str) -> tokenizers.Tokenizer:
    """One a process: parsing a vocabulary of 128k takes half a second."""
    backend = tokenizers.Tokenizer.from_str(serialized)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """How many bytes of text each token stands for: int64 [largest id + 1]; 0 for special tokens."""
    vocabulary = tokenizer.get_vocab()
    special: set[Any] = set(tokenizer.all_special_ids)
    out = np.zeros(max(vocabulary.values()) + 1, np.int64)
    byte_level = "ByteLevel" in tokenizer.backend_tokenizer.to_str()
    for token, i in vocabulary.items():
        if i not in special:
            # one character a byte; else SentencePiece's spellings: <0x0A> is a byte, a low line block is a space
            out[i] = len(token) if byte_level else 1 if _BYTE.match(token) else len(token.replace("\u2581", " ").encode())
    return out
