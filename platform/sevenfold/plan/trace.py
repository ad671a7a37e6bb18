"""Runs a training step of the recipe's model on fake tensors and reports the memory it would hold.

The model is sharded over a fake process group. Traces run in separate processes, since the process
group is global and torch's memory tracker replaces methods of torch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

# These are private, but there is no public alternative; constraints.txt pins torch.
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

# Also registers the backend "fake".
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sevenfold.engine import optim
from sevenfold.engine.objectives import (
    CPU_LOGITS,
    OBJECTIVES,
    Preference,
    SpecialTokens,
    attach_losses,
)
from sevenfold.model import attention, build, parallel
from sevenfold.plan import shape
from sevenfold.plan.tracker import HeldBytes, Phases, Tracker, follow_backward, keep_linear_inputs
from sevenfold.recipe import Recipe

__all__ = ["HeldBytes", "Job", "Phases", "processes", "trace", "traces"]

# Attention kernels that are replaced by SDPA without a mask: FlexAttention's block masks are small,
# and attention in chunks needs real numbers to know what it can leave out.
_REPLACED_KERNELS = ("flex_attention", attention.NAME)
_SDPA = "planned"
AttentionInterface.register(_SDPA, sdpa_attention_forward)


@dataclass(frozen=True)
class Job:
    """A step to trace.

    Attributes:
        recipe: The recipe; its parallel.replicate, parallel.tensor, train.micro_batch and
            train.activation_checkpointing are those of the trace.
        vocab_size: The size of the vocabulary.
        depths: The number of blocks of each stack, by the fields that shape.depths returns.
        gpus: The number of ranks.
        micro_batches: Micro-batches per step; 2 hold as much as any larger number.
        device: "cuda" computes logits all at once and uses FlexAttention where the engine does;
            "cpu" does as the engine does on a CPU.
        compiled: Whether blocks keep the inputs of their linear layers, beside what activation
            checkpointing keeps: see memory.all_measured.
    """

    recipe: Recipe
    vocab_size: int
    depths: tuple[tuple[str, int], ...]
    gpus: int
    micro_batches: int = 1
    device: str = "cuda"
    compiled: bool = False


def traces(jobs: Sequence[Job]) -> list[Phases]:
    """Traces each job, which takes seconds each.

    Raises:
        InputError: A model cannot be built or split.
    """
    return list(processes().map(trace, jobs))


@functools.cache
def processes() -> ProcessPoolExecutor:
    """Returns the processes for traces, which start only once: that takes longer than a trace."""
    return ProcessPoolExecutor(2, get_context("spawn"))


def trace(job: Job) -> Phases:
    """Traces a job in this process, which must not have a process group."""
    dist.init_process_group("fake", rank=0, world_size=job.gpus, store=FakeStore())
    try:
        mesh = parallel.mesh_of(torch.device("cpu"), job.recipe.parallel)  # with real tensors
        with FakeTensorMode(), _real_meshes():
            return _step(job, mesh)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _real_meshes() -> Iterator[None]:
    """Makes device meshes use real tensors.

    A mesh reads its ranks from a tensor, which must not be a fake one. Meshes are also derived from
    others within a step.
    """
    originals = {
        name: getattr(DeviceMesh, name)
        for name in ("__init__", "__getitem__", "_concatenate", "_flatten")
    }

    def with_real_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return method(*args, **kwargs)

        return wrapped

    def replace(name: str, method: Callable[..., Any]) -> None:
        setattr(DeviceMesh, name, staticmethod(method) if name == "_concatenate" else method)

    try:
        for name, method in originals.items():
            replace(name, with_real_tensors(method))
        yield
    finally:
        for name, method in originals.items():
            replace(name, method)


def _step(job: Job, mesh: DeviceMesh) -> Phases:
    """Runs a step and returns the peak of each phase.

    AdamW is left out. In a run it is fused and needs no temporary memory (plan.memory counts its
    states), and torch's fake implementation of it on a CPU is wrong.
    """
    model, objective = _build(job, mesh)
    model.train()
    batch = shape.dummy_batch(job.recipe)
    optimizers = [o for o in optim.build(model, job.recipe.optimizer) if isinstance(o, optim.Muon)]
    tracker = Tracker(model, model.config.vocab_size)
    tracker.track_reference(getattr(objective, "reference", None))
    follow_backward(model, tracker)
    if job.compiled:
        keep_linear_inputs(model, tracker)
    count = min(2, job.micro_batches)
    with tracker:
        for i in range(count):
            tracker.begin_micro_batch()
            model.set_requires_gradient_sync(i == count - 1)
            loss = model.token_losses(batch).sum()
            (loss * torch.ones(())).backward()
            del loss
            tracker.track_unsharded_gradients()
        tracker.phases = ("step",)
        tracker.record()
        for optimizer in optimizers:
            tracker.step(optimizer)
    del objective
    return tracker.peaks


def _build(job: Job, mesh: DeviceMesh) -> tuple[Any, Any]:
    """Returns the sharded model and its objective, built as train.worker builds them."""
    recipe = job.recipe
    config = shape.config_at(recipe, job.vocab_size, dict(job.depths))
    kernel = build.choose_attention(recipe, torch.device(job.device), config)
    replaced = kernel in _REPLACED_KERNELS
    model: Any = build.build(
        recipe, config, weights=False, attention="sdpa" if replaced else kernel
    )
    if replaced and model._can_set_attn_implementation():
        model.set_attn_implementation(_SDPA)
    if recipe.adapter is not None:
        shape.add_adapter(model, recipe)
    # Blocks are not compiled: the inputs that compiled blocks keep are tracked by hooks.
    train = recipe.train.model_copy(update={"compile": False})
    cpu_logits = CPU_LOGITS if job.device == "cpu" else None
    special_tokens = SpecialTokens(job.vocab_size)
    objective = OBJECTIVES[recipe.objective](
        special_tokens, 0, recipe.corruption.rate, recipe.corruption.mean_span
    )
    if isinstance(objective, Preference) and recipe.adapter is None:
        objective.reference = _build_reference(recipe, config, objective, cpu_logits, mesh)
    attach_losses(
        model, objective, train.loss_chunk, train.z_loss, train.label_smoothing, cpu_logits
    )
    parallel.parallelize(model, mesh, train, recipe.parallel)
    return model, objective


def _build_reference(
    recipe: Recipe,
    config: Any,
    objective: Preference,
    cpu_logits: int | None,
    mesh: DeviceMesh,
) -> Any:
    """Returns the sharded reference model of DPO."""
    reference: Any = build.build(recipe, config, weights=False)
    if reference._can_set_attn_implementation():
        reference.set_attn_implementation(_SDPA)
    causal = objective.reference_objective()
    attach_losses(reference, causal, recipe.train.loss_chunk, cpu_logits=cpu_logits)
    train = recipe.train.model_copy(update={"compile": False, "activation_checkpointing": "none"})
    parallel.parallelize(reference.requires_grad_(False), mesh, train, recipe.parallel)
    return reference.eval()
