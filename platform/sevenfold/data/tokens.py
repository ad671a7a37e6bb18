"""The tokenizer: trained on a sample of the sources, or loaded."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sevenfold import storage
from sevenfold.data import formats
from sevenfold.data.documents import Selection, texts
from sevenfold.data.encode import TextEncoder
from sevenfold.data.manifest import Manifest
from sevenfold.data.order import shuffled
from sevenfold.errors import InputError

if TYPE_CHECKING:  # transformers brings torch: 250 MB and seconds for each data task, which needs only `tokenizers`
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LAST_WRITTEN = "tokenizer_config.json"  # of a saved tokenizer
_BYTE = re.compile(r"^<0x[0-9A-F]{2}>$")
BOS, EOS, PAD, MASK = "<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))  # T5's names for the spans that were taken out


def sample(manifest: Manifest, selection: Selection, source: int, megabytes: float, seed: int) -> Iterator[list[str]]:
    """Texts of row groups of a source, drawn by seed, of about this much text."""
    left, span = megabytes * 1e6, manifest.spans[source]
    for i in shuffled(len(span), seed, 0x746F6B):
        if left <= 0:
            return
        documents = texts(selection.read(manifest, span[int(i)]))
        for column in map(formats.plain, selection.fields, documents):
            left -= sum(map(len, column))
            yield column


def per_byte(manifest: Manifest, selection: Selection, encoder: TextEncoder, source: int, megabytes: float, seed: int) -> float:
    """Tokens that a byte of a source's row groups comes to, on a sample of them: filters and the split count as well."""
    tokens = size = 0
    span = manifest.spans[source]
    for i in shuffled(len(span), seed, 0x746F6B):
        if size > megabytes * 1e6:
            break
        (made,) = encoder.encode([selection.read(manifest, span[int(i)])])
        tokens += len(made.ids) + len(made.origin) * sum(t is not None for t in (encoder.head, encoder.tail))
        size += manifest.group(span[int(i)]).bytes
    return max(tokens, 1) / size


def train_tokenizer(
    manifest: Manifest, selection: Selection, vocab_size: int, megabytes: float, seed: int, objective: str = "causal"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a sample of the sources' row groups, of each in proportion to its size, with the special
    tokens that the objective needs."""
    from transformers import PreTrainedTokenizerFast

    def drawn() -> Iterator[list[str]]:
        for number, span in enumerate(manifest.spans):
            part = int(manifest.table[span.start : span.stop, 5].sum()) / manifest.bytes
            yield from sample(manifest, selection, number, megabytes * part, seed)

    more: tuple[str, ...] = {"masked": (MASK,), "denoise": SENTINELS}.get(objective, ())
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(drawn(), trainer)
    end = f" {EOS}" if objective in ("classify", "seq2seq", "embed") else ""  # as their texts are framed in training
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A{end}", pair=f"{BOS} $A{end} {BOS}:1 $B:1{end and end + ':1'}",
        special_tokens=[(t, bpe.token_to_id(t)) for t in (BOS, EOS)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left",
        clean_up_tokenization_spaces=False,
        **({"mask_token": MASK} if MASK in more else {}),
        **({"additional_special_tokens": list(SENTINELS)} if objective == "denoise" else {}),
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
