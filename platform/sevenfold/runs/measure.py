"""What is measured of a model, by what it was trained for, each beside baselines that need no model. Ray Data streams the
held-out documents through workers that hold the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch

from sevenfold import storage
from sevenfold.data.examples import ENCODERS, ClassEncoder, ConversationEncoder, PairEncoder
from sevenfold.data.rows import IGNORE, Rows, labels
from sevenfold.data.stream import Stream
from sevenfold.data.tokens import load_tokenizer, token_bytes
from sevenfold.engine import objectives, tuning
from sevenfold.evaluate import baselines, metrics
from sevenfold.evaluate.embed import Embedder
from sevenfold.evaluate.generate import complete
from sevenfold.model import build
from sevenfold.recipe import Recipe
from sevenfold.report.console import say
from sevenfold.runs.worker import first_pairs
from sevenfold.storage import RunFolder

BATCH = 32  # rows or prompts at once
UNIGRAM_WINDOWS = 8  # of training text that the unigram is counted on
MOST_TRAINED = 30_000  # training examples that a baseline learns from
SAMPLES = 3
SAMPLE_TOKENS = 60  # of a sampled completion
SAMPLE_CHARACTERS = 300  # of a prompt that is shown
TOP = 10  # documents of a search that count


class Actors(NamedTuple):
    """The processes that hold the model, and how many GPUs each takes."""

    number: int
    gpus: int


Measured = tuple[dict[str, Any], list[dict[str, Any]]]  # figures, with those of `baselines`, and predictions


def measure(folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, actors: Actors) -> Measured:
    """All held-out documents, by the objective's own measures."""
    by = {
        "causal": _perplexity, "sft": _completions, "seq2seq": _completions, "classify": _classes, "embed": _search,
    }.get(recipe.objective, _loss)  # fmt: skip
    return by(folder, recipe, train, held, actors)


