"""The command `inspect RUN`: the losses of a text's tokens, and attributions of the next token.

It runs without Ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.inference.load import Loaded, load
from sevenfold.inspect import attribution
from sevenfold.inspect.attribution import Scores
from sevenfold.report.console import print_styled, say, table

Row = dict[str, Any]
DARKEST_NATS = 8.0  # tokens with this loss or more are shown in the darkest colour


class _Tokens(NamedTuple):
    """The tokens of text and target.

    Attributes:
        rows: A row per token, with its loss if it has one.
        text_length: The number of tokens of the text. Those of the target follow.
    """

    rows: list[Row]
    text_length: int


def run(
    path: str,
    text: str,
    target: str | None = None,
    saliency: bool = False,
    attention: bool = False,
    out: str | None = None,
) -> dict[str, Any]:
    """Prints a table of a text's tokens with their losses, and returns its values.

    For a decoder, each token is predicted from those before it; if there is a target, only the
    target's tokens are. For an encoder, each token is masked alone and predicted from all others.
    For an encoder-decoder, the target's tokens are predicted, with the text as the source.

    Args:
        path: A run or a Hugging Face directory.
        text: The text.
        target: What follows the text, or the answer of an encoder-decoder.
        saliency: Adds the attribution of the next token to the text's tokens; see
            `attribution.saliency`.
        attention: Adds the last layer's attention to the text's tokens; see
            `attribution.attention`.
        out: The path of a JSON file for all values.

    Raises:
        InputError: There is no such model or no text, the text has more tokens than the model has
            positions, or the model's family does not support what is requested.
    """
    if not text.strip() or target == "":
        raise InputError(f"--{'target' if target == '' else 'text'}: expected text, found none")
    loaded = load(path, attention="eager" if attention else None)
    _check_family(loaded, target, saliency, attention)
    rows, text_length = _score(loaded, text, target)
    report: dict[str, Any] = {
        "model": loaded.path,
        "family": loaded.family,
        **_totals(loaded, rows),
    }
    ids = [r["id"] for r in rows[:text_length]]
    if saliency:
        first_of_target = rows[text_length]["id"] if target is not None else None
        attributions = attribution.saliency(loaded, ids, first_of_target)
        report["next"] = {
            "id": attributions.token,
            "token": _decode(loaded, attributions.token),
            "probability": math.exp(attributions.logp),
        }
        for row, score in zip(rows, attributions.scores.tolist(), strict=False):
            row["saliency"] = score
    if attention:
        for row, weight in zip(rows, attribution.attention(loaded, ids).tolist(), strict=False):
            row["attention"] = weight
    report["tokens"] = rows
    _show(loaded, report)
    if out:
        storage.write_json(storage.resolve_output(out), report)
        say(f"full report: {storage.resolve_output(out)}")
    return report


def _check_family(loaded: Loaded, target: str | None, saliency: bool, attention: bool) -> None:
    """Raises InputError if the model's family does not support what is requested."""
    if loaded.family == "encoder-decoder" and target is None and not (saliency or attention):
        raise InputError(
            f"{loaded.path}: an encoder-decoder: expected --target TEXT too, "
            "since only the target's tokens have losses"
        )
    if loaded.family == "encoder" and (saliency or target is not None):
        raise InputError(
            f"{loaded.path}: an encoder does not predict the next token: "
            f"leave out {'--saliency' if saliency else '--target'}"
        )


def _score(loaded: Loaded, text: str, target: str | None) -> _Tokens:
    """Tokenizes text and target, and computes the losses."""
    text_ids = loaded.framed(text, tail=loaded.family != "decoder")
    target_ids: list[int] = []
    if target is not None:
        end = loaded.encoder.tail if loaded.family == "encoder-decoder" else None
        target_ids = [*loaded.encoder.ids([target])[0], *([] if end is None else [end])]
    _check_length(loaded, len(text_ids), len(target_ids))
    head = int(loaded.encoder.head is not None)
    total = len(text_ids) + len(target_ids)
    if loaded.family == "encoder-decoder":
        scored = range(len(text_ids), total)
        scores = attribution.target_scores(loaded, text_ids, target_ids) if target_ids else None
    elif loaded.family == "encoder":
        scored = range(head, len(text_ids) - int(loaded.encoder.tail is not None))
        scores = attribution.masked_scores(loaded, text_ids, scored)
    else:
        # Nothing predicts the first token.
        scored = range(len(text_ids) if target_ids else max(1, head), total)
        ids = text_ids + target_ids
        scores = attribution.decoder_scores(loaded, ids, scored.start) if scored else None
    rows: list[Row] = [
        {"part": "text" if i < len(text_ids) else "target", "id": t, "token": _decode(loaded, t)}
        for i, t in enumerate(text_ids + target_ids)
    ]
    if scores is not None:
        _add_scores(rows, scored, scores)
    return _Tokens(rows, len(text_ids))


