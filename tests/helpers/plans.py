"""A small recipe and fleets of GPUs for tests of the planner."""

from typing import Any

from sevenfold.plan import hardware
from sevenfold.recipe import Recipe

TABLE = hardware.load()


WIDTH, FFN, LAYERS, VOCABULARY, LENGTH = 128, 256, 5, 1000, 64


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


def small_recipe(**train: Any) -> Recipe:
    """A recipe of a small Llama; keyword arguments override its `train` section."""
    return Recipe.model_validate(
        {
            "name": "small",
            "data": {"sources": [{"path": "text"}], "sequence_length": LENGTH, "lanes": 64},
            "tokenizer": {"path": "none"},
            "model": {"config": LLAMA},
            "train": {"steps": 100, "global_batch": 64, "micro_batch": 1, "dtype": "bfloat16"}
            | train,
        }
    )


def h100(gpus: int) -> hardware.Fleet:
    """A fleet of this number of H100 GPUs."""
    return hardware.of_gpus(TABLE, "h100-80gb", gpus)
