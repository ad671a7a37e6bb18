from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from sevenfold.data import encode, tokens
from sevenfold.data.documents import Documents, Selection, Skipped
from sevenfold.data.examples import ConversationEncoder
from sevenfold.data.formats import conversation
from sevenfold.data.manifest import scan
from sevenfold.errors import InputError
from sevenfold.recipe import Source


@pytest.fixture(scope="module")
def tokenizer(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    found = scan([Source(path=str(texts / "train"))], "causal")
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tokens.save_tokenizer(tokens.train_tokenizer(found, Selection(), 600, 0.5, 0), folder)
    return tokens.load_tokenizer(folder)  # type: ignore[return-value]


def documents(*fields: list[str]) -> Documents:
    arrays = [pa.array(f, pa.large_string()) for f in fields]
    return Documents(arrays, np.arange(len(fields[0])), Skipped())


@pytest.fixture(params=[encode.FAST, encode.REFERENCE])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_documents(tokenizer: PreTrainedTokenizerFast, backend: str) -> None:
    assert len(tokenizer) == 600
    text = "def f(x):\n    return 'über' + x\n"
    encoder = encode.TextEncoder(tokenizer, 24, backend)
    one, two = encoder.encode([documents([text, "pass"]), documents(["more"])])
    assert tokenizer.decode(one.ids[: one.offsets[1]]) == text and tokenizer.decode(two.ids) == "more"
    assert (encoder.head, encoder.tail) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert encoder.dtype == np.uint16 and encoder.identity() == encode.TextEncoder(tokenizer, 99).identity()


def test_a_special_tokens_spelling_stays_text(tokenizer: PreTrainedTokenizerFast, backend: str) -> None:
    (made,) = encode.TextEncoder(tokenizer, 24, backend).encode([documents(["a <|eos|> b"])])
    assert not (made.ids == tokenizer.eos_token_id).any()
    assert tokenizer.decode(made.ids) == "a <|eos|> b"


def test_token_bytes_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast, backend: str) -> None:
    text = "naïve 中文 <|pad|> \n\tif x: 🙂"
    (made,) = encode.TextEncoder(tokenizer, 24, backend).encode([documents([text])])
    assert tokens.token_bytes(tokenizer)[made.ids].sum() == len(text.encode())


def test_the_fast_encoder_is_admitted_where_it_agrees(tokenizer: PreTrainedTokenizerFast) -> None:
    backend, why = encode.admit(tokenizer, ["some text", "<|bos|>"])
    assert backend == encode.FAST and "the same ids" in why
    unlike = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    backend, why = encode.admit(PreTrainedTokenizerFast(tokenizer_object=unlike, eos_token="</s>"), ["a b"])
    assert backend == encode.REFERENCE and "encoding by tokenizers" in why


def test_completions(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = ConversationEncoder(tokenizer, 24)
    said = [conversation([("", p), ("", c)]) for p, c in (("short: ", "answer"), ("word " * 200, "the answer"))]
    (made,) = encoder.encode([documents(said)])
    assert made.targets is not None
    for i, answer in enumerate(("answer", "the answer")):
        row = slice(made.offsets[i], made.offsets[i + 1])
        learnt = made.ids[row][made.targets[row]]
        assert tokenizer.decode(learnt[:-1]) == answer and learnt[-1] == tokenizer.eos_token_id
    assert made.offsets[2] - made.offsets[1] == 24
    assert encoder.prompt(said[1], 10)[0] == tokenizer.bos_token_id and len(encoder.prompt(said[1], 10)) == 10


def test_token_bytes_of_a_sentencepiece_vocabulary() -> None:
    model = tokenizers.models.BPE({"<s>": 0, "\u2581the": 1, "<0xE2>": 2, "\u00e9": 3, "x": 9}, [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), bos_token="<s>")
    assert tokens.token_bytes(tokenizer).tolist() == [0, 4, 1, 2, 0, 0, 0, 0, 0, 1]


def test_no_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no end-of-text token"):
        encode.TextEncoder(bare, 24)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a Hugging Face tokenizer"):
        tokens.load_tokenizer(str(tmp_path))
