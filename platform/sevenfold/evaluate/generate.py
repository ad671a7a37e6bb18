"""Completions of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sevenfold.model.build import end_tokens


class Completion(NamedTuple):
    text: str
    ended: bool  # by itself, before max_new_tokens


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_new_tokens: int, *,
    temperature: float = 0.0, seed: int = 0, batch_size: int = 32, synced: bool = False,
) -> list[Completion]:  # fmt: skip
    """Continues each prompt (token ids) until an end token, the model's or the tokenizer's, or max_new_tokens; of an
    encoder-decoder the prompt is what the encoder reads.

    Args:
        temperature: 0 takes the likeliest token; above, draws from the 50 likeliest.
        synced: the model is sharded, and every rank calls this with as many prompts: none stops before the others.
    """
    ends = end_tokens(model.generation_config or model.config, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or None,
        top_k=50 if temperature > 0 else None, eos_token_id=ends, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
    )  # fmt: skip
    apart = model.config.is_encoder_decoder
    if apart:
        config.decoder_start_token_id = model.config.decoder_start_token_id
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    out: list[Completion] = []
    for i in range(0, len(prompts), batch_size):
        batch = prompts[i : i + batch_size]
        width = max(map(len, batch))
        ids = torch.full((len(batch), width), config.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for j, prompt in enumerate(batch):
            at = slice(0, len(prompt)) if apart else slice(width - len(prompt), width)  # a decoder goes on from the right
            ids[j, at] = torch.tensor(prompt)
            mask[j, at] = 1
        made = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, synced_gpus=synced
        )
        made = made[:, 1 if apart else width :].cpu()
        ended = torch.isin(made, torch.tensor(ends)).any(1).tolist()
        out += map(Completion, tokenizer.batch_decode(made, skip_special_tokens=True), ended)
    model.train(training)
    return out
