"""Random models of each family, a few kilobytes each, with a byte-level BPE tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from sevenfold.data.tokenizer import BOS, EOS, MASK, PAD

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "naïve café 中文 🙂",
    "how vexingly quick daft zebras jump",
    "def f(x):\n    return x + 1",
]
# a config of ModernBERT
MODERN = {
    "model_type": "modernbert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "classifier_pooling": "mean",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "cls_token_id": 0,
    "sep_token_id": 1,
    "pad_token_id": 2,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on TEXTS; `template` is its chat template."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, EOS, PAD, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template
    return wrapped


def save(folder: Path, kind: str, template: str | None = None, positions: int = 128) -> str:
    """Writes a model ("llama", "bert" or "t5") with its tokenizer; returns the folder."""
    torch.manual_seed(7)
    trained = tokenizer(template)
    special_names = ("bos_token_id", "eos_token_id", "pad_token_id")
    sizes: dict[str, Any] = {
        "vocab_size": len(trained),
        **{name: getattr(trained, name) for name in special_names},
    }
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                initializer_range=0.3,
                max_position_embeddings=positions,
                **sizes,
            )
        )
    elif kind == "bert":
        model = BertForMaskedLM(
            BertConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.3,
                max_position_embeddings=positions,
                **sizes,
            )
        )
    else:
        model = T5ForConditionalGeneration(
            T5Config(
                d_model=32,
                d_kv=16,
                d_ff=48,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=2,
                **sizes,
            )
        )
    model.eval().save_pretrained(folder)
    trained.save_pretrained(folder)
    return str(folder)
