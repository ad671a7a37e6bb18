"""The tasks that `sevenfold init` writes recipes for, and which one rows are for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sevenfold.data.sources.formats import SHAPES, recognise
from sevenfold.errors import InputError
from sevenfold.init.languages import languages
from sevenfold.init.rows import Column, Rows, row_text
from sevenfold.recipe import Source


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: Its name.
        objective: The objective that learns it.
        recipe: The shipped recipe whose model, tokenizer and optimizer it takes, if it trains a
            new model; "" if it needs a pretrained one.
        learns: What the model learns, in a few words.
        names: Usual names of columns for each of its roles, beside those of `formats.SHAPES`.
    """

    name: str
    objective: str
    recipe: str
    learns: str
    names: dict[str, tuple[str, ...]]


TASKS = {
    task.name: task
    for task in (
        Task(
            "chat",
            "sft",
            "chat",
            "the assistant's replies",
            {
                "prompt": ("question", "query", "user", "input", "instruction", "human"),
                "completion": ("answer", "response", "assistant", "output", "reply", "bot"),
            },
        ),
        Task(
            "classify",
            "classify",
            "classify",
            "the class of a text",
            {
                "text": ("sentence", "review", "content", "message", "comment", "title", "tweet"),
                "label": ("labels", "class", "category", "sentiment", "target", "stars", "topic"),
            },
        ),
        Task(
            "summarize",
            "seq2seq",
            "summarize",
            "the summary of a text",
            {
                "source": ("document", "article", "text", "body", "content", "dialogue"),
                "target": ("summary", "highlights", "headline", "abstract", "title"),
            },
        ),
        Task(
            "translate",
            "seq2seq",
            "translate-en-de",
            "the translation of a text",
            {
                "source": ("src", "source_text", "from"),
                "target": ("tgt", "target_text", "translation", "to"),
            },
        ),
        Task(
            "retrieve",
            "embed",
            "retrieval",
            "which document answers a query",
            {
                "query": ("question", "anchor", "title"),
                "document": ("positive", "context", "answer", "passage", "text", "body"),
            },
        ),
        Task(
            "prefer",
            "dpo",
            "",
            "which of two replies is preferred",
            {
                "prompt": ("question", "instruction", "input"),
                "chosen": ("preferred", "better", "response_chosen"),
                "rejected": ("dispreferred", "worse", "response_rejected"),
            },
        ),
        Task("pretrain", "causal", "quickstart", "the next token of a text", {}),
    )
}
_LANGUAGE = re.compile(r"[a-z]{2,3}([_-][A-Za-z]{2,4})?")
_SOURCE_TARGET = {"summarize": ("document", "article"), "translate": ("source", "src")}


@dataclass(frozen=True)
class Match:
    """A task, and the columns that it reads.

    Attributes:
        task: The task.
        columns: Role -> column.
        shape: The form of the rows, None for text.
        is_usual: Whether a run finds the columns by their names, so that a recipe need not name
            them.
        certainty: 2: the names of the columns tell the task; 1: they are usual ones for it;
            0: it is a guess by what the columns hold.
    """

    task: Task
    columns: dict[str, str]
    shape: str | None
    is_usual: bool
    certainty: int

    @property
    def is_certain(self) -> bool:
        """Whether the names of the columns tell the task."""
        return self.certainty == 2


def matches(rows: Rows) -> list[Match]:
    """Returns the tasks that rows can be for, the most probable first."""
    found = [match for task in TASKS.values() if (match := match_task(rows, task)) is not None]
    return sorted(found, key=lambda match: -match.certainty)


