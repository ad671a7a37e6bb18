from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from sevenfold.data import tokens
from sevenfold.data.manifest import scan
from sevenfold.errors import InputError
from sevenfold.recipe import Source


@pytest.fixture(scope="module")
def tokenizer(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    found = scan([Source(path=str(texts / "train"))], ("text",))
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tokens.save_tokenizer(tokens.train_tokenizer(found, 600, 0.5, 0), folder)
    return tokens.load_tokenizer(folder)  # type: ignore[return-value]


def column(*texts: str) -> pa.ChunkedArray:
    return pa.chunked_array([list(texts)])


def test_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 600
    text = "def f(x):\n    return 'über' + x\n"
    made = tokens.TextEncoder(tokenizer, 24)([column(text, "", "pass")])
    first = made.tokens[: made.lengths[0]]
    assert len(made.lengths) == 2 and made.targets.all()
    assert first[0] == tokenizer.bos_token_id and first[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(first[1:-1]) == text


def test_a_special_tokens_spelling_stays_text(tokenizer: PreTrainedTokenizerFast) -> None:
    made = tokens.TextEncoder(tokenizer, 24)([column("a <|eos|> b")])
    assert (made.tokens == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(made.tokens[1:-1]) == "a <|eos|> b"


def test_token_bytes_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "naïve 中文 <|pad|> \n\tif x: 🙂"
    made = tokens.TextEncoder(tokenizer, 24)([column(text)])
    assert tokens.token_bytes(tokenizer)[made.tokens].sum() == len(text.encode())


def test_completions(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = tokens.CompletionEncoder(tokenizer, 24)
    made = encoder([column("short: ", "word " * 200), column("answer", "the answer")])
    ends = np.cumsum(made.lengths)
    for i, answer in enumerate(("answer", "the answer")):
        row = slice(ends[i] - made.lengths[i], ends[i])
        learnt = made.tokens[row][made.targets[row]]
        assert tokenizer.decode(learnt[:-1]) == answer and learnt[-1] == tokenizer.eos_token_id
    assert made.lengths[1] == 24
    assert encoder.prompt("word " * 200, 10)[0] == tokenizer.bos_token_id and len(encoder.prompt("word " * 200, 10)) == 10


def test_token_bytes_of_a_sentencepiece_vocabulary() -> None:
    model = tokenizers.models.BPE({"<s>": 0, "\u2581the": 1, "<0xE2>": 2, "\u00e9": 3, "x": 9}, [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), bos_token="<s>")
    assert tokens.token_bytes(tokenizer).tolist() == [0, 4, 1, 2, 0, 0, 0, 0, 0, 1]


def test_no_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no end-of-text token"):
        tokens.TextEncoder(bare, 24)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a Hugging Face tokenizer"):
        tokens.load_tokenizer(str(tmp_path))
