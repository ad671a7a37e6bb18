"""Tokenizers and the encoders that turn documents into token ids."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from sevenfold.data import encode
from sevenfold.data.backends import FAST, REFERENCE, Backend, choose_backend
from sevenfold.data.examples import ConversationEncoder
from sevenfold.data.scan import scan
from sevenfold.data.sources.documents import Documents, Selection, Skipped
from sevenfold.data.sources.messages import pair
from sevenfold.data.tokenizer import load_tokenizer, save_tokenizer, token_bytes, train_tokenizer
from sevenfold.errors import InputError
from sevenfold.recipe import Source


@pytest.fixture(scope="module")
def tokenizer(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    manifest = scan([Source(path=str(texts / "train"))], "causal")
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    save_tokenizer(train_tokenizer(manifest, Selection(), 600, 0.5, 0), folder)
    return load_tokenizer(folder)  # type: ignore[return-value]


def documents(*fields: list[str]) -> Documents:
    arrays = [pa.array(f, pa.large_string()) for f in fields]
    return Documents(arrays, np.arange(len(fields[0])), Skipped())


@pytest.fixture(params=[Backend(FAST), REFERENCE])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param  # type: ignore[no-any-return]


def test_documents_are_encoded(tokenizer: PreTrainedTokenizerFast, backend: Backend) -> None:
    assert len(tokenizer) == 600
    text = "def f(x):\n    return 'über' + x\n"
    encoder = encode.TextEncoder(tokenizer, 24, backend)
    first, second = encoder.encode([documents([text, "pass"]), documents(["more"])])
    assert (
        tokenizer.decode(first.ids[: first.offsets[1]]) == text
        and tokenizer.decode(second.ids) == "more"
    )
    assert (encoder.head, encoder.tail) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (
        encoder.dtype == np.uint16
        and encoder.identity() == encode.TextEncoder(tokenizer, 99).identity()
    )


def test_a_special_tokens_spelling_stays_text(
    tokenizer: PreTrainedTokenizerFast, backend: Backend
) -> None:
    (encoded,) = encode.TextEncoder(tokenizer, 24, backend).encode([documents(["a <|eos|> b"])])
    assert not (encoded.ids == tokenizer.eos_token_id).any()
    assert tokenizer.decode(encoded.ids) == "a <|eos|> b"


def test_token_bytes_add_up_to_the_text(
    tokenizer: PreTrainedTokenizerFast, backend: Backend
) -> None:
    text = "naïve 中文 <|pad|> \n\tif x: 🙂"
    (encoded,) = encode.TextEncoder(tokenizer, 24, backend).encode([documents([text])])
    assert token_bytes(tokenizer)[encoded.ids].sum() == len(text.encode())


def test_the_fast_encoder_is_used_only_where_it_agrees(tokenizer: PreTrainedTokenizerFast) -> None:
    backend, reason = choose_backend(tokenizer, ["some text", "<|bos|>"])
    assert backend.name == FAST and "the same ids" in reason
    word_level = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]")
    )
    backend, reason = choose_backend(
        PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="</s>"), ["a b"]
    )
    assert backend == REFERENCE and "encoding with tokenizers" in reason


def test_only_completions_are_targets(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = ConversationEncoder(tokenizer, 24)
    conversations = [
        pair(prompt, completion).dump()
        for prompt, completion in (("short: ", "answer"), ("word " * 200, "the answer"))
    ]
    (encoded,) = encoder.encode([documents(conversations)])
    assert encoded.targets is not None
    for i, answer in enumerate(("answer", "the answer")):
        row = slice(encoded.offsets[i], encoded.offsets[i + 1])
        targets = encoded.ids[row][encoded.targets[row]]
        assert tokenizer.decode(targets[:-1]) == answer and targets[-1] == tokenizer.eos_token_id
    assert encoded.offsets[2] - encoded.offsets[1] == 24
    assert (
        encoder.prompt(conversations[1], 10)[0] == tokenizer.bos_token_id
        and len(encoder.prompt(conversations[1], 10)) == 10
    )


def test_token_bytes_of_a_sentencepiece_vocabulary() -> None:
    model = tokenizers.models.BPE({"<s>": 0, "\u2581the": 1, "<0xE2>": 2, "\u00e9": 3, "x": 9}, [])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), bos_token="<s>"
    )
    assert token_bytes(tokenizer).tolist() == [0, 4, 1, 2, 0, 0, 0, 0, 0, 1]


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    without_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no end-of-text token"):
        encode.TextEncoder(without_end, 24)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a Hugging Face tokenizer"):
        load_tokenizer(str(tmp_path))
