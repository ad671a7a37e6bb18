"""Evaluation of a model on held-out data, by its objective, with baselines that need no model.

Ray Data streams the held-out documents through actors that hold the model.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sevenfold.data.examples import first_pairs
from sevenfold.data.rows import IGNORE, Rows, labels
from sevenfold.data.stream import Stream
from sevenfold.data.tokenizer import load_tokenizer, token_bytes
from sevenfold.engine.decode import Sampling
from sevenfold.errors import InputError
from sevenfold.evaluate import baselines, metrics
from sevenfold.evaluate.actors import (
    BATCH,
    ActorPool,
    Classifier,
    Completer,
    Embedding,
    Scorer,
    map_rows,
)
from sevenfold.evaluate.held_out_text import beginning, overlapping_rows
from sevenfold.model import build
from sevenfold.model.config import local_folder
from sevenfold.recipe import Recipe
from sevenfold.report.console import say
from sevenfold.run_folder import RunFolder

UNIGRAM_CHUNKS = 8  # chunks of training text whose tokens the unigram baseline counts
MAX_TRAINING_EXAMPLES = 30_000  # that a baseline learns from
SAMPLES = 3  # documents that are continued to show what the model writes
SAMPLE_TOKENS = 60  # maximum number of new tokens of such a continuation
TOP_DOCUMENTS = 10  # k of the retrieval metrics
BASE = "the model it began with"  # the name of this baseline


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
        metrics: By name. `baselines` has the metrics of each baseline.
        predictions: A row per prediction.
    """

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


def measure(
    folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, pool: ActorPool
) -> Evaluation:
    """Evaluates a run's model on all held-out documents, with the metrics of its objective.

    Args:
        folder: The run.
        recipe: Its recipe.
        train: The training data, from which baselines learn.
        held: The held-out data.
        pool: The actors that hold the model.
    """
    by_objective = {
        "causal": _evaluate_causal,
        "sft": _evaluate_completions,
        "seq2seq": _evaluate_completions,
        "classify": _evaluate_classes,
        "embed": _evaluate_retrieval,
    }
    evaluate = by_objective.get(recipe.objective, _evaluate_loss)
    return evaluate(folder, recipe, train, held, pool)


def _evaluate_causal(
    folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, pool: ActorPool
) -> Evaluation:
    """Computes bits per byte with overlapping windows; the baselines are a unigram model and xz."""
    rows = overlapping_rows(held)
    tokenizer = load_tokenizer(folder.tokenizer)
    bytes_of_token = token_bytes(tokenizer)
    row_labels = labels(rows)
    targets = row_labels[row_labels != IGNORE]
    chunks = range(min(UNIGRAM_CHUNKS, train.order.chunks_per_epoch))
    train_labels = [labels(train.chunk(i).rows) for i in chunks]
    train_targets = np.concatenate([part[part != IGNORE] for part in train_labels])
    texts = [text for (column,) in held.documents() for text in column]
    text_bytes = int(bytes_of_token[targets].sum())
    unigram = metrics.unigram_bits_per_byte(train_targets, targets, text_bytes, len(bytes_of_token))

    def text_metrics(recipe: Recipe, base: bool = False) -> dict[str, float]:
        nats = sum(r["nats"] for r in _score(folder, recipe, rows, pool, base))
        return {
            "bits_per_byte": metrics.bits_per_byte(nats, text_bytes),
            "perplexity": float(np.exp(nats / len(targets))),
        }

    measurements: dict[str, Callable[[], Any]] = {
        "unigram of its tokens": lambda: {"bits_per_byte": unigram},
        "xz -9 of the same text": lambda: {"bits_per_byte": metrics.xz_bits_per_byte(texts)},
    }
    if recipe.model.path is not None:
        of_base = {BASE: lambda: text_metrics(_with_absolute_base(recipe), base=True)}
        measurements = {**of_base, **measurements}
    results = {
        **text_metrics(recipe),
        "baselines": _evaluate_baselines(measurements, lambda measured: measured),
        "documents": len(texts),
        "bytes": text_bytes,
        "tokens": len(targets),
    }
    prompts = [beginning(text, tokenizer) for text in texts[:SAMPLES]]
    return Evaluation(results, _sample_continuations(folder, recipe, prompts, pool))


