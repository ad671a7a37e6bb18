"""Models are built from recipes; unsuitable configs are refused with a message of one line."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.objectives import BERT, T5
from helpers.tiny_models import MODERN, save

from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.engine.decode import end_tokens
from sevenfold.errors import InputError
from sevenfold.model import build
from sevenfold.recipe import Adapter, Recipe


def with_config(tree: dict[str, Any], **config: Any) -> Recipe:
    """The recipe with these fields of the model's config changed."""
    tree["model"]["config"] |= config
    return Recipe.model_validate(tree)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "lama"}, "lama"),
        ({"hiden_size": 3}, "no field 'hiden_size'"),
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"hidden_size": 33}, "The hidden size (33) is not a multiple"),
        ({"hidden_act": "gulu"}, "cannot build the decoder"),
        ({"model_type": "t5", "num_hidden_layers": 2}, "model.config: "),
        ({"vocab_size": 100}, "vocab_size 100 is below the tokenizer's 512"),
        ({"max_position_embeddings": 32}, "64 is above the model's 32 positions"),
    ],
)
def test_unsuitable_configs_are_refused(
    tree: dict[str, Any], config: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError) as error:
        build.check_model(with_config(tree, **config), 512)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_model_is_refused(tree: dict[str, Any], tmp_path: Any) -> None:
    tree["model"], tree["tokenizer"] = {"path": str(tmp_path)}, {}
    with pytest.raises(InputError, match="expected a run, a Hugging Face directory"):
        build.config_of(Recipe.model_validate(tree), 512)


def test_code_of_a_model_is_not_run_without_trust_remote_code(
    tree: dict[str, Any], tmp_path: Any
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "ours",
                "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
            }
        )
    )
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tree["model"], tree["tokenizer"] = {"path": str(tmp_path)}, {}
    with pytest.raises(
        InputError, match=r"Python code of its own \(code\.py\).*add --trust-remote-code \w{32}$"
    ):
        build.config_of(Recipe.model_validate(tree), 512)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("objective", "config", "says"),
    [
        ("masked", {}, "expected an encoder, found a decoder (llama)"),
        ("denoise", {}, "expected an encoder-decoder, found a decoder (llama)"),
        ("sft", BERT, "expected a decoder, found an encoder (bert)"),
        ("causal", T5, "expected a decoder, found an encoder-decoder (t5)"),
        ("embed", T5, "expected an encoder or a decoder, found an encoder-decoder (t5)"),
        ("causal", BERT | {"is_decoder": True}, None),
    ],
)
def test_an_objective_needs_a_model_of_its_family(
    tree: dict[str, Any], objective: str, config: dict[str, Any], says: str | None
) -> None:
    tree["objective"], tree["model"] = objective, {"config": config or tree["model"]["config"]}
    with pytest.raises(InputError, match=re.escape(says)) if says else contextlib.nullcontext():
        build.check_model(Recipe.model_validate(tree), 512)