def _check_length(loaded: Loaded, text_length: int, target_length: int) -> None:
    """Raises InputError if text and target have more tokens than the model has positions."""
    if loaded.family == "encoder-decoder":  # each side has its own positions
        length = max(text_length, target_length)
    else:
        length = text_length + target_length
    if loaded.positions is not None and length > loaded.positions:
        raise InputError(
            f"the text: expected at most {loaded.positions:,} tokens, found {length:,}: shorten it"
        )


def _add_scores(rows: list[Row], scored: range, scores: Scores) -> None:
    for i, nats, rank in zip(scored, scores.nats.tolist(), scores.ranks.tolist(), strict=True):
        rows[i] |= {"nats": nats, "probability": math.exp(-nats), "rank": rank}


def _totals(loaded: Loaded, rows: list[Row]) -> dict[str, Any]:
    """Returns the sum and mean of the losses, in nats, and the perplexity."""
    nats = [r["nats"] for r in rows if "nats" in r]
    if not nats:
        return {}
    name = "pseudo_perplexity" if loaded.family == "encoder" else "perplexity"
    mean = sum(nats) / len(nats)
    return {
        "scored": len(nats),
        "nats": sum(nats),
        "nats_per_token": mean,
        name: math.exp(min(mean, 700.0)),  # exp overflows above 709
    }


def _decode(loaded: Loaded, token: int) -> str:
    r"""Returns the text of a token; bytes that are part of a character as \xe4 and so on."""
    text = str(loaded.tokenizer.decode([token]))
    if "\ufffd" not in text:
        return text
    raw = str(loaded.tokenizer.convert_ids_to_tokens(token))
    if raw.startswith("<0x"):  # SentencePiece
        return f"\\x{raw[3:5].lower()}"
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    if not all(character in byte_of for character in raw):
        return text
    return bytes(byte_of[c] for c in raw).decode("utf-8", "backslashreplace")


def _show(loaded: Loaded, report: dict[str, Any]) -> None:
    rows = report["tokens"]
    columns = [
        "nats",
        "probability",
        "rank",
        *(c for c in ("saliency", "attention") if c in rows[0]),
    ]
    table(
        f"{loaded.path}: {loaded.family}",
        ["token", "part", *columns],
        [(repr(r["token"])[1:-1], r["part"], *(r.get(c) for c in columns)) for r in rows],
    )
    print_styled(_coloured(loaded, rows))
    if "nats" in report:
        totals = "; ".join(
            f"{k.replace('_', ' ')} {v:.4g}" for k, v in report.items() if isinstance(v, float)
        )
        say(f"{report['scored']:,} tokens: {totals}")
    if "next" in report:
        say(
            f"saliency: gradient x input of log p({report['next']['token']!r}), "
            f"p = {report['next']['probability']:.4g}; "
            "positive scores make it more probable, negative ones less"
        )
    if "attention" in rows[0]:
        cross = loaded.family == "encoder-decoder"
        position = "the decoder's first position" if cross else "the last position"
        say(f"attention: last layer, mean over heads, from {position}")


def _coloured(loaded: Loaded, rows: list[Row]) -> Iterator[tuple[str, str]]:
    """Yields the text in pieces with a red background, darker for tokens with a higher loss."""
    stream = DecodeStream(skip_special_tokens=True)
    for row in rows:
        piece = stream.step(loaded.tokenizer.backend_tokenizer, row["id"]) or ""
        if "nats" in row:
            paleness = round(255 * (1 - min(row["nats"], DARKEST_NATS) / DARKEST_NATS))
            yield piece, f"black on rgb(255,{paleness},{paleness})"
        else:
            yield piece, ""