def _sample_continuations(
    folder: RunFolder, recipe: Recipe, prompts: list[str], pool: ActorPool
) -> list[dict[str, Any]]:
    """Continues texts by sampling."""
    max_new_tokens = min(SAMPLE_TOKENS, recipe.data.sequence_length // 2)
    sampling = Sampling(max_new_tokens, 0.7, seed=recipe.seed)
    rows = map_rows(
        pa.table({"model_input": prompts, "prompt": prompts}),
        Completer,
        {"folder": folder, "recipe": recipe, "sampling": sampling},
        pool._replace(size=1),
    )
    return [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows]


def _evaluate_loss(
    folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, pool: ActorPool
) -> Evaluation:
    """Computes the objective's own loss, with the same masks as each validation.

    For preferences it also computes the accuracy: the share of pairs in which the chosen answer has
    gained more probability than the rejected one, compared with the reference model.
    """
    rows = held.epoch()
    is_preference = recipe.objective == "dpo"
    if is_preference and recipe.model.path is not None:
        recipe = _with_absolute_base(recipe)
    scores = _score(folder, recipe, rows, pool)
    targets = sum(int(r["targets"]) for r in scores)
    loss = sum(r["nats"] for r in scores) / max(1, targets)
    results: dict[str, Any]
    if is_preference:
        right = sum(int(r["right"]) for r in scores)
        reference = {"loss": float(np.log(2)), "accuracy": 0.5}
        results = {
            "loss": loss,
            "accuracy": right / max(1, targets),
            "pairs": targets,
            "baselines": {BASE: reference},
        }
    else:
        results = {
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "targets": targets,
            "rows": len(rows),
            "baselines": {},
        }
    return Evaluation(results, [])


def _evaluate_completions(
    folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, pool: ActorPool
) -> Evaluation:
    """Compares the greedy completion of every held-out prompt with its reference."""
    pairs = first_pairs(held)
    columns = ("model_input", "prompt", "reference")
    sampling = Sampling(recipe.validation.max_new_tokens, 0.0, seed=recipe.seed)
    table = pa.table({name: [pair[i] for pair in pairs] for i, name in enumerate(columns)})

    def complete(recipe: Recipe, base: bool = False) -> list[dict[str, Any]]:
        arguments = {"folder": folder, "recipe": recipe, "sampling": sampling, "base": base}
        return map_rows(table, Completer, arguments, pool)

    rows = complete(recipe)
    prompts = [r["prompt"] for r in rows]
    references = [r["reference"] for r in rows]
    tokenize = recipe.validation.bleu_tokenize

    def text_metrics(predictions: list[str]) -> dict[str, Any]:
        return _text_metrics(predictions, references, tokenize)

    predictors = _completion_baselines(recipe, train, prompts)
    if recipe.model.path is not None:

        def complete_by_base() -> list[str]:
            return [r["completion"] for r in complete(_with_absolute_base(recipe), base=True)]

        predictors = {BASE: complete_by_base, **predictors}
    results = {
        **text_metrics([r["completion"] for r in rows]),
        "prompts": len(rows),
        "cut_completions": sum(not r["ended"] for r in rows),
        "baselines": _evaluate_baselines(predictors, text_metrics),
    }
    return Evaluation(
        results, [{k: r[k] for k in ("prompt", "reference", "completion")} for r in rows]
    )


def _completion_baselines(
    recipe: Recipe, train: Stream, prompts: list[str]
) -> dict[str, Callable[[], list[str]]]:
    """Returns functions that predict the completions of the prompts, by the baseline's name."""
    examples = first_pairs(train, MAX_TRAINING_EXAMPLES, shuffle=True)
    sources = [example[1] for example in examples]
    targets = [example[2] for example in examples]
    predictors: dict[str, Callable[[], list[str]]] = {
        "copy of the prompt": lambda: prompts,
        "its first sentence": lambda: [baselines.lead(p, 1) for p in prompts],
        "its first three sentences": lambda: [baselines.lead(p, 3) for p in prompts],
        "reply to the nearest training prompt": lambda: baselines.Nearest(sources, targets).predict(
            prompts
        ),
    }
    if recipe.objective == "seq2seq":
        predictors["dictionary, word for word (IBM 1)"] = lambda: baselines.Dictionary(
            sources, targets
        ).predict(prompts)
    return predictors


def _with_absolute_base(recipe: Recipe) -> Recipe:
    """Returns the recipe with an absolute `model.path`: actors may have another working directory.

    Raises:
        InputError: The model that the run began with is gone, or a file of it is damaged.
    """
    path = build.model_path(str(recipe.model.path))
    if os.path.isdir(path):
        local_folder(path)  # else an actor would find the damage, with a traceback
    return recipe.override({"model.path": path})


def _evaluate_baselines(
    predictors: dict[str, Callable[[], Any]], compute: Callable[[Any], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns the metrics of each baseline.

    Baselines that cannot be used are left out, such as TF-IDF on texts without words, or the model
    that the run began with if its files are gone; and those that predict the same as an earlier
    one.

    Args:
        predictors: Functions that return the predictions, by the baseline's name.
        compute: Computes the metrics of predictions.
    """
    results: dict[str, dict[str, Any]] = {}
    seen: dict[str, Any] = {}
    for name, predict in predictors.items():
        try:
            predictions = predict()
            same = next((n for n, earlier in seen.items() if earlier == predictions), None)
            if same is not None:
                say(f"baseline not shown: {name}: it predicts the same as: {same}")
                continue
            results[name] = compute(predictions)
        except (ValueError, InputError) as e:
            say(f"baseline skipped: {name}: {e}")
            continue
        seen[name] = predictions
    return results


def _text_metrics(
    predictions: list[str], references: list[str], tokenize: str | None
) -> dict[str, Any]:
    """Returns BLEU and chrF (0 to 100), ROUGE, exact match and token F1 (0 to 1)."""
    return {
        **metrics.bleu(predictions, references, tokenize),
        **metrics.rouge(predictions, references),
        "exact_match": metrics.exact_match(predictions, references),
        "token_f1": metrics.token_f1(predictions, references),
    }


def _evaluate_classes(
    folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, pool: ActorPool
) -> Evaluation:
    """Computes accuracy and F1 over all held-out texts."""
    classes = recipe.data.classes
    texts, true = _columns(held)
    rows = map_rows(
        pa.table({"text": texts, "label": true}),
        Classifier,
        {"folder": folder, "recipe": recipe},
        pool,
    )
    predicted = [classes[r["class"]] for r in rows]
    train_texts, train_labels = _columns(train, MAX_TRAINING_EXAMPLES)
    predictors: dict[str, Callable[[], list[str]]] = {
        "the commonest class": lambda: baselines.majority(train_labels, len(texts)),
        "TF-IDF and logistic regression": lambda: baselines.TfidfLogistic(
            train_texts, train_labels
        ).predict(texts),
    }
    results = {
        **metrics.classification(predicted, true, classes),
        "texts": len(texts),
        "baselines": _evaluate_baselines(
            predictors, lambda answers: metrics.classification(answers, true, classes)
        ),
    }
    predictions = [
        {"text": t, "label": label, "predicted": p}
        for t, label, p in zip(texts, true, predicted, strict=True)
    ]
    return Evaluation(results, predictions)


def _evaluate_retrieval(
    folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, pool: ActorPool
) -> Evaluation:
    """Searches each held-out query in all documents, those of the training data included.

    Queries with the same text are one query, which may have several relevant documents. Documents
    with the same text are one document.
    """
    pairs = list(zip(*_columns(held), strict=True))
    documents_of: dict[str, list[str]] = {query: [] for query, _ in pairs}
    for query, document in pairs:
        documents_of[query].append(document)
    queries = list(documents_of)
    corpus = list(dict.fromkeys([*(document for _, document in pairs), *_columns(train)[1]]))
    index_of = {text: i for i, text in enumerate(corpus)}
    relevant = [{index_of[d] for d in documents} for documents in documents_of.values()]

    def rank(scores: Iterable[np.ndarray]) -> list[list[int]]:
        return [
            metrics.rank(s, ids, TOP_DOCUMENTS) for s, ids in zip(scores, relevant, strict=True)
        ]

    def search(model: str) -> list[list[int]]:
        arguments = {"model": model, "length": recipe.data.sequence_length}
        rows = map_rows(pa.table({"text": [*queries, *corpus]}), Embedding, arguments, pool)
        vectors = np.stack([r["vector"] for r in rows])
        documents = vectors[len(queries) :]
        return rank(documents @ query for query in vectors[: len(queries)])

    def search_by_words() -> list[list[int]]:
        index = baselines.BM25(corpus)
        return rank(index.scores(query) for query in queries)

    predictors = {"BM25": search_by_words}
    if (base := recipe.model.path) is not None:
        predictors = {BASE: lambda: search(str(base)), **predictors}
    ranked = search(folder.model)
    results = {
        **metrics.retrieval(ranked, relevant, TOP_DOCUMENTS),
        "queries": len(queries),
        "corpus": len(corpus),
        "baselines": _evaluate_baselines(
            predictors, lambda ranked: metrics.retrieval(ranked, relevant, TOP_DOCUMENTS)
        ),
    }
    first_hits = [corpus[row[0]] for row in ranked]
    predictions = [
        {"query": query, "document": documents[0], "first": hit}
        for (query, documents), hit in zip(documents_of.items(), first_hits, strict=True)
    ]
    return Evaluation(results, predictions)


def _columns(stream: Stream, limit: int | None = None) -> tuple[list[str], list[str]]:
    """Returns the two fields of all documents, or of `limit` documents in a shuffled order."""
    documents = stream.documents(shuffle=limit is not None)
    rows = ((a, b) for first, second in documents for a, b in zip(first, second, strict=True))
    pairs = list(itertools.islice(rows, limit))
    return [a for a, _ in pairs], [b for _, b in pairs]


def _score(
    folder: RunFolder, recipe: Recipe, rows: Rows, pool: ActorPool, base: bool = False
) -> list[dict[str, Any]]:
    """Returns what `Scorer` returns for each batch of rows."""
    starts = np.split(rows.starts, rows.bounds[1:-1])
    columns: dict[str, Any] = {"tokens": list(rows.tokens), "starts": starts, "used": rows.used}
    if rows.targets is not None:
        columns["targets"] = list(rows.targets)
    # The training had enough memory for micro_batch rows.
    batch = min(BATCH, recipe.train.micro_batch)
    arguments = {"folder": folder, "recipe": recipe, "base": base}
    return map_rows(pa.table(columns), Scorer, arguments, pool, batch)