def match_task(rows: Rows, task: Task) -> Match | None:
    """Returns the columns that a task reads from rows; None if they cannot be for it."""
    names = list(rows.columns)
    if task.name == "pretrain":
        text = "text" if "text" in names else _longest_text(rows)
        if text is None:
            return None
        return Match(task, {"text": text}, None, text == "text", 2 if len(names) == 1 else 0)
    try:
        source = recognise(Source(path=rows.path), task.objective, names, rows.path)
        certain = task.objective != "seq2seq" or _is_usual(source.columns, task)
        return Match(task, source.columns, source.shape, True, 2 if certain else 0)
    except InputError:
        pass
    named = _by_names(task, rows)
    columns = named or _by_values(task, rows)
    if columns is None:
        return None
    languages = task.name == "translate" and all(map(_LANGUAGE.fullmatch, columns.values()))
    certainty = 2 if languages else 1 if named else 0
    shape = "pair" if task.objective == "sft" else SHAPES[task.objective][0].name
    return Match(task, columns, shape, False, certainty)


def texts_of(rows: Rows, match: Match) -> list[str]:
    """Returns the text of each row of the sample in the columns that the match reads."""
    read = set(match.columns.values())
    return [row_text({k: v for k, v in row.items() if k in read}) for row in rows.sample]


def _is_usual(columns: dict[str, str], task: Task) -> bool:
    """Whether the name of the source's column tells summaries from translations."""
    return columns.get("source") in _SOURCE_TARGET[task.name]


def _by_names(task: Task, rows: Rows) -> dict[str, str] | None:
    """Returns the columns by their usual names."""
    lower = {name.lower(): name for name in rows.columns}
    columns: dict[str, str] = {}
    for role, usual in task.names.items():
        name = next((lower[n] for n in (role, *usual) if n in lower), None)
        if name is None or name in columns.values():
            return None
        columns[role] = name
    return columns or None


def _by_values(task: Task, rows: Rows) -> dict[str, str] | None:
    """Returns the columns by what they hold, if there is one choice only."""
    texts = {n: c for n, c in rows.columns.items() if c.texts == c.filled > 0 and not c.lists}
    classes = [name for name, column in rows.columns.items() if column.is_class]
    if task.name == "classify":
        others = [name for name in texts if name not in classes]
        return (
            {"text": others[0], "label": classes[0]} if len(others) == len(classes) == 1 else None
        )
    if len(texts) != 2:
        return None
    first, second = texts
    if task.name == "translate" and all(map(_LANGUAGE.fullmatch, (first, second))):
        return {"source": first, "target": second}
    shorter, longer = sorted(texts, key=lambda name: texts[name].mean_characters)
    if _is_much_longer(texts[longer], texts[shorter]):
        if task.name == "summarize":
            return {"source": longer, "target": shorter}
        if task.name == "retrieve":
            return {"query": shorter, "document": longer}
    return None


def _is_much_longer(longer: Column, shorter: Column) -> bool:
    return longer.mean_characters > 3 * shorter.mean_characters


def _longest_text(rows: Rows) -> str | None:
    texts = {n: c for n, c in rows.columns.items() if c.texts == c.filled > 0}
    return max(texts, key=lambda name: texts[name].characters, default=None)


def require_match(rows: Rows, name: str | None) -> Match:
    """Returns the match of a task that is given by its name, or else the most probable one.

    Raises:
        InputError: The rows cannot be for this task, or for none.
    """
    listed = ", ".join(rows.columns) or "none"
    if name is not None:
        match = match_task(rows, TASKS[name])
        if match is None:
            roles = " and ".join(TASKS[name].names) or "text"
            raise InputError(
                f"{rows.path}: --task {name} needs columns for {roles}, found the columns "
                f"{listed}: rename the right ones to these names"
            )
        return match
    found = matches(rows)
    if found:
        return found[0]
    raise InputError(
        f"{rows.path}: found no task for the columns {listed}: name one by --task "
        f"({', '.join(TASKS)})"
    )


def describe_columns(rows: Rows) -> list[tuple[Any, ...]]:
    """Returns a row of a table for each column."""
    return [
        (
            name,
            f"{column.filled:,}",
            f"{len(column.values):,}" if column.is_class else "",
            f"{column.mean_characters:,.0f}",
            languages(row.get(name) for row in rows.sample),
            column.example,
        )
        for name, column in rows.columns.items()
    ]
