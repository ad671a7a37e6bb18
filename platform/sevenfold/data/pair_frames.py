"""The special tokens that a tokenizer puts around source and target of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sevenfold.data.encode import eos_id
from sevenfold.errors import InputError

_TEXT = "a"  # a text whose own ids are known, to find what is around it


@dataclass(frozen=True)
class Frame:
    """The ids before and after a text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def around(self, ids: list[int], room: int | None = None) -> list[int]:
        """Returns a text in its frame.

        Args:
            ids: The ids of the text; it is cut at its end if there is too little room.
            room: The maximum number of ids in all. None: no limit.
        """
        kept = ids if room is None else ids[: max(0, room - len(self))]
        return [*self.before, *kept, *self.after]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


@dataclass(frozen=True)
class PairFrames:
    """The frames of source and target."""

    source: Frame
    target: Frame

    def to_json(self) -> dict[str, Any]:
        """Returns the frames as a tree for JSON."""
        return asdict(self)

    @staticmethod
    def from_json(tree: dict[str, Any]) -> PairFrames:
        """Returns the frames of `to_json`."""
        source, target = (
            Frame(tuple(map(int, tree[side]["before"])), tuple(map(int, tree[side]["after"])))
            for side in ("source", "target")
        )
        return PairFrames(source, target)


def set_languages(tokenizer: Any, languages: Mapping[Any, str] | None) -> None:
    """Sets the languages of source and target of a multilingual tokenizer.

    Args:
        tokenizer: The tokenizer.
        languages: The codes by "source" and "target", from the recipe.

    Raises:
        InputError: The tokenizer has languages and none are given, or the other way around; or it
            does not know one of them.
    """
    has_languages = hasattr(tokenizer, "src_lang")
    if has_languages != bool(languages):
        found, do = (
            ("none", "give the languages of the data, such as {source: en_XX, target: de_DE}")
            if has_languages
            else (str(languages), "remove the setting")
        )
        raise InputError(
            f"data.languages: expected {'two languages' if has_languages else 'no setting'} for a "
            f"tokenizer {'with' if has_languages else 'without'} tokens of languages, found "
            f"{found}: {do}"
        )
    if not languages:
        return
    known = sorted(tokenizer.get_added_vocab())
    for side, code in languages.items():
        if code not in known:
            examples = ", ".join(c for c in known if "_" in c) or ", ".join(known)
            raise InputError(
                f"data.languages.{side}: expected a language of the tokenizer ({examples[:200]}), "
                f"found {code}"
            )
    tokenizer.tgt_lang = languages["target"]
    tokenizer.src_lang = languages["source"]


def pair_frames(tokenizer: Any) -> PairFrames:
    """Returns the frames that a tokenizer itself puts around source and target.

    A text that it leaves without an end token gets one.

    Raises:
        InputError: The tokenizer writes something after the end of a target, where a decoder has
            stopped.
    """
    source = source_frame(tokenizer)
    target = _frame(tokenizer, tokenizer(text_target=_TEXT).input_ids)
    end = eos_id(tokenizer)
    if target.after[-1:] != (end,):
        raise InputError(
            "objective seq2seq: expected a tokenizer that ends a target with its end token, found "
            f"{tokenizer.convert_ids_to_tokens(list(target.after))} after the text, as mBART-25's "
            "writes the language there: choose a model such as mBART-50 or NLLB"
        )
    return PairFrames(source, target)


def source_frame(tokenizer: Any) -> Frame:
    """Returns the frame that a tokenizer itself puts around a source."""
    return _frame(tokenizer, tokenizer(_TEXT).input_ids)


def _frame(tokenizer: Any, framed: list[int]) -> Frame:
    """Returns what is around the ids of _TEXT, with an end token if there is nothing after it."""
    ids = tokenizer(_TEXT, add_special_tokens=False).input_ids
    starts = range(len(framed) - len(ids) + 1)
    start = next((i for i in starts if framed[i : i + len(ids)] == ids), None)
    if start is None:
        raise InputError(
            "objective seq2seq: expected a tokenizer that puts special tokens before and after a "
            f"text, found that {tokenizer.convert_ids_to_tokens(ids)} becomes "
            f"{tokenizer.convert_ids_to_tokens(framed)}"
        )
    end = eos_id(tokenizer)
    after = tuple(framed[start + len(ids) :]) or (() if end is None else (end,))
    return Frame(tuple(framed[:start]), after)
