"""A training step without its numbers: the very model on fake tensors, laid over a fake process group, and what it holds.

Each runs in a process of its own, since the process group is global and torch's tracker replaces methods of torch. What a plan
needs of torch's private interfaces is in this file alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensorMode,
    unset_fake_temporarily,
)  # pinned (constraints.txt): private, and nothing public does it
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPModMemStats, _FSDPRefType  # pinned: as above
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore  # pinned: as above; it brings the backend "fake"
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sevenfold.engine import objectives, optim, tuning
from sevenfold.model import attention, build, parallel
from sevenfold.plan import shape
from sevenfold.recipe import Recipe

ENDS = 2  # blocks at either end of a stack that are looked at by themselves
# given no mask: FlexAttention's block masks are small, and attention in chunks needs numbers to say what it leaves out
_UNMASKED, _NAME = ("flex_attention", attention.NAME), "planned"
AttentionInterface.register(_NAME, sdpa_attention_forward)


@dataclass(frozen=True)
class Job:
    """A step to look at.

    Attributes:
        recipe: its parallel.replicate and tensor, micro_batch and activation_checkpointing are what is traced.
        depths: blocks of each stack, as shape.depths names them.
        micro_batches: of the step; 2 hold what any larger number does.
        device: "cuda": logits all at once, FlexAttention where the engine takes it; "cpu": as the engine does it there.
        compiled: blocks keep what their linear layers read besides what activation checkpointing keeps: see plan.memory.
    """

    recipe: Recipe
    vocab_size: int
    depths: tuple[tuple[str, int], ...]
    gpus: int
    micro_batches: int = 1
    device: str = "cuda"
    compiled: bool = False


@dataclass(frozen=True)
class Held:
    """Bytes that a GPU holds at one moment. gradients: sharded ones; whole: those of micro-batches that are still summed up."""

    parameters: float = 0.0
    gradients: float = 0.0
    whole: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))

    @staticmethod
    def mix(*terms: tuple[float, Held]) -> Held:
        """The sum of so many times each, nothing below 0."""
        return Held(**{f.name: max(0.0, sum(n * getattr(held, f.name) for n, held in terms)) for f in fields(Held)})


Phases = dict[str, Held]  # the fullest moment of each part of a step, by the part's name


def traces(jobs: Sequence[Job]) -> list[Phases]:
    """Of each job, seconds each. Raises InputError where a model cannot be made or split."""
    return list(processes().map(trace, jobs))


@functools.cache
def processes() -> ProcessPoolExecutor:
    """Started once: that takes longer than a trace."""
    return ProcessPoolExecutor(2, get_context("spawn"))


def trace(job: Job) -> Phases:
    """In this process, which must have no process group."""
    dist.init_process_group("fake", rank=0, world_size=job.gpus, store=FakeStore())
    try:
        mesh = parallel.mesh_of(torch.device("cpu"), job.recipe.parallel)  # of real tensors
        with FakeTensorMode(), _real_meshes():
            return _step(job, mesh)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _real_meshes() -> Iterator[None]:
    """A mesh reads its ranks from a tensor, which must not be a fake one: meshes that are made of others on the way too."""
    before = {name: getattr(DeviceMesh, name) for name in ("__init__", "__getitem__", "_concatenate", "_flatten")}

    def real(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def made(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return method(*args, **kwargs)

        return made

    try:
        for name, method in before.items():
            whole = staticmethod(real(method)) if name == "_concatenate" else real(method)
            setattr(DeviceMesh, name, whole)
        yield
    finally:
        for name, method in before.items():
            setattr(DeviceMesh, name, staticmethod(method) if name == "_concatenate" else method)


def _step(job: Job, mesh: DeviceMesh) -> Phases:
    """Without AdamW: fused, as it is in a run, it holds nothing while it works (plan.memory counts its states), and torch's
    fake of that on a CPU is wrong."""
    model, objective = _model(job, mesh)
    model.train()
    batch = shape.batch_of(job.recipe)
    optimizers = [o for o in optim.build(model, job.recipe.optimizer) if isinstance(o, optim.Muon)]
    tracker = _Tracker(model, model.config.vocab_size)
    tracker.know(getattr(objective, "reference", None))
    _announce(model, tracker)
    if job.compiled:
        _keep(model, tracker)
    count = min(2, job.micro_batches)
    with tracker:
        for i in range(count):
            tracker.begin()
            model.set_requires_gradient_sync(i == count - 1)
            loss = model.token_losses(batch).sum()
            (loss * torch.ones(())).backward()
            del loss
            tracker.find_whole()
        tracker.phases = ("step",)
        tracker.mark()
        for optimizer in optimizers:
            tracker.step(optimizer)
    del objective
    return tracker.peaks


def _model(job: Job, mesh: DeviceMesh) -> tuple[Any, Any]:
    """The model and its objective, as runs.worker makes them."""
    recipe, size = job.recipe, job.vocab_size
    config = shape.config_at(recipe, size, dict(job.depths))
    kernel = build.attention(recipe, torch.device(job.device), config)
    unmasked = kernel in _UNMASKED
    model: Any = build.build(recipe, config, weights=False, attention="sdpa" if unmasked else kernel)
    if unmasked and model._can_set_attn_implementation():
        model.set_attn_implementation(_NAME)
    if recipe.adapter is not None:
        _with_adapter(model, recipe)
    train = recipe.train.model_copy(update={"compile": False})
    logits = objectives.CPU_LOGITS if job.device == "cpu" else None
    words = objectives.Words(size)
    objective = tuning.OBJECTIVES[recipe.objective](words, 0, recipe.corruption.rate, recipe.corruption.mean_span)
    if isinstance(objective, tuning.Preference) and recipe.adapter is None:
        reference: Any = build.build(recipe, config, weights=False)
        reference.set_attn_implementation(_NAME)
        objectives.attach(reference, objectives.Causal(words, 0, 0.5, 1), train.loss_chunk, cpu_logits=logits)
        plain = train.model_copy(update={"activation_checkpointing": "none"})
        parallel.lay_out(reference.requires_grad_(False), mesh, plain, recipe.parallel)
        objective.reference = reference.eval()
    objectives.attach(model, objective, train.loss_chunk, train.z_loss, train.label_smoothing, logits)
    parallel.lay_out(model, mesh, train, recipe.parallel)
    return model, objective


def _with_adapter(model: Any, recipe: Recipe) -> None:
    """peft moves each new layer to where its base is: fake tensors do not bear that, and are there in any case."""
    move = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        build.with_adapter(model, recipe)
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


class _Nowhere:
    """Where torch's tracker would keep what it finds of each module, which nobody reads here."""

    def __contains__(self, _: Any) -> bool:
        return False

    def __getitem__(self, _: Any) -> _FSDPModMemStats:
        return _FSDPModMemStats("")

    def __setitem__(self, _: Any, __: Any) -> None:
        return None

    def clear(self) -> None:
        return None