def test_a_built_model_is_reproducible_and_has_the_expected_size(tree: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(tree)
    config = build.config_of(recipe, 512)
    model, rebuilt = (build.build(recipe, config, weights=True) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), rebuilt.parameters(), strict=True)
    )
    assert (
        sum(parameter.numel() for parameter in model.parameters())
        == build.check_model(recipe, 512)
        == 37_024
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    empty = build.build(recipe, config, weights=False)
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert torch.equal(empty.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    matrices = sum(
        parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim == 2
    )
    assert build.flops_per_token(model, recipe) == 6 * matrices + 12 * 2 * 32 * 64


def test_an_adapter_starts_as_the_base(tree: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(tree)
    model = build.build(recipe, build.config_of(recipe, 512), weights=True).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        build.with_adapter(model, recipe.model_copy(update={"adapter": Adapter(rank=4)}))
        assert torch.equal(model(input_ids=ids).logits, before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    with pytest.raises(InputError, match="target_modules"):
        without_match = recipe.model_copy(update={"adapter": Adapter(target_modules="none")})
        build.with_adapter(
            build.build(recipe, build.config_of(recipe, 512), weights=True), without_match
        )


@pytest.mark.parametrize("weights", [True, False])
def test_every_end_token_of_the_base_is_kept(
    tree: dict[str, Any], tmp_path: Path, weights: bool
) -> None:
    """A chat model ends its turns with other tokens than its texts."""
    tree["model"], tree["tokenizer"] = {"path": save(tmp_path / "base", "llama")}, {}
    path = tmp_path / "base/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [9, 5]}))
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    recipe = Recipe.model_validate(tree)
    model = build.build(recipe, build.config_of(recipe, len(tokenizer), tokenizer), weights=weights)
    assert end_tokens(model.generation_config, tokenizer) == [1, 5, 9]


DISTIL = {"model_type": "distilbert", "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (
            BERT,
            {
                "classifier.weight",
                "classifier.bias",
                "bert.pooler.dense.weight",
                "bert.pooler.dense.bias",
            },
        ),
        (
            DISTIL,
            {
                "classifier.weight",
                "classifier.bias",
                "pre_classifier.weight",
                "pre_classifier.bias",
            },
        ),
        (MODERN, {"classifier.weight", "classifier.bias", "head.dense.weight", "head.norm.weight"}),
        ({}, {"score.weight"}),
    ],
)
def test_a_new_head_is_trained_fully_beside_an_adapter(
    tree: dict[str, Any], config: dict[str, Any], head: set[str]
) -> None:
    tree |= {"objective": "classify", "model": {"config": config or tree["model"]["config"]}}
    tree["data"]["classes"] = ["a", "b"]
    recipe = Recipe.model_validate(tree)
    model = build.build(recipe, build.config_of(recipe, 512), weights=True)
    build.with_adapter(model, recipe.model_copy(update={"adapter": Adapter(rank=4)}))
    trained = {
        name.replace("modules_to_save.default.", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert {name for name in trained if "lora_" not in name} == head
    assert not any("lora_" in name and name.startswith(tuple(head)) for name in trained)
    assert any("lora_" in name for name in trained)


# Encoders whose positions begin at padding_idx + 1, and two whose begin at 0.
ROBERTA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 1,
}
OFFSETS = {
    "roberta": 2,
    "xlm-roberta": 2,
    "camembert": 2,
    "data2vec-text": 2,
    "bert": 0,
    "electra": 0,
}


@pytest.mark.parametrize("model_type", OFFSETS)
def test_positions_of_packed_texts_are_those_of_transformers(
    model_type: str, tree: dict[str, Any]
) -> None:
    from sevenfold.data.rows import Rows
    from sevenfold.engine.objectives import Masked, SpecialTokens

    fields = {"model_type": model_type, **ROBERTA}
    recipe = Recipe.model_validate(
        tree
        | {"objective": "masked", "model": {"config": fields}, "tokenizer": {"vocab_size": 300}}
    )
    length, offset = recipe.data.sequence_length, OFFSETS[model_type]
    config = build.config_of(recipe, 300)
    assert config.max_position_embeddings == length + offset
    model: Any = build.build(recipe, config, weights=True).eval()
    texts = [np.arange(5, 25), np.arange(40, 40 + length - 20), np.arange(60, 60 + length)]
    tokens = np.concatenate(texts).astype(np.uint16).reshape(2, length)
    rows = Rows(tokens, np.array([0, 20, 0], np.int32), np.array([length, length], np.int32))
    objective = Masked(SpecialTokens(300, (0, 1, 2), 4, pad=1), 0, 1e-9, 3)
    batch = objective.collate(rows, 0)
    batch.input_ids[:] = torch.from_numpy(tokens.astype(np.int64))  # nothing is masked
    with torch.no_grad():
        packed = objective.logits(model, batch).reshape(2 * length, -1)
        alone = [model(input_ids=torch.from_numpy(text)[None]).logits[0] for text in texts]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)
    # a base with too few positions is refused before anything is paid for
    short = recipe.override(
        {"model.config": {**fields, "max_position_embeddings": length + offset - 1}}
    )
    with pytest.raises(InputError, match=f"above the model's {length - 1} positions"):
        build.config_of(short, 300)
