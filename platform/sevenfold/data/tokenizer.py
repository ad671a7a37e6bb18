"""The tokenizer: trained on a sample of the data, or loaded from a folder."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sevenfold import storage
from sevenfold.data.encode import TextEncoder
from sevenfold.data.manifest import Manifest
from sevenfold.data.named_files import check_named_files
from sevenfold.data.permutation import shuffled
from sevenfold.data.sources import formats
from sevenfold.data.sources.documents import Selection, texts
from sevenfold.errors import InputError, first_line

if TYPE_CHECKING:
    # transformers imports torch: 250 MB and some seconds for each data task, which needs only
    # `tokenizers`
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# The file of a saved tokenizer that is written last: where it exists, the tokenizer is complete.
LAST_WRITTEN = "tokenizer_config.json"
BOS, EOS, PAD, MASK = "<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))  # stand for removed spans, named as in T5
_BYTE = re.compile(r"^<0x[0-9A-F]{2}>$")
# Training takes quadratic time in the length of a word, and a word may be a line of Chinese or of
# encoded data. No token is as long as this.
_LONG_WORD = regex.compile(r"\p{L}{256}|\p{N}{256}|[^\s\p{L}\p{N}]{256}|\s{256}")
_SAMPLE = 0x746F6B  # "tok": makes this permutation differ from others with the same seed


def sample(
    manifest: Manifest, selection: Selection, source: int, megabytes: float, seed: int
) -> Iterator[list[str]]:
    """Yields the texts of randomly chosen row groups of a source, one field at a time.

    Args:
        manifest: The manifest.
        selection: Which documents are read.
        source: The index of the source.
        megabytes: The approximate amount of text in UTF-8.
        seed: The seed of the choice.
    """
    remaining, span = megabytes * 1e6, manifest.spans[source]
    for i in shuffled(len(span), seed, _SAMPLE):
        if remaining <= 0:
            return
        documents = texts(selection.read(manifest, span[int(i)]))
        for column in map(formats.tokenizer_texts, selection.fields, documents):
            remaining -= sum(len(text.encode()) for text in column)
            yield column


def estimate_tokens_per_byte(
    manifest: Manifest,
    selection: Selection,
    encoder: TextEncoder,
    source: int,
    megabytes: float,
    seed: int,
) -> float:
    """Estimates the number of tokens per byte of a source's row groups, from a sample of them.

    The bytes are those of the row groups, the tokens those of the documents that are read: what
    filters and the held-out split remove lowers the number.

    Args:
        manifest: The manifest.
        selection: Which documents are read.
        encoder: The encoder.
        source: The index of the source.
        megabytes: The approximate size of the sample.
        seed: The seed of the choice.
    """
    tokens = size = 0
    frame = sum(token is not None for token in (encoder.head, encoder.tail))
    span = manifest.spans[source]
    for i in shuffled(len(span), seed, _SAMPLE):
        if size > megabytes * 1e6:
            break
        (encoded,) = encoder.encode([selection.read(manifest, span[int(i)])])
        tokens += len(encoded.ids) + len(encoded.origin) * frame
        size += manifest.group(span[int(i)]).bytes
    return max(tokens, 1) / size


def train_tokenizer(
    manifest: Manifest,
    selection: Selection,
    vocab_size: int,
    megabytes: float,
    seed: int,
    objective: str = "causal",
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on a sample of the sources.

    Args:
        manifest: The manifest. The sample has each source in proportion to its size.
        selection: Which documents are read.
        vocab_size: The size of the vocabulary.
        megabytes: The approximate size of the sample.
        seed: The seed of the sample.
        objective: The objective of the training, which needs special tokens of its own.
    """
    from transformers import PreTrainedTokenizerFast

    def batches() -> Iterator[list[str]]:
        for source, span in enumerate(manifest.spans):
            share = int(manifest.table[span.start : span.stop, 5].sum()) / manifest.bytes
            for column in sample(manifest, selection, source, megabytes * share, seed):
                yield [part for text in column for part in _without_long_words(text)]

    extra: tuple[str, ...] = {"masked": (MASK,), "denoise": SENTINELS}.get(objective, ())
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(batches(), trainer)
    # the same BOS and EOS as the encoders of these objectives add
    end = f" {EOS}" if objective in ("classify", "seq2seq", "embed") else ""
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A{end}",
        pair=f"{BOS} $A{end} {BOS}:1 $B:1{end and end + ':1'}",
        special_tokens=[(token, bpe.token_to_id(token)) for token in (BOS, EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **({"mask_token": MASK} if MASK in extra else {}),
        **({"additional_special_tokens": list(SENTINELS)} if objective == "denoise" else {}),
    )


def _without_long_words(text: str) -> list[str]:
    """Returns the parts of a text, cut within words that are too long to train on."""
    cuts = [0, *(match.end() for match in _LONG_WORD.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Saves a tokenizer to a local or remote folder, the file LAST_WRITTEN last."""
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        storage.write_checksums(temporary)
        storage.makedirs(folder)
        files = [p for p in Path(temporary).rglob("*") if p.is_file()]
        for path in sorted(files, key=lambda p: (p.name == LAST_WRITTEN, p)):
            parts = path.relative_to(temporary).parts
            if len(parts) > 1:  # further chat templates are in a folder of their own
                storage.makedirs(storage.join(folder, *parts[:-1]))
            storage.write(storage.join(folder, *parts), path.read_bytes())


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Args:
        folder: A local or remote folder with the files that `save_pretrained` writes.

    Raises:
        InputError: The folder has no fast tokenizer that can be loaded without remote code, or a
            file is damaged.
    """
    from transformers import AutoTokenizer

    local = storage.local_copy(folder)
    storage.verify_checksums(local, weights=False)
    overridden: dict[str, Any] = check_named_files(local)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            local, local_files_only=True, trust_remote_code=False, **overridden
        )
    except Exception as e:  # tokenizers raises Exception itself for a damaged file
        _check_tokenizer_files(local)
        raise InputError(
            f"{folder}: expected a Hugging Face tokenizer (tokenizer.json), found none: "
            f"{first_line(e)}"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{folder}: expected a fast tokenizer (tokenizer.json), "
            f"found {type(tokenizer).__name__}"
        )
    tokenizer.padding_side = "left"
    return tokenizer


def _check_tokenizer_files(folder: str) -> None:
    """Raises InputError for a file of a tokenizer that is damaged, and names it."""
    for path in sorted(Path(folder).glob("*token*.json")):
        storage.read_json(str(path), storage.json_object)
    for path in sorted(Path(folder).rglob("*.jinja")):
        storage.read_text(str(path))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Returns the number of bytes of text that each token stands for.

    Returns:
        int64 [largest id + 1]; 0 for special tokens and ids without a token.
    """
    vocabulary = tokenizer.get_vocab()
    special: set[Any] = set(tokenizer.all_special_ids)
    byte_level = "ByteLevel" in tokenizer.backend_tokenizer.to_str()
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, i in vocabulary.items():
        if i not in special:
            sizes[i] = _byte_count(token, byte_level)
    return sizes


def _byte_count(token: str, byte_level: bool) -> int:
    """Returns the number of bytes of text that a token stands for."""
    if byte_level:  # each character of the token is a byte
        return len(token)
    # SentencePiece writes a single byte as <0x0A>, and a space as U+2581
    return 1 if _BYTE.match(token) else len(token.replace("\u2581", " ").encode())