def _perplexity(folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, actors: Actors) -> Measured:
    """Bits per byte of every held-out document, in windows that overlap, beside a unigram and xz on the same text."""
    rows = _overlapping(held)
    size = token_bytes(load_tokenizer(folder.tokenizer))
    wanted = labels(rows)
    asked = wanted[wanted != IGNORE]
    nats = sum(r["nats"] for r in _scored(folder, recipe, rows, actors))
    counted = [labels(train.window(i).rows) for i in range(min(UNIGRAM_WINDOWS, train.plan.windows_per_epoch))]
    frequent = np.concatenate([c[c != IGNORE] for c in counted])
    texts = [text for (column,) in held.documents() for text in column]
    text_bytes = int(size[asked].sum())
    measured = {
        "bits_per_byte": metrics.bits_per_byte(nats, text_bytes), "perplexity": float(np.exp(nats / len(asked))),
        "baselines": {
            "unigram of its tokens": {
                "bits_per_byte": metrics.unigram_bits_per_byte(frequent, asked, text_bytes, len(size))
            },
            "xz -9 of the same text": {"bits_per_byte": metrics.xz_bits_per_byte(texts)},
        },
        "documents": len(texts), "bytes": text_bytes, "tokens": len(asked),
    }  # fmt: skip
    prompts = [t[:SAMPLE_CHARACTERS].rsplit(" ", 1)[0] for t in texts[:SAMPLES]]
    new = min(SAMPLE_TOKENS, recipe.data.sequence_length // 2)
    settings = {"max_new_tokens": new, "temperature": 0.7, "seed": recipe.seed}
    given = pa.table({"given": prompts, "prompt": prompts})
    made = _mapped(given, _Completer, {"folder": folder, "recipe": recipe, "settings": settings}, actors._replace(number=1))
    return measured, [{"prompt": r["prompt"], "completion": r["completion"]} for r in made]


def _overlapping(held: Stream) -> Rows:
    """Each document in rows of its own: every token but its first is scored once, with a quarter of a row before it where there
    is as much."""
    length, head, tail = held.sequence_length, held.encoder.head, held.encoder.tail
    tokens, targets, used = [], [], []
    for group in range(len(held.plan.manifest)):
        (made,) = held.encoded([group])
        for a, b in itertools.pairwise(made.offsets.tolist()):
            ids = np.concatenate([[t for t in (head,) if t is not None], made.ids[a:b], [t for t in (tail,) if t is not None]])
            for begin, end, first in metrics.windows(len(ids), length, 3 * length // 4):
                row, wanted = np.zeros(length, held.encoder.dtype), np.zeros(length, bool)
                row[: end - begin], wanted[first - begin : end - begin] = ids[begin:end], True
                tokens.append(row)
                targets.append(wanted)
                used.append(end - begin)
    starts = [s for n in used for s in ((0, n) if n < length else (0,))]
    return Rows(np.stack(tokens), np.array(starts, np.int32), np.array(used, np.int32), np.stack(targets))


def _loss(folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, actors: Actors) -> Measured:
    """The objective's own loss on every held-out document, hidden as at each validation; of preferences, how often the answer
    that was chosen has gained on the other."""
    rows = held.epoch()
    if recipe.objective == "dpo":  # the actors may have another working directory
        recipe = recipe.override({"model.path": build.model_path(str(recipe.model.path))})
    scored = _scored(folder, recipe, rows, actors)
    targets = sum(int(r["targets"]) for r in scored)
    loss = sum(r["nats"] for r in scored) / max(1, targets)
    if recipe.objective == "dpo":
        right = sum(int(r["right"]) for r in scored)
        measured: dict[str, Any] = {"loss": loss, "accuracy": right / max(1, targets), "pairs": targets}
        return measured | {"baselines": {"the model it began with": {"loss": float(np.log(2)), "accuracy": 0.5}}}, []
    return {"loss": loss, "perplexity": float(np.exp(loss)), "targets": targets, "rows": len(rows), "baselines": {}}, []


def _completions(folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, actors: Actors) -> Measured:
    """Greedy completions of every held-out prompt against what stands there."""
    pairs = first_pairs(held)
    settings = {"max_new_tokens": recipe.validation.max_new_tokens, "temperature": 0.0, "seed": recipe.seed}
    made = _mapped(
        pa.table({k: [p[i] for p in pairs] for i, k in enumerate(("given", "prompt", "reference"))}), _Completer,
        {"folder": folder, "recipe": recipe, "settings": settings}, actors,
    )  # fmt: skip
    prompts, references = ([r[k] for r in made] for k in ("prompt", "reference"))
    taught = first_pairs(train, MOST_TRAINED, shuffle=True)
    sources, targets = ([p[i] for p in taught] for i in (1, 2))
    others: dict[str, Callable[[], list[str]]] = {
        "copy of the prompt": lambda: prompts,
        "its first sentence": lambda: [baselines.lead(p, 1) for p in prompts],
        "its first three sentences": lambda: [baselines.lead(p, 3) for p in prompts],
        "reply to the nearest training prompt": lambda: baselines.Nearest(sources, targets).predict(prompts),
    }
    if recipe.objective == "seq2seq":
        others["dictionary, word for word (IBM 1)"] = lambda: baselines.Dictionary(sources, targets).predict(prompts)
    tokenize = recipe.validation.bleu_tokenize
    measured = {
        **texts_measured([r["completion"] for r in made], references, tokenize), "prompts": len(made),
        "cut_completions": sum(not r["ended"] for r in made),
        "baselines": _beside(others, lambda made: texts_measured(made, references, tokenize)),
    }  # fmt: skip
    return measured, [{k: r[k] for k in ("prompt", "reference", "completion")} for r in made]


def _beside(others: dict[str, Callable[[], Any]], figures: Callable[[Any], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of each baseline; one that the data is not fit for, such as texts without a word, is left out."""
    out = {}
    for name, predicted in others.items():
        try:
            out[name] = figures(predicted())
        except ValueError as e:
            say(f"{name}: left out: {e}")
    return out


def texts_measured(predictions: list[str], references: list[str], tokenize: str) -> dict[str, Any]:
    """BLEU, chrF (0 to 100), ROUGE, exact match and token F1 (0 to 1)."""
    return {
        **metrics.bleu(predictions, references, tokenize), **metrics.rouge(predictions, references),
        "exact_match": metrics.exact_match(predictions, references), "token_f1": metrics.token_f1(predictions, references),
    }  # fmt: skip


def _classes(folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, actors: Actors) -> Measured:
    """Accuracy and F1 over every held-out text."""
    names = recipe.data.classes
    texts, true = _columns(held)
    made = _mapped(pa.table({"text": texts, "label": true}), _Classifier, {"folder": folder, "recipe": recipe}, actors)
    taken = [names[r["class"]] for r in made]
    learnt, taught = _columns(train, MOST_TRAINED)
    others: dict[str, Callable[[], list[str]]] = {
        "the commonest class": lambda: baselines.majority(taught, len(texts)),
        "TF-IDF and logistic regression": lambda: baselines.TfidfLogistic(learnt, taught).predict(texts),
    }
    measured = {
        **metrics.classification(taken, true, names), "texts": len(texts),
        "baselines": _beside(others, lambda made: metrics.classification(made, true, names)),
    }  # fmt: skip
    return measured, [{"text": t, "label": a, "predicted": b} for t, a, b in zip(texts, true, taken, strict=True)]


def _search(folder: RunFolder, recipe: Recipe, train: Stream, held: Stream, actors: Actors) -> Measured:
    """Each held-out query among all documents, those of training too; queries with the same text are one, which has several
    right documents, and so are documents."""
    rows = list(zip(*_columns(held), strict=True))
    wanted: dict[str, list[str]] = {query: [] for query, _ in rows}
    for query, document in rows:
        wanted[query].append(document)
    queries = list(wanted)
    corpus = list(dict.fromkeys([*(document for _, document in rows), *_columns(train)[1]]))
    number = {text: str(i) for i, text in enumerate(corpus)}
    relevant = [{number[w] for w in right} for right in wanted.values()]
    texts = pa.table({"text": [*queries, *corpus]})
    made = _mapped(texts, _Embedding, {"folder": folder, "length": recipe.data.sequence_length}, actors)
    vectors = np.stack([r["vector"] for r in made])
    scores = vectors[: len(queries)] @ vectors[len(queries) :].T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    ranked = [[str(i) for i in row] for row in best]
    measured = {
        **metrics.retrieval(ranked, relevant, TOP), "queries": len(queries), "corpus": len(corpus),
        "baselines": _beside(
            {"BM25": lambda: baselines.BM25(list(number.values()), corpus).search(queries, TOP)},
            lambda found: metrics.retrieval(found, relevant, TOP),
        ),
    }  # fmt: skip
    found = [corpus[int(row[0])] for row in ranked]
    return measured, [{"query": q, "document": w[0], "first": f} for (q, w), f in zip(wanted.items(), found, strict=True)]


def _columns(stream: Stream, limit: int | None = None) -> tuple[list[str], list[str]]:
    """The two fields of all documents, or of so many from all over."""
    documents = stream.documents(shuffle=limit is not None)
    rows = ((a, b) for first, second in documents for a, b in zip(first, second, strict=True))
    pairs = list(itertools.islice(rows, limit))
    return [a for a, _ in pairs], [b for _, b in pairs]


def _scored(folder: RunFolder, recipe: Recipe, rows: Rows, actors: Actors) -> list[dict[str, Any]]:
    """Of batches of rows: the sum of the losses, nats; the number of targets; how many of them the model was right about."""
    starts = np.split(rows.starts, rows.bounds[1:-1])
    columns: dict[str, Any] = {"tokens": list(rows.tokens), "starts": starts, "used": rows.used}
    if rows.targets is not None:
        columns["targets"] = list(rows.targets)
    batch = min(BATCH, recipe.train.micro_batch)  # which the memory was enough for
    return _mapped(pa.table(columns), _Scorer, {"folder": folder, "recipe": recipe}, actors, batch)


def _mapped(rows: pa.Table, model: type, arguments: dict[str, Any], actors: Actors, batch: int = BATCH) -> list[dict[str, Any]]:
    """Streams rows through actors that hold the model, in order, so many at once."""
    data = ray.data.from_arrow(rows).repartition(max(1, min(len(rows), 4 * actors.number)))
    data.context.enable_progress_bars = False
    data.context.execution_options.preserve_order = True
    mapped = data.map_batches(
        model, fn_constructor_kwargs=arguments, batch_size=batch, batch_format="numpy", num_cpus=1,
        num_gpus=actors.gpus, compute=ray.data.ActorPoolStrategy(size=actors.number),
    )  # fmt: skip
    return list(mapped.take_all())


class _Scorer:
    """An actor that adds up the losses of packed rows."""

    def __init__(self, folder: RunFolder, recipe: Recipe):
        torch.set_num_threads(1)
        self.model = _load(folder.model, recipe)
        self.objective = tuning.of(recipe, load_tokenizer(folder.tokenizer), self.model.config)
        if isinstance(self.objective, tuning.Preference):
            began = _load(str(recipe.model.path), recipe)
            objectives.attach(began, objectives.Causal(self.objective.words, 0, 0.5, 1), recipe.train.loss_chunk)
            self.objective.reference = began
        self.losses = objectives.attach(self.model, self.objective, recipe.train.loss_chunk)

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        targets = np.stack(list(batch["targets"])) if "targets" in batch else None
        rows = Rows(np.stack(list(batch["tokens"])), np.concatenate(list(batch["starts"])), batch["used"], targets)
        made = self.objective.collate(rows, 0).to(self.model.device)
        losses, taken = self.losses(made, judged=True)
        there, nats = made.labels != IGNORE, float(losses.double().sum())
        right = 0 if taken is None else int((taken == made.labels)[there].sum())
        return {"nats": np.array([nats]), "targets": np.array([int(there.sum())]), "right": np.array([right])}


class _Completer:
    """An actor that completes prompts."""

    def __init__(self, folder: RunFolder, recipe: Recipe, settings: dict[str, Any]):
        torch.set_num_threads(1)
        self.model, self.tokenizer = _load(folder.model, recipe), load_tokenizer(folder.tokenizer)
        self.encoder = ENCODERS[recipe.objective](self.tokenizer, recipe.data.sequence_length)
        self.settings = settings
        apart = isinstance(self.encoder, PairEncoder)
        self.room = recipe.data.sequence_length - (0 if apart else settings["max_new_tokens"])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = complete(self.model, self.tokenizer, [self._prompt(text) for text in batch["given"]], **self.settings)
        texts = np.array([m.text for m in made], dtype=object)
        return {**batch, "completion": texts, "ended": np.array([m.ended for m in made])}

    def _prompt(self, text: str) -> list[int]:
        if isinstance(self.encoder, ConversationEncoder | PairEncoder):
            return self.encoder.prompt(text, self.room)
        return [*([] if self.encoder.head is None else [self.encoder.head]), *self.encoder.ids([text])[0]][: self.room]


class _Classifier:
    """An actor that tells the class of texts."""

    def __init__(self, folder: RunFolder, recipe: Recipe):
        torch.set_num_threads(1)
        self.model = _load(folder.model, recipe)
        self.pad = self.model.config.pad_token_id or 0
        self.encoder = ClassEncoder(load_tokenizer(folder.tokenizer), recipe.data.sequence_length)

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        texts = [np.array(self.encoder.framed(ids)) for ids in self.encoder.ids(list(batch["text"]))]
        made = tuning.padded(texts, self.pad)
        made = made.to(self.model.device)
        logits = self.model(input_ids=made.input_ids, attention_mask=made.attention_mask).logits
        return {**batch, "class": logits.argmax(-1).cpu().numpy()}


class _Embedding:
    """An actor that embeds texts."""

    def __init__(self, folder: RunFolder, length: int):
        torch.set_num_threads(1)
        self.embed = Embedder(folder.model, batch_size=BATCH, max_length=length)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"vector": self.embed(list(batch["text"]))}


def _load(path: str, recipe: Recipe) -> Any:
    """On the GPU that the actor was given, if any: Ray hides the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, _ = build.CLASSES[recipe.objective]
    kwargs: dict[str, Any] = {"trust_remote_code": recipe.model.trust_remote_code, "local_files_only": True}
    return made.from_pretrained(storage.local(path), dtype=torch.float32, **kwargs).eval().to(device)
