"""A finished model looked into: what each token of a text cost it, and what the next token hangs on. Without Ray."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.text import Text
from tokenizers.decoders import DecodeStream

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.evaluate import look
from sevenfold.evaluate.look import Scores
from sevenfold.model.load import Loaded, load
from sevenfold.report.console import console, say, table

Row = dict[str, Any]
DEEPEST = 8.0  # nats that are shown in the deepest colour


def run(
    path: str, text: str, target: str | None = None, saliency: bool = False, attention: bool = False, out: str | None = None
) -> dict[str, Any]:
    """Prints a table of the text's tokens, and returns its figures: of a decoder each token's loss given those before it (with
    a target: the target's, given the text); of an encoder each one's when it alone is hidden; of an encoder-decoder those of
    the target, given the text as source.

    Args:
        saliency, attention: of the text's tokens for the token that follows: see evaluate.look.
        out: JSON file for all figures.

    Raises:
        InputError: no such model, no text, more tokens than it has positions, something asked that its family has not.
    """
    if not text.strip() or target == "":
        raise InputError(f"--{'target' if target == '' else 'text'}: expected text, found none")
    loaded = load(path, attention="eager" if attention else None)
    if loaded.family == "encoder-decoder" and target is None and not (saliency or attention):
        raise InputError(f"{loaded.path}: an encoder-decoder: expected --target TEXT too, whose tokens' losses are asked for")
    if loaded.family == "encoder" and (saliency or target is not None):
        raise InputError(
            f"{loaded.path}: an encoder foretells no next token: leave out {'--saliency' if saliency else '--target'}"
        )
    rows, given = _rows(loaded, text, target)
    figures: dict[str, Any] = {"model": loaded.path, "family": loaded.family, **_measured(loaded, rows)}
    ids = [r["id"] for r in rows[:given]]
    if saliency:
        first = rows[given]["id"] if target is not None else None
        found = look.saliency(loaded, ids, first)
        figures["next"] = {"id": found.token, "token": _word(loaded, found.token), "probability": math.exp(found.logp)}
        for row, score in zip(rows, found.scores.tolist(), strict=False):
            row["saliency"] = score
    if attention:
        for row, share in zip(rows, look.attention(loaded, ids).tolist(), strict=False):
            row["attention"] = share
    figures["tokens"] = rows
    _show(loaded, figures)
    if out:
        storage.write(storage.place(out), json.dumps(figures, ensure_ascii=False, indent=1))
        say(f"all figures: {storage.place(out)}")
    return figures


def _rows(loaded: Loaded, text: str, target: str | None) -> tuple[list[Row], int]:
    """A row a token, with its loss where it has one; and how many of them are read before the target."""
    given = loaded.framed(text, tail=loaded.family != "decoder")
    answer: list[int] = []
    if target is not None:
        end = loaded.encoder.tail if loaded.family == "encoder-decoder" else None
        answer = [*loaded.encoder.ids([target])[0], *([] if end is None else [end])]
    longest = max(len(given), len(answer)) if loaded.family == "encoder-decoder" else len(given) + len(answer)
    if loaded.positions is not None and longest > loaded.positions:
        raise InputError(f"the text: expected at most {loaded.positions:,} tokens, found {longest:,}: give less of it")
    head = int(loaded.encoder.head is not None)
    if loaded.family == "encoder-decoder":
        asked = range(len(given), len(given) + len(answer))
        scores = look.target_scores(loaded, given, answer) if answer else None
    elif loaded.family == "encoder":
        asked = range(head, len(given) - int(loaded.encoder.tail is not None))
        scores = look.masked_scores(loaded, given, asked)
    else:
        asked = range(len(given) if answer else max(1, head), len(given) + len(answer))
        scores = look.decoder_scores(loaded, given + answer, asked.start) if asked else None
    rows: list[Row] = [
        {"part": "text" if i < len(given) else "target", "id": t, "token": _word(loaded, t)}
        for i, t in enumerate(given + answer)
    ]
    if scores is not None:
        _add(rows, asked, scores)
    return rows, len(given)


def _add(rows: list[Row], asked: range, scores: Scores) -> None:
    for i, nats, rank in zip(asked, scores.nats.tolist(), scores.ranks.tolist(), strict=True):
        rows[i] |= {"nats": nats, "probability": math.exp(-nats), "rank": rank}


def _measured(loaded: Loaded, rows: list[Row]) -> dict[str, Any]:
    """The sum and mean of the losses, in nats."""
    nats = [r["nats"] for r in rows if "nats" in r]
    if not nats:
        return {}
    name = "pseudo_perplexity" if loaded.family == "encoder" else "perplexity"
    mean = sum(nats) / len(nats)
    return {"scored": len(nats), "nats": sum(nats), "nats_per_token": mean, name: math.exp(min(mean, 700.0))}


def _word(loaded: Loaded, token: int) -> str:
    return str(loaded.tokenizer.decode([token]))


def _show(loaded: Loaded, figures: dict[str, Any]) -> None:
    rows = figures["tokens"]
    columns = ["nats", "probability", "rank", *(c for c in ("saliency", "attention") if c in rows[0])]
    table(
        f"{loaded.path}: {loaded.family}", ["token", "part", *columns],
        [(repr(r["token"])[1:-1], r["part"], *(r.get(c) for c in columns)) for r in rows],
    )  # fmt: skip
    if console.is_terminal:
        console.print(_coloured(loaded, rows))
    if "nats" in figures:
        told = "; ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in figures.items() if isinstance(v, float))
        say(f"{figures['scored']:,} tokens: {told}")
    if "next" in figures:
        say(f"saliency: of {figures['next']['token']!r}, p = {figures['next']['probability']:.4g}, for (+) or against (-) it")
    if "attention" in rows[0]:
        say("attention: of the last layer, mean over heads, from where the next token is foretold")


def _coloured(loaded: Loaded, rows: list[Row]) -> Text:
    """The text itself, the redder the dearer a token was."""
    stream, out = DecodeStream(skip_special_tokens=True), Text()
    for row in rows:
        piece = stream.step(loaded.tokenizer.backend_tokenizer, row["id"]) or ""
        if "nats" in row:
            paler = round(255 * (1 - min(row["nats"], DEEPEST) / DEEPEST))
            out.append(piece, f"black on rgb(255,{paler},{paler})")
        else:
            out.append(piece)
    return out
