"""Contrastive training of text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sevenfold.data.rows import Rows
from sevenfold.engine.batch import IGNORE, Batch
from sevenfold.engine.objectives.base import Scoring
from sevenfold.engine.objectives.layout import documents_of
from sevenfold.engine.objectives.padding import Padded, Texts

MAX_SIMILARITIES = 2**22  # similarities that are computed at once


class _Pool(NamedTuple):
    """The documents that each query is compared with.

    Attributes:
        documents: Their embeddings: float32 [documents, width].
        keys: A hash of each document's query and of the document itself, -1 where a rank has no
            document: int64 [documents, 2].
        first: The index of the document of this rank's first query. Those of its other queries
            follow.
    """

    documents: torch.Tensor
    keys: torch.Tensor
    first: int


class Contrastive(Padded):
    """InfoNCE with in-batch negatives (arXiv 1807.03748).

    Each query has to select its own document among the documents of the whole global batch, on
    whatever rank and in whatever micro-batch they are, by the cosine similarity of mean-pooled
    hidden states (as in arXiv 1908.10084). Documents with the same tokens as the right one, and
    other documents of the same query, are not used as negatives.

    The rows of a batch are queries and documents. A query's label is 0, the number of negatives
    that may be as similar to it as its own document; a document has no label. Predictions are the
    numbers that are.

    Attributes:
        temperature: Cosine similarities are divided by it; see the recipe's `contrastive`.
    """

    has_predictions = True
    compares_rows = True
    temperature = 0.05

    def texts(self, rows: Rows) -> Texts:
        """Returns query and document of each pair, one after the other."""
        pairs = [pair for row in documents_of(rows) for pair in row]
        texts = [ids[side] for ids, is_target in pairs for side in (~is_target, is_target)]
        return Texts(texts, np.tile(np.array([0, IGNORE]), len(pairs)))

    def batch(self, texts: Texts, indices: list[int], max_texts: int) -> Batch:
        """Builds a batch of some of a rank's texts; see `Padded.batch`."""
        keys = np.full(max(2, max_texts), -1, np.int64)
        keys[: len(texts.keys)] = texts.keys
        return replace(
            super().batch(texts, indices, max_texts),
            text_index=torch.tensor(indices or [-1]),
            text_keys=torch.from_numpy(keys).view(-1, 2),
        )

    def losses(
        self, model: Any, batch: Batch, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns losses and predictions of the rows, with the documents of this batch alone."""
        pairs, keys = _by_pair([self._embed(model.forward, batch)], [batch])
        parts = list(self._compare(pairs[:, 0], keys, _Pool(pairs[:, 1], keys, 0)))
        losses, predictions = (torch.cat(part) for part in zip(*parts, strict=True))
        return _of_rows(losses, batch), _of_rows(predictions, batch)

    def backward(
        self, model: Any, batches: Sequence[Batch], scale: float | torch.Tensor, tensor: int
    ) -> torch.Tensor:
        """Accumulates the gradient as `Objective.backward` does, with GradCache (arXiv 2101.06983).

        All micro-batches are embedded without a graph, then the gradient of the loss with respect
        to the embeddings is computed, then each micro-batch is embedded again for the backward
        pass. The first one, which has the longest texts, keeps its graph and is embedded only once.
        Memory is that of one micro-batch.
        """
        # both passes of a micro-batch have the same seed, so that dropout draws the same masks
        seeds = torch.randint(2**62, (len(batches),)).tolist()

        def embed(i: int) -> torch.Tensor:
            torch.manual_seed(seeds[i])
            return self._embed(model, batches[i])

        with torch.no_grad():
            embeddings = [embed(i) for i in range(1, len(batches))]
        with_graph = embed(0)
        pairs, keys = _by_pair([with_graph.detach(), *embeddings], batches)
        loss_sum, gradient = self._pool_gradient(pairs, keys, scale, tensor)
        gradient = F.pad(gradient.flatten(0, 1), (0, 0, 0, 1))  # 0 for rows without a text
        for i, batch in enumerate(batches):
            model.set_requires_gradient_sync(i == len(batches) - 1)
            rows = embed(i) if i else with_graph
            rows.backward(gradient[batch.text_index])
        return loss_sum

    def _pool_gradient(
        self, pairs: torch.Tensor, keys: torch.Tensor, scale: float | torch.Tensor, tensor: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the sum of this rank's losses, and the gradient of the loss of all ranks.

        Args:
            pairs: The embeddings of this rank's pairs: float32 [pairs, 2, width].
            keys: Their hashes: int64 [pairs, 2].
            scale: See `backward`.
            tensor: See `backward`.

        Returns:
            The losses' sum, without the scale; and the gradient with respect to `pairs`.
        """
        pool = _gather(pairs, keys, tensor)
        queries, documents = pairs[:, 0].clone(), pool.documents
        queries.requires_grad_()
        documents.requires_grad_()
        loss_sum = torch.zeros((), device=pairs.device)
        for losses, _ in self._compare(queries, keys, pool):
            loss = losses.sum()
            (loss * scale).backward()
            loss_sum += loss.detach()
        assert queries.grad is not None and documents.grad is not None
        dist.all_reduce(documents.grad)  # the documents are negatives of all ranks' queries
        own = documents.grad[pool.first : pool.first + len(pairs)] / tensor
        return loss_sum, torch.stack([queries.grad, own], 1)

    def scores(
        self, model: Any, batches: Sequence[Batch], tensor: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yields losses and predictions of the rows of each micro-batch; see `Objective.scores`."""
        pairs, keys = _by_pair([self._embed(model, batch) for batch in batches], batches)
        parts = list(self._compare(pairs[:, 0], keys, _gather(pairs, keys, tensor)))
        losses, predictions = (torch.cat(part) for part in zip(*parts, strict=True))
        for batch in batches:
            yield _of_rows(losses, batch), _of_rows(predictions, batch)

    def _embed(self, forward: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """Returns the embeddings of a batch's rows, of length 1: float32 [rows, width].

        Args:
            forward: The model, or its method `forward` where FSDP's hooks have already run.
            batch: The batch.
        """
        assert batch.attention_mask is not None
        output = forward(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
        mask = batch.attention_mask[:, :, None]
        states = output.last_hidden_state.float() * mask
        return F.normalize(states.sum(1) / mask.sum(1), dim=-1)

    def _compare(
        self, queries: torch.Tensor, keys: torch.Tensor, pool: _Pool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields losses and predictions of this rank's queries, some queries at a time.

        Args:
            queries: The embeddings of the queries: float32 [queries, width].
            keys: The hashes of their pairs: int64 [queries, 2].
            pool: The documents that they are compared with.
        """
        size = max(1, MAX_SIMILARITIES // len(pool.documents))
        own = torch.arange(pool.first, pool.first + len(queries), device=queries.device)
        parts = zip(queries.split(size), keys.split(size), own.split(size), strict=True)
        for part, part_keys, part_own in parts:
            logits = self.similarities(part, part_keys, part_own, pool)
            losses = F.cross_entropy(logits, part_own, reduction="none")
            similar = logits >= logits.gather(1, part_own[:, None])
            yield losses * (part_keys[:, 0] >= 0), similar.sum(1) - 1

    def similarities(
        self, queries: torch.Tensor, keys: torch.Tensor, own: torch.Tensor, pool: _Pool
    ) -> torch.Tensor:
        """Returns the scaled similarity of each query to each document: [queries, documents].

        It is -inf for documents that are neither the query's own nor negatives.

        Args:
            queries: See `_compare`.
            keys: See `_compare`.
            own: The index of each query's document in the pool: int64 [queries].
            pool: See `_compare`.
        """
        same = (keys[:, None] == pool.keys).any(-1)  # the same query or the same document
        is_own = own[:, None] == torch.arange(len(pool.documents), device=own.device)
        excluded = (same | (pool.keys[:, 0] < 0)) & ~is_own
        similarities = queries @ pool.documents.T / self.temperature
        return similarities.masked_fill(excluded, float("-inf"))


def _by_pair(
    embeddings: Sequence[torch.Tensor], batches: Sequence[Batch]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orders the embeddings of a rank's micro-batches by pair.

    Returns:
        The embeddings of query and document of each pair, 0 where this rank has fewer pairs than
        another one: [pairs, 2, width]; and `Batch.text_keys`.
    """
    keys = batches[0].text_keys
    assert keys is not None
    indices = torch.cat([batch.text_index for batch in batches if batch.text_index is not None])
    rows = torch.cat(list(embeddings))
    # rows without a text have the index -1, and there is one place more for them
    texts = rows.new_zeros(keys.numel() + 1, rows.shape[1]).index_put((indices,), rows)
    return texts[:-1].view(*keys.shape, -1), keys


def _of_rows(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns the values of the rows of a batch, 0 where a row is no query.

    Args:
        values: A value for the query of each pair: [pairs].
        batch: The batch.
    """
    assert batch.text_index is not None
    queries = values[batch.text_index.clamp(min=0) // 2]
    return torch.where(batch.labels != IGNORE, queries, torch.zeros_like(queries))


def _gather(pairs: torch.Tensor, keys: torch.Tensor, tensor: int) -> _Pool:
    """Gathers the documents of all ranks; see `Contrastive._pool_gradient` for the arguments.

    The ranks of one tensor-parallel group have the same ones, which are taken once.
    """

    def gathered(part: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part)
        return torch.cat(parts[::tensor])

    first = dist.get_rank() // tensor * len(pairs)
    return _Pool(gathered(pairs[:, 1].contiguous()), gathered(keys), first)
