"""Source and target of an encoder-decoder are framed as the model's own tokenizer frames them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_job
from helpers.tiny_models import save
from transformers import (
    AutoTokenizer,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
)

from sevenfold.data.examples import PairEncoder
from sevenfold.data.pair_frames import Frame, PairFrames, pair_frames, set_languages
from sevenfold.data.tokenizer import load_tokenizer
from sevenfold.engine.decode import Sampling, generate, generation_config
from sevenfold.errors import InputError
from sevenfold.prepare.encoder import set_first_token

LANGUAGES = {"source": "en_XX", "target": "de_DE"}
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdehilno", "▁hi", "▁ba"]
SIZES = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SIZES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}


def multilingual(tokenizer_class: Any = MBart50Tokenizer) -> Any:
    """A tokenizer with tokens of languages."""
    return tokenizer_class(vocab=[(piece, -float(i)) for i, piece in enumerate(PIECES)])


def mbart(folder: Path) -> str:
    """Writes a random mBART-50 of a few kilobytes; returns its folder."""
    tokenizer = multilingual()
    torch.manual_seed(0)
    config = MBartConfig(
        vocab_size=len(tokenizer),
        decoder_start_token_id=2,
        max_position_embeddings=64,
        dropout=0.0,
        **SIZES,
    )
    MBartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bart_tokenizer(tmp_path: Path) -> Any:
    """A tokenizer with BART's frame: <s> text </s> on both sides."""
    tokenizer = load_tokenizer(save(tmp_path, "bert"))
    from tokenizers.processors import TemplateProcessing

    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    return tokenizer


def test_frames_are_those_of_the_tokenizers_calls(bart_tokenizer: Any) -> None:
    mbart50 = multilingual()
    set_languages(mbart50, LANGUAGES)
    for tokenizer in (bart_tokenizer, mbart50):
        frames = pair_frames(tokenizer)
        encoder = PairEncoder(tokenizer, 32, frames=frames)
        ids = tokenizer("hi ba").input_ids
        assert encoder.prompt("hi ba", 32) == ids
        (example,) = encoder._examples([["hi ba"], ["ba"]])
        assert example.ids == [*ids, *tokenizer(text_target="ba").input_ids]
        assert example.ids[example.targets.index(True) :] == tokenizer(text_target="ba").input_ids
    english, german, end = mbart50.convert_tokens_to_ids(["en_XX", "de_DE", "</s>"])
    assert frames == PairFrames(Frame((english,), (end,)), Frame((german,), (end,)))
    assert PairFrames.from_json(json.loads(json.dumps(frames.to_json()))) == frames
    assert encoder.identity() != PairEncoder(mbart50, 32).identity()


def test_long_pairs_keep_their_frames() -> None:
    tokenizer = multilingual()
    set_languages(tokenizer, LANGUAGES)
    frames = pair_frames(tokenizer)
    encoder = PairEncoder(tokenizer, 16, frames=frames)
    (example,) = encoder._examples([["hi " * 30], ["ba"]])
    assert example.cut and len(example.ids) == 16
    start = example.targets.index(True)
    source, target = example.ids[:start], example.ids[start:]
    assert (source[0], source[-1]) == (*frames.source.before, *frames.source.after)
    assert target == tokenizer(text_target="ba").input_ids


@pytest.mark.parametrize(
    ("tokenizer_class", "languages", "message"),
    [
        (MBart50Tokenizer, None, "expected two languages .* found none: give the languages"),
        (
            MBart50Tokenizer,
            LANGUAGES | {"target": "klingon"},
            "data.languages.target: expected a language of the tokenizer .*de_DE.* found klingon",
        ),
        (MBartTokenizer, LANGUAGES, "choose a model such as mBART-50 or NLLB"),
        (None, LANGUAGES, "expected no setting .* remove the setting"),
    ],
)
def test_languages_that_do_not_fit_are_refused(
    tokenizer_class: Any, languages: Any, message: str, bart_tokenizer: Any
) -> None:
    tokenizer = multilingual(tokenizer_class) if tokenizer_class else bart_tokenizer
    with pytest.raises(InputError, match=message):
        set_languages(tokenizer, languages)
        pair_frames(tokenizer)


def test_generation_begins_with_the_language_of_the_target(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(mbart(tmp_path))
    model = MBartForConditionalGeneration.from_pretrained(tmp_path)
    set_languages(tokenizer, LANGUAGES)
    encoder = PairEncoder(tokenizer, 32, frames=pair_frames(tokenizer))
    prompts = [encoder.prompt("hi ba", 16)]
    german = tokenizer.convert_tokens_to_ids("de_DE")
    begin = []
    for prepare in (lambda: None, lambda: set_first_token(model, encoder)):
        prepare()
        config = generation_config(model, tokenizer, Sampling(4, 0.0), plain=True)
        output = model.generate(input_ids=torch.tensor(prompts), generation_config=config)
        begin.append(output[0, 1].item())
        generate(model, tokenizer, prompts, config)
    assert begin[0] != german == begin[1]


@pytest.mark.nightly
def test_a_translation_model_learns_its_languages(tmp_path: Path) -> None:
    pairs = [{"source": f"hi {c}", "target": f"ba {c}"} for c in "abcdehilno" * 12]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = {
        "name": "mbart",
        "objective": "seq2seq",
        "data": {
            "sources": [{"path": str(tmp_path / "pairs.jsonl")}],
            "held_out": 0.2,
            "sequence_length": 32,
            "languages": LANGUAGES,
            "executor": "inline",
        },
        "model": {"path": mbart(tmp_path / "base")},
        "train": {"global_batch": 8, "micro_batch": 4, "steps": 60},
        "validation": {"every": 30, "rows": 8, "generate": 4, "max_new_tokens": 6},
        "optimizer": {"learning_rate": 1e-2},
        "cluster": {"num_workers": 2},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    output = run_job("finetune", "r.yaml", home=tmp_path)
    assert "does not keep packed documents apart" in output
    model = tmp_path / "runs/mbart/model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en_XX", "de_DE")
    german = tokenizer.convert_tokens_to_ids("de_DE")
    assert (
        json.loads((model / "generation_config.json").read_text())["forced_bos_token_id"] == german
    )
    # as any user of transformers would translate with it
    loaded = MBartForConditionalGeneration.from_pretrained(model)
    ids = loaded.generate(**tokenizer(["hi e", "hi n"], return_tensors="pt"), max_new_tokens=6)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert all(text.startswith("ba ") for text in texts)
    run_job("evaluate", "runs/mbart", home=tmp_path)
    assert json.loads((tmp_path / "runs/mbart/metrics.json").read_text())["chrf"] > 30
