"""Statistics of texts, collected in one pass."""

from __future__ import annotations

import functools
import unicodedata
from array import array
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import regex
from datasketch import MinHash, MinHashLSH
from xxhash import xxh3_64_intdigest

from sevenfold.data.text import UNSPACED
from sevenfold.data.text import words as script_words
from sevenfold.inspect import personal_data

SCRIPTS = {
    "Latin": r"\p{Latin}",
    "Han": r"\p{Han}",
    "Cyrillic": r"\p{Cyrillic}",
    "Arabic": r"\p{Arabic}",
    "Hangul": r"\p{Hangul}",
    "Kana": r"[\p{Hiragana}\p{Katakana}]",
    "Devanagari": r"\p{Devanagari}",
    "Greek": r"\p{Greek}",
    "Hebrew": r"\p{Hebrew}",
    "Thai": r"\p{Thai}",
}
OTHER = "other"
PLACES = 5  # examples that are listed of each finding
SHINGLE = 5  # words of a shingle, as in arXiv 2107.06499
# Characters of a shingle in scripts without spaces, where texts are short: each one that is changed
# changes as many shingles.
SHINGLE_UNSPACED = 3
ALIKE = 0.8  # near duplicates have a Jaccard index of shingles of this or more (arXiv 2107.06499)
PERMUTATIONS = 128  # the estimate's standard deviation is at most 0.5 / sqrt(128) = 0.044


@functools.cache
def _script_of_code_point() -> np.ndarray:
    """Returns the number of each code point's script, uint8 [0x110000].

    0 is for what is not a letter. Scripts are numbered from 1, in the order of SCRIPTS; the last
    number is for letters of other scripts.
    """
    characters = "".join(map(chr, range(0x110000)))
    numbers = np.zeros(len(characters), np.uint8)
    # All letters first; those of the scripts are then overwritten.
    patterns = [(len(SCRIPTS) + 1, r"\p{L}+")]
    for number, script in enumerate(SCRIPTS.values(), 1):
        patterns.append((number, f"(?:(?=\\p{{L}}){script})+"))
    for number, pattern in patterns:
        for match in regex.finditer(pattern, characters):
            numbers[match.start() : match.end()] = number
    return numbers


def letters(text: str) -> dict[str, int]:
    """Counts the letters of each script in a text; scripts without letters in it are left out."""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    counts = np.bincount(_script_of_code_point()[code_points], minlength=len(SCRIPTS) + 2)
    return {name: int(n) for name, n in zip([*SCRIPTS, OTHER], counts[1:], strict=True) if n}