class _Tracker(FSDPMemTracker):
    """torch's, which keeps the fullest moment of each phase and not of each module, and tells logits apart."""

    def __init__(self, model: nn.Module, vocab_size: int):
        super().__init__(model)
        self.phases: tuple[str, ...] = ()  # names of the one that there is now
        self.peaks: Phases = {}
        self.memory_tracking: Any = _Nowhere()
        self.kept: list[list[torch.Tensor]] = []  # by blocks that backward has yet to leave
        self._vocab_size, self._model = vocab_size, model
        self._full: dict[str, float] = {}
        self._inside = False
        root: Any = model
        state = root._get_fsdp_state()
        state._pre_forward = self._marking(state, state._pre_forward)  # our losses are a method; torch's tracker hooks forward

    def _marking(self, state: Any, pre_forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            out = pre_forward(*args)
            for p in state._fsdp_param_group.fsdp_params if state._fsdp_param_group else ():
                self._update_and_maybe_create_winfos(p.unsharded_param, _FSDPRefType.UNSHARDED_PARAM)
            return out

        return wrapped

    def _track(self, reftype: Any, t: torch.Tensor) -> None:
        if t.ndim > 1 and t.shape[-1] == self._vocab_size and "forward" in self.phases:
            reftype = _FSDPRefType.INP  # which is free: inputs are small and not told to the tracker
        super()._track(reftype, t)

    def _update_peak_stats(self, peak_state: Any) -> None:
        self.mark()

    def mark(self) -> None:
        """Looks how much there is now."""
        snapshots: Any = self._curr_mem_snap
        now = next((held for device, held in snapshots.items() if device.type == "cpu"), {"Total": 0.0})
        for phase in self.phases:
            if now["Total"] > self._full.get(phase, 0.0):
                self._full[phase] = now["Total"]
                self.peaks[phase] = _held(now)

    def begin(self) -> None:
        """A micro-batch."""
        self.phases, self._inside = ("forward",), False
        self.kept.clear()

    def left(self) -> None:
        """Backward is done with the block before, and with what was kept for it."""
        if self._inside and self.kept:
            self.kept.pop()
        self._inside = True

    def know(self, frozen: nn.Module | None) -> None:
        """A model beside the one that is trained, laid out as that is."""
        for p in frozen.parameters() if frozen is not None else ():
            self._update_and_maybe_create_winfos(p, _FSDPRefType.SHARDED_PARAM)

    def find_whole(self) -> None:
        """Gradients that FSDP keeps whole until the last micro-batch, which torch's tracker takes for activations."""
        for module in self._model.modules():
            group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
            for p in group.fsdp_params if group else ():
                unsharded = getattr(p, "_unsharded_param", None)
                for gradient in (p.unsharded_accumulated_grad, getattr(unsharded, "grad", None)):
                    if gradient is not None:
                        self._update_and_maybe_create_winfos(gradient, _FSDPRefType.UNSHARDED_GRAD)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self._in_opt = True
        optimizer.step()
        self._in_opt = False
        self._track_optimizer_states(_FSDPRefType.OPT, optimizer)


def _held(now: dict[Any, float]) -> Held:
    kind = _FSDPRefType
    return Held(
        parameters=now[kind.SHARDED_PARAM], gradients=now[kind.SHARDED_GRAD], whole=now[kind.UNSHARDED_GRAD],
        optimizer=now[kind.OPT], activations=now[kind.ACT] + now[kind.TEMP], logits=now[kind.INP],
        buffers=sum(now[k] for k in (kind.UNSHARDED_PARAM, kind.ALL_GATHER, kind.REDUCE_SCATTER, kind.BUFFER)),
    )  # fmt: skip


def _announce(model: nn.Module, tracker: _Tracker) -> None:
    """Tells the tracker when backward enters a block: `stack+0`, `stack+1` are the first of a stack, `stack-1`, `stack-2`
    the last, and one may be both; and when it has left the first (`stack below`)."""
    stacks: dict[str, list[nn.Module]] = {}
    blocks = set(parallel.blocks(model))
    for name, module in model.named_modules():
        if module in blocks:
            stacks.setdefault(shape.stack(name), []).append(module)
    for name, members in stacks.items():
        for i, block in enumerate(members):
            left = len(members) - i
            phases = (f"{name}+{i}",) * (i < ENDS) + (f"{name}-{left}",) * (left <= ENDS)
            block.register_forward_hook(functools.partial(_leaving, tracker, phases or (f"{name} between",)))
        members[0].register_forward_pre_hook(functools.partial(_entering, tracker, (f"{name} below",)), with_kwargs=True)


def _keep(model: nn.Module, tracker: _Tracker) -> None:
    """Holds on to what the linear layers of each block read, until backward has left it."""

    def begin(*_: Any) -> None:
        if not _again():
            tracker.kept.append([])

    def reads(_: nn.Module, args: Any) -> None:
        if not _again():
            tracker.kept[-1].append(args[0])

    for block in parallel.blocks(model):
        block.register_forward_pre_hook(begin)
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            linear.register_forward_pre_hook(reads)


def _again() -> bool:
    """Whether backward makes what it was not left (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1


def _leaving(tracker: _Tracker, phases: tuple[str, ...], _: nn.Module, __: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    _when_its_gradient_is_there(tracker, phases, first)


def _entering(tracker: _Tracker, phases: tuple[str, ...], _: nn.Module, args: Any, kwargs: Any) -> None:
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()), None)
    _when_its_gradient_is_there(tracker, phases, first)


def _when_its_gradient_is_there(tracker: _Tracker, phases: tuple[str, ...], t: torch.Tensor | None) -> None:
    def enter(_: torch.Tensor) -> None:
        tracker.phases = phases
        tracker.left()

    if t is not None and t.requires_grad and not _again():
        t.register_hook(enter)
