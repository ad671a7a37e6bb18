"""What is in training data: figures of texts that pass by once."""

from __future__ import annotations

import functools
import unicodedata
from array import array
from collections import Counter
from typing import Any

import numpy as np
import regex
from datasketch import MinHash, MinHashLSH
from xxhash import xxh3_64_intdigest

from sevenfold.evaluate import personal

SCRIPTS = {
    "Latin": r"\p{Latin}", "Han": r"\p{Han}", "Cyrillic": r"\p{Cyrillic}", "Arabic": r"\p{Arabic}", "Hangul": r"\p{Hangul}",
    "Kana": r"[\p{Hiragana}\p{Katakana}]", "Devanagari": r"\p{Devanagari}", "Greek": r"\p{Greek}", "Hebrew": r"\p{Hebrew}",
    "Thai": r"\p{Thai}",
}  # fmt: skip
OTHER = "other"
PLACES = 5  # that are named of each finding
SHINGLE = 5  # words: as arXiv 2107.06499
ALIKE = 0.8  # Jaccard index of shingles from which on two texts are near duplicates, as there
PERMUTATIONS = 128  # the estimate's standard deviation is at most 0.5 / sqrt(128) = 0.044


@functools.cache
def _scripts() -> np.ndarray:
    """By code point: uint8, the script's number from 1, in the order of SCRIPTS, then of OTHER letters; 0: no letter."""
    every = "".join(map(chr, range(0x110000)))
    out = np.zeros(len(every), np.uint8)
    patterns = [r"\p{L}+", *(f"(?:(?=\\p{{L}}){p})+" for p in SCRIPTS.values())]
    for number, pattern in zip([len(SCRIPTS) + 1, *range(1, len(SCRIPTS) + 1)], patterns, strict=True):
        for match in regex.finditer(pattern, every):
            out[match.start() : match.end()] = number
    return out


def letters(text: str) -> dict[str, int]:
    """How many letters of each script a text has; scripts without any are left out."""
    counts = np.bincount(_scripts()[np.frombuffer(text.encode("utf-32-le"), np.uint32)], minlength=len(SCRIPTS) + 2)
    return {name: int(n) for name, n in zip([*SCRIPTS, OTHER], counts[1:], strict=True) if n}


def normalised(text: str) -> str:
    """What two texts must share to count as the same: NFC, case and the width of white space do not matter."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


class NearDuplicates:
    """Texts whose sets of word shingles are about the same, by MinHash and locality-sensitive hashing (datasketch).

    Attributes:
        most: texts that are looked at; `seen`: those that were.
        places: (place, place of the earlier text, estimated Jaccard index) of those that are alike.
    """

    def __init__(self, most: int):
        """Memory holds a signature of each text that is looked at, about 2 kB."""
        self.most = most
        self._index = MinHashLSH(threshold=ALIKE, num_perm=PERMUTATIONS)
        self._signatures: dict[str, MinHash] = {}
        self.seen = 0
        self.places: list[tuple[str, str, float]] = []

    def add(self, text: str, place: str) -> None:
        """A text in its normal form that is no copy of one before."""
        words = text.split()
        if self.seen >= self.most:
            return
        self.seen += 1
        shingles = {" ".join(words[i : i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))}
        signature = MinHash(num_perm=PERMUTATIONS, hashfunc=xxh3_64_intdigest, scheme="affine64")
        signature.update_batch(sorted(shingles))
        alike = [(signature.jaccard(self._signatures[k]), str(k)) for k in self._index.query(signature)]
        if alike and max(alike)[0] >= ALIKE:
            similarity, earlier = max(alike)
            self.places.append((place, earlier, similarity))
            return  # one of each kind is enough to find the next by
        self._index.insert(place, signature)
        self._signatures[place] = signature


class Survey:
    """Adds up what texts are like. Memory holds 8 bytes of each, besides what NearDuplicates does."""

    def __init__(self, near: int):
        """near: as NearDuplicates' most; 0 looks for none."""
        self._near = NearDuplicates(near)
        self._hashes, self._rows = array("Q"), array("Q")
        self._files: list[tuple[int, str]] = []  # (number of its first text, name)
        self._bytes = self._characters = 0
        self._first: set[int] = set()  # hashes of those that NearDuplicates has seen
        self._letters: Counter[str] = Counter()
        self._scripts: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()
        self._shortest = self._longest = (-1, "")  # characters, place; none yet
        self._personal: dict[str, dict[str, Any]] = {k: {"found": 0, "texts": 0, "first": []} for k in personal.KINDS}

    def add(self, text: str, file: str, row: int) -> None:
        """A text and where it lies."""
        place = f"{file}: row {row}"
        if not self._files or self._files[-1][1] != file:
            self._files.append((len(self._rows), file))
        self._rows.append(row)
        plain = normalised(text)
        digest = xxh3_64_intdigest(plain.encode())
        self._hashes.append(digest)
        if self._near.seen < self._near.most and digest not in self._first:
            self._first.add(digest)
            self._near.add(plain, place)
        self._bytes += len(text.encode())
        self._characters += len(text)
        self._lengths[len(text).bit_length()] += 1
        if len(text) < self._shortest[0] or self._shortest[0] < 0:
            self._shortest = len(text), place
        if len(text) > self._longest[0]:
            self._longest = len(text), place
        if found := letters(text):
            self._letters.update(found)
            self._scripts[max(found, key=lambda k: found[k])] += 1
        self._look_for_persons(text, place)

    def _look_for_persons(self, text: str, place: str) -> None:
        seen = set()
        for kind, value in personal.found(text):
            told = self._personal[kind]
            told["found"] += 1
            told["texts"] += kind not in seen
            seen.add(kind)
            if len(told["first"]) < PLACES:
                told["first"].append({"place": place, "value": personal.masked(value)})

    def figures(self) -> dict[str, Any]:
        """All of it, as plain data."""
        texts = len(self._rows)
        return {
            "texts": texts, "bytes": self._bytes, "characters": self._characters,
            "exact_duplicates": self._copies(),
            "near_duplicates": {
                "looked_at": self._near.seen, "texts": len(self._near.places),
                "first": [{"place": a, "like": b, "jaccard": j} for a, b, j in self._near.places[:PLACES]],
            },
            "scripts": [
                {"script": k, "letters": n, "share": n / self._letters.total(), "texts": self._scripts[k]}
                for k, n in self._letters.most_common()
            ],
            "personal": self._personal,
            "lengths": [{"from": 1 << b >> 1, "below": 1 << b, "texts": self._lengths[b]}
                        for b in range(min(self._lengths, default=0), max(self._lengths, default=-1) + 1)],
            "shortest": {"characters": self._shortest[0], "place": self._shortest[1]},
            "longest": {"characters": self._longest[0], "place": self._longest[1]},
        }  # fmt: skip

    def _copies(self) -> dict[str, Any]:
        """How many texts are a copy of one before, and those that are there most often."""
        _, at, counts = np.unique(np.array(self._hashes, np.uint64), return_index=True, return_counts=True)
        most = np.argsort(-counts, kind="stable")[:PLACES]
        often = [{"copies": int(counts[i]), "place": self._place(int(at[i]))} for i in most if counts[i] > 1]
        return {"texts": len(self._hashes) - len(counts), "most": often}

    def _place(self, number: int) -> str:
        file = next(name for first, name in reversed(self._files) if first <= number)
        return f"{file}: row {self._rows[number]}"
