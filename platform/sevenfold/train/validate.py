"""Validation during training: held-out loss, accuracy, and scores of generated text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from sevenfold.data.draw import draw_documents, draw_rows
from sevenfold.data.examples import ConversationEncoder, PairEncoder
from sevenfold.data.rows import Rows
from sevenfold.data.tokenizer import token_bytes
from sevenfold.engine.batch import Batch
from sevenfold.engine.decode import Completion, Sampling, generate, generation_config
from sevenfold.engine.objectives import Objective
from sevenfold.engine.step import evaluate
from sevenfold.evaluate.metrics import bits_per_byte, bleu, classification, rouge
from sevenfold.model.parallel import DataRank
from sevenfold.prepare.job import Job
from sevenfold.recipe import Train

T = TypeVar("T")
SAMPLES = 5  # number of generated answers shown in TensorBoard
GENERATED_TOGETHER = 32  # answers; between two such batches a run can be stopped


class Validator:
    """Validates a model on a run's held-out rows.

    Every rank has one, and calls it at the same steps.

    Args:
        job: The run; its `validation` stream holds the held-out documents.
        model: The sharded model.
        objective: The run's objective.
        tokenizer: The run's tokenizer.
        place: The rank's place among the ranks that read data.
        device: The device of the batches.
    """

    def __init__(
        self,
        job: Job,
        model: Any,
        objective: Objective,
        tokenizer: Any,
        place: DataRank,
        device: torch.device,
    ):
        self._recipe, self._stream = job.recipe, job.validation
        self._model, self._objective, self._tokenizer = model, objective, tokenizer
        self._token_bytes = torch.from_numpy(token_bytes(tokenizer))
        self._steps = self._held_out_steps(place, device)
        self._pairs = self._held_out_pairs()

    def __call__(
        self, show: Callable[[str, str], None], between: Callable[[], None]
    ) -> dict[str, float]:
        """Validates the model.

        Args:
            show: Receives samples of generated text: a name, and a text in Markdown.
            between: Called between the parts of the validation, on every rank.

        Returns:
            The metrics of all ranks together, the same on each; empty if nothing is held out.
        """
        recipe = self._recipe
        metrics: dict[str, float] = {}
        if self._steps:
            pairs: list[tuple[int, int]] | None = [] if self._objective.has_predictions else None
            sums = [
                evaluate(
                    self._model,
                    batches,
                    self._token_bytes,
                    pairs,
                    tensor=recipe.parallel.tensor,
                    between=between,
                )
                for batches in self._steps
            ]
            nats, targets, size = (sum(part) for part in zip(*sums, strict=True))
            metrics["validation/loss"] = nats / max(1, targets)
            if recipe.objective in ("causal", "sft"):
                metrics["validation/bits_per_byte"] = bits_per_byte(nats, max(1, size))
            if pairs is not None:
                metrics |= self._accuracy(pairs)
        if self._pairs:
            metrics |= self._generated(show, between)
        return metrics

    def _held_out_pairs(self) -> list[tuple[str, str, str]]:
        """Returns the prompts that are answered in each validation, and their references."""
        stream, limit = self._stream, self._recipe.validation.generate
        if stream is None or not limit or self._recipe.objective not in ("sft", "seq2seq"):
            return []
        encoder = stream.encoder
        assert isinstance(encoder, ConversationEncoder | PairEncoder)
        return _from_rank_0(lambda: draw_documents(stream, limit, encoder.prompts))

    def _held_out_steps(self, place: DataRank, device: torch.device) -> list[list[Batch]]:
        """Returns this rank's micro-batches of the held-out rows, see `steps_of`."""
        stream, recipe = self._stream, self._recipe
        if stream is None:
            return []
        rows = _from_rank_0(lambda: draw_rows(stream, recipe.validation.rows))
        return steps_of(rows, self._objective, recipe.train, place, device)

    def _accuracy(self, pairs: list[tuple[int, int]]) -> dict[str, float]:
        """Returns the accuracy of all ranks together and, for classification, the macro F1 score.

        Args:
            pairs: The label and the prediction of each target on this rank.
        """
        gathered: list[list[tuple[int, int]]] = [[]] * dist.get_world_size()
        dist.all_gather_object(gathered, pairs)
        # the ranks of one tensor-parallel group have read the same rows
        parts = gathered[:: self._recipe.parallel.tensor]
        all_pairs = [pair for part in parts for pair in part]
        correct = sum(label == prediction for label, prediction in all_pairs)
        metrics = {"validation/accuracy": correct / max(1, len(all_pairs))}
        if self._recipe.objective == "classify" and all_pairs:
            names = self._recipe.data.classes
            labels = [names[label] for label, _ in all_pairs]
            predictions = [names[prediction] for _, prediction in all_pairs]
            metrics["validation/f1_macro"] = classification(predictions, labels, names)["f1_macro"]
        return metrics

    def _generated(
        self, show: Callable[[str, str], None], between: Callable[[], None]
    ) -> dict[str, float]:
        """Returns ROUGE, BLEU and chrF of greedy answers to the first held-out prompts.

        Each rank generates its share of the answers. The arguments are those of `__call__`.
        """
        assert self._stream is not None
        settings, encoder = self._recipe.validation, self._stream.encoder
        assert isinstance(encoder, ConversationEncoder | PairEncoder)
        rank, world = dist.get_rank(), dist.get_world_size()
        pairs = self._pairs
        share = -(-len(pairs) // world)
        # padded with copies of the first one: generation needs the same number on every rank
        own_pairs = (pairs[rank::world] + pairs[:1] * share)[:share]
        # an encoder-decoder reads the prompt in its encoder, where the answer needs no room
        reserved = 0 if isinstance(encoder, PairEncoder) else settings.max_new_tokens
        max_prompt_tokens = self._stream.sequence_length - reserved
        torch.manual_seed(0)
        config = generation_config(
            self._model, self._tokenizer, Sampling(settings.max_new_tokens, 0.0), plain=True
        )
        prompts = [encoder.prompt(prompt, max_prompt_tokens) for prompt, _, _ in own_pairs]
        completions: list[Completion] = []
        for i in range(0, len(prompts), GENERATED_TOGETHER):
            between()
            completions += generate(
                self._model,
                self._tokenizer,
                prompts[i : i + GENERATED_TOGETHER],
                config,
                batch_size=GENERATED_TOGETHER,
                synced_gpus=world > 1,
            )
        gathered: list[list[str]] = [[]] * world
        dist.all_gather_object(gathered, [completion.text for completion in completions])
        predictions = [gathered[i % world][i // world] for i in range(len(pairs))]
        references = [reference for _, _, reference in pairs]
        samples = list(zip(predictions, references, strict=True))[:SAMPLES]
        show(
            "validation/samples",
            "\n\n".join(f"**{reference}**  \n{prediction}" for prediction, reference in samples),
        )
        bleu_scores = bleu(predictions, references, settings.bleu_tokenize)
        scores = rouge(predictions, references) | bleu_scores
        return {
            f"validation/{name}": value
            for name, value in scores.items()
            if not isinstance(value, str)
        }


def steps_of(
    rows: Rows, objective: Objective, train: Train, place: DataRank, device: torch.device
) -> list[list[Batch]]:
    """Divides rows into groups, and each group into micro-batches as if it were a training step.

    If the objective compares rows (those of embed are each other's negatives), groups are as large
    as the global batch. Its validation loss is therefore comparable to its training loss, and
    depends on neither the number of ranks nor train.micro_batch. Otherwise all rows are one group.

    Args:
        rows: The rows, the same on every rank.
        objective: Cuts rows into micro-batches.
        train: The recipe's `train`.
        place: The rank's place among the ranks that read data.
        device: The device of the batches.

    Returns:
        This rank's micro-batches of each group; their number is the same on every rank.
    """
    steps = []
    size = train.global_batch if objective.compares_rows else max(1, len(rows))
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        own = range(start + place.rank, stop, place.world_size)
        own_rows = (
            Rows.concatenate([rows.part(i, i + 1) for i in own])
            if own
            else Rows.empty(0, rows.tokens.shape[1], rows.tokens.dtype)
        )
        max_rows = -(-(stop - start) // place.world_size)
        # random masks are a function of the step: with a fixed one they are always the same
        steps.append(objective.batches(own_rows, 0, train.micro_batch, max_rows, device))
    return steps


def _from_rank_0(compute: Callable[[], T]) -> T:
    """Returns on every rank what rank 0 computes, so that only it reads the data."""
    box: list[Any] = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    result: T = box[0]
    return result