def normalised(text: str) -> str:
    """Returns the form in which exact duplicates are equal: NFC, case-folded, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


class NearDuplicates:
    """Finds texts with similar sets of word shingles, by MinHash and LSH (datasketch).

    It keeps a signature of each distinct text, about 2 kB.

    Args:
        most: The number of texts to check; later ones are ignored.

    Attributes:
        most: As the argument.
        seen: The number of texts checked so far.
        places: (place, place of the earlier text, estimated Jaccard index) of each near duplicate.
    """

    def __init__(self, most: int):
        self.most = most
        self._index = MinHashLSH(threshold=ALIKE, num_perm=PERMUTATIONS)
        self._signatures: dict[str, MinHash] = {}
        self.seen = 0
        self.places: list[tuple[str, str, float]] = []

    def add(self, text: str, place: str) -> None:
        """Checks a text against the earlier ones.

        Args:
            text: A normalised text that is not an exact duplicate of an earlier one.
            place: Where the text is found.
        """
        if self.seen >= self.most:
            return
        self.seen += 1
        words, length = text.split(), SHINGLE
        if regex.search(f"[{UNSPACED}]", text):
            words, length = script_words(text), SHINGLE_UNSPACED
        shingles = {
            " ".join(words[i : i + length]).encode() for i in range(max(1, len(words) - length + 1))
        }
        signature = MinHash(num_perm=PERMUTATIONS, hashfunc=xxh3_64_intdigest, scheme="affine64")
        signature.update_batch(sorted(shingles))
        candidates = [
            (signature.jaccard(self._signatures[k]), str(k)) for k in self._index.query(signature)
        ]
        if candidates and max(candidates)[0] >= ALIKE:
            similarity, earlier = max(candidates)
            self.places.append((place, earlier, similarity))
            return  # the earlier text is enough to find further near duplicates
        self._index.insert(place, signature)
        self._signatures[place] = signature


class _Length(NamedTuple):
    """The length of a text and where the text is found."""

    characters: int
    place: str


class Survey:
    """Collects statistics of texts.

    It keeps 16 bytes per text, besides what NearDuplicates keeps.

    Args:
        near: The number of distinct texts to check for near duplicates; 0 for none.
    """

    def __init__(self, near: int):
        self._near = NearDuplicates(near)
        self._hashes, self._rows = array("Q"), array("Q")  # of each text
        self._files: list[tuple[int, str]] = []  # (index of its first text, name)
        self._bytes = self._characters = 0
        self._checked: set[int] = set()  # hashes of the texts that NearDuplicates has seen
        self._letters: Counter[str] = Counter()
        self._main_scripts: Counter[str] = Counter()  # texts by the script of most of their letters
        self._lengths: Counter[int] = Counter()  # texts by bits of the number of characters
        self._shortest = self._longest = _Length(-1, "")  # -1: no text yet
        self._personal: dict[str, dict[str, Any]] = {
            k: {"found": 0, "texts": 0, "first": []} for k in personal_data.KINDS
        }

    def add(self, text: str, file: str, row: int) -> None:
        """Adds a text.

        Args:
            text: The text.
            file: Its file. The texts of a file are added one after the other.
            row: Its row in the file, from 1.
        """
        place = f"{file}: row {row}"
        if not self._files or self._files[-1][1] != file:
            self._files.append((len(self._rows), file))
        self._rows.append(row)
        plain = normalised(text)
        digest = xxh3_64_intdigest(plain.encode())
        self._hashes.append(digest)
        if self._near.seen < self._near.most and digest not in self._checked:
            self._checked.add(digest)
            self._near.add(plain, place)
        self._bytes += len(text.encode())
        self._characters += len(text)
        self._lengths[len(text).bit_length()] += 1
        if len(text) < self._shortest.characters or self._shortest.characters < 0:
            self._shortest = _Length(len(text), place)
        if len(text) > self._longest.characters:
            self._longest = _Length(len(text), place)
        if counts := letters(text):
            self._letters.update(counts)
            self._main_scripts[max(counts, key=lambda k: counts[k])] += 1
        self._find_personal_data(text, place)

    def _find_personal_data(self, text: str, place: str) -> None:
        kinds_in_text = set()
        for kind, value in personal_data.found(text):
            counts = self._personal[kind]
            counts["found"] += 1
            counts["texts"] += kind not in kinds_in_text
            kinds_in_text.add(kind)
            if len(counts["first"]) < PLACES:
                counts["first"].append({"place": place, "value": personal_data.masked(value)})

    def figures(self) -> dict[str, Any]:
        """Returns all statistics as plain data."""
        texts = len(self._rows)
        return {
            "texts": texts,
            "bytes": self._bytes,
            "characters": self._characters,
            "exact_duplicates": self._exact_duplicates(),
            "near_duplicates": {
                "looked_at": self._near.seen,
                "texts": len(self._near.places),
                "first": [
                    {"place": a, "like": b, "jaccard": j} for a, b, j in self._near.places[:PLACES]
                ],
            },
            "scripts": [
                {
                    "script": k,
                    "letters": n,
                    "share": n / self._letters.total(),
                    "texts": self._main_scripts[k],
                }
                for k, n in self._letters.most_common()
            ],
            "personal": self._personal,
            "lengths": [
                {"from": 1 << b >> 1, "below": 1 << b, "texts": self._lengths[b]}
                for b in range(min(self._lengths, default=0), max(self._lengths, default=-1) + 1)
            ],
            "shortest": self._shortest._asdict(),
            "longest": self._longest._asdict(),
        }

    def _exact_duplicates(self) -> dict[str, Any]:
        """Returns the number of copies of earlier texts, and the texts with the most copies."""
        _, first_indices, counts = np.unique(
            np.array(self._hashes, np.uint64), return_index=True, return_counts=True
        )
        most_frequent = np.argsort(-counts, kind="stable")[:PLACES]
        repeated = [
            {"copies": int(counts[i]), "place": self._place(int(first_indices[i]))}
            for i in most_frequent
            if counts[i] > 1
        ]
        return {"texts": len(self._hashes) - len(counts), "most": repeated}

    def _place(self, index: int) -> str:
        """Returns where a text is found, by its index among all texts."""
        file = next(name for first, name in reversed(self._files) if first <= index)
        return f"{file}: row {self._rows[index]}"
