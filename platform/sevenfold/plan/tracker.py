"""Tracks the memory of a training step on fake tensors, by phases of the step.

It builds on torch's FSDPMemTracker. That is private, and so are other parts of torch that are used
here, but there is no public alternative; constraints.txt pins torch.

A step has these phases, with STACK the name of a stack of blocks:
- "forward": the forward pass and the loss, up to the backward pass of the last block;
- "STACK+0", "STACK+1": the backward pass of the first and second block of the stack;
- "STACK-1", "STACK-2": that of the last and second-to-last block (a block of a short stack has
  several names);
- "STACK between": that of all other blocks;
- "STACK below": what the backward pass does after the first block of the stack;
- "step": the optimizer's step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.distributed._tools.fsdp2_mem_tracker import (
    FSDPMemTracker,
    _FSDPModMemStats,
    _FSDPRefType,
)
from torch.distributed.fsdp import FSDPModule

from sevenfold.model import parallel
from sevenfold.plan import shape

ENDS = 2  # the number of blocks at each end of a stack that are phases of their own


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that a GPU holds at one moment.

    Attributes:
        parameters: Shards of the parameters.
        gradients: Shards of the gradients.
        unsharded_gradients: Unsharded gradients that are summed over micro-batches.
        optimizer: Optimizer states.
        activations: Activations and temporary tensors.
        logits: Logits, and what the loss computes of them.
        buffers: Gathered parameters, communication buffers, and the model's buffers.
    """

    parameters: float = 0.0
    gradients: float = 0.0
    unsharded_gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        """All bytes."""
        return float(sum(astuple(self)))

    @staticmethod
    def mix(*terms: tuple[float, HeldBytes]) -> HeldBytes:
        """Returns a weighted sum, in which no part is below 0.

        Args:
            terms: Pairs of a weight and what it is multiplied with.
        """
        return HeldBytes(
            **{
                f.name: max(0.0, sum(weight * getattr(held, f.name) for weight, held in terms))
                for f in fields(HeldBytes)
            }
        )


Phases = dict[str, HeldBytes]  # the peak of each phase of a step


class Tracker(FSDPMemTracker):
    """torch's tracker, which also tells logits apart and records the peak of each phase of a step.

    Attributes:
        phases: The names of the current phase.
        peaks: The peak of each phase so far.
        linear_inputs: Inputs of linear layers that are kept alive, in a list for each block whose
            backward pass is not done.
    """

    def __init__(self, model: nn.Module, vocab_size: int):
        super().__init__(model)
        self.phases: tuple[str, ...] = ()
        self.peaks: Phases = {}
        self.linear_inputs: list[list[torch.Tensor]] = []
        self.memory_tracking: Any = _NoModuleStats()
        self._model, self._vocab_size = model, vocab_size
        self._peak_bytes: dict[str, float] = {}
        self._in_block = False  # whether the backward pass has entered a block
        # torch's tracker hooks forward, but our losses are another method (token_losses). What FSDP
        # gathers for it must be tracked here.
        root: Any = model
        state = root._get_fsdp_state()
        state._pre_forward = self._tracking_gathered(state, state._pre_forward)

    def _tracking_gathered(self, state: Any, pre_forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps FSDP's pre-forward to track the parameters that it gathers."""

        def wrapped(*args: Any) -> Any:
            result = pre_forward(*args)
            group = state._fsdp_param_group
            for p in group.fsdp_params if group else ():
                self._update_and_maybe_create_winfos(
                    p.unsharded_param, _FSDPRefType.UNSHARDED_PARAM
                )
            return result

        return wrapped

    def _track(self, reftype: Any, t: torch.Tensor) -> None:
        if t.ndim > 1 and t.shape[-1] == self._vocab_size and "forward" in self.phases:
            # Logits take the type of inputs, which is free: inputs are small and not tracked.
            reftype = _FSDPRefType.INP
        super()._track(reftype, t)

    def _update_peak_stats(self, peak_state: Any) -> None:
        self.record()

    def record(self) -> None:
        """Updates the peak of the current phase with the current memory."""
        snapshots: Any = self._curr_mem_snap
        on_cpu = (snapshot for device, snapshot in snapshots.items() if device.type == "cpu")
        snapshot = next(on_cpu, {"Total": 0.0})
        for phase in self.phases:
            if snapshot["Total"] > self._peak_bytes.get(phase, 0.0):
                self._peak_bytes[phase] = snapshot["Total"]
                self.peaks[phase] = _held(snapshot)

    def begin_micro_batch(self) -> None:
        """Starts the forward pass of a micro-batch."""
        self.phases, self._in_block = ("forward",), False
        self.linear_inputs.clear()

    def leave_block(self) -> None:
        """Frees the linear layers' inputs of the block whose backward pass is done, if any."""
        if self._in_block and self.linear_inputs:
            self.linear_inputs.pop()
        self._in_block = True

    def track_reference(self, model: nn.Module | None) -> None:
        """Tracks the parameters of a sharded reference model, if there is one."""
        for p in model.parameters() if model is not None else ():
            self._update_and_maybe_create_winfos(p, _FSDPRefType.SHARDED_PARAM)

    def track_unsharded_gradients(self) -> None:
        """Tracks gradients that FSDP keeps unsharded until the last micro-batch.

        torch's tracker takes them for activations.
        """
        for module in self._model.modules():
            if not isinstance(module, FSDPModule):
                continue
            group = module._get_fsdp_state()._fsdp_param_group
            for p in group.fsdp_params if group else ():
                unsharded = getattr(p, "_unsharded_param", None)
                for gradient in (p.unsharded_accumulated_grad, getattr(unsharded, "grad", None)):
                    if gradient is not None:
                        self._update_and_maybe_create_winfos(gradient, _FSDPRefType.UNSHARDED_GRAD)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs an optimizer's step and tracks its states."""
        self._in_opt = True
        optimizer.step()
        self._in_opt = False
        self._track_optimizer_states(_FSDPRefType.OPT, optimizer)


class _NoModuleStats:
    """Discards what torch's tracker records for each module, which is not needed here."""

    def __contains__(self, _: Any) -> bool:
        return False

    def __getitem__(self, _: Any) -> _FSDPModMemStats:
        return _FSDPModMemStats("")

    def __setitem__(self, _: Any, __: Any) -> None:
        return None

    def clear(self) -> None:
        return None


def _held(snapshot: dict[Any, float]) -> HeldBytes:
    """Converts a snapshot of torch's tracker."""
    kind = _FSDPRefType
    buffers = (kind.UNSHARDED_PARAM, kind.ALL_GATHER, kind.REDUCE_SCATTER, kind.BUFFER)
    return HeldBytes(
        parameters=snapshot[kind.SHARDED_PARAM],
        gradients=snapshot[kind.SHARDED_GRAD],
        unsharded_gradients=snapshot[kind.UNSHARDED_GRAD],
        optimizer=snapshot[kind.OPT],
        activations=snapshot[kind.ACT] + snapshot[kind.TEMP],
        logits=snapshot[kind.INP],
        buffers=sum(snapshot[k] for k in buffers),
    )


def follow_backward(model: nn.Module, tracker: Tracker) -> None:
    """Registers hooks that tell the tracker which block the backward pass is in."""
    stacks: dict[str, list[nn.Module]] = {}
    blocks = set(parallel.blocks(model))
    for name, module in model.named_modules():
        if module in blocks:
            stacks.setdefault(shape.stack(name), []).append(module)
    for name, members in stacks.items():
        for i, block in enumerate(members):
            from_end = len(members) - i
            phases = []
            if i < ENDS:
                phases.append(f"{name}+{i}")
            if from_end <= ENDS:
                phases.append(f"{name}-{from_end}")
            block.register_forward_hook(
                functools.partial(_hook_output, tracker, tuple(phases or [f"{name} between"]))
            )
        members[0].register_forward_pre_hook(
            functools.partial(_hook_input, tracker, (f"{name} below",)), with_kwargs=True
        )


def _hook_output(
    tracker: Tracker, phases: tuple[str, ...], _: nn.Module, __: Any, output: Any
) -> None:
    """Enters the phases when the gradient of a block's output is there."""
    hidden_states = output[0] if isinstance(output, tuple) else output
    _enter_on_gradient(tracker, phases, hidden_states)


def _hook_input(
    tracker: Tracker, phases: tuple[str, ...], _: nn.Module, args: Any, kwargs: Any
) -> None:
    """Enters the phases when the gradient of a block's input is there."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            _enter_on_gradient(tracker, phases, value)
            return


def _enter_on_gradient(tracker: Tracker, phases: tuple[str, ...], t: torch.Tensor) -> None:
    def enter(_: torch.Tensor) -> None:
        tracker.phases = phases
        tracker.leave_block()

    if t.requires_grad and not _in_backward():
        t.register_hook(enter)


def keep_linear_inputs(model: nn.Module, tracker: Tracker) -> None:
    """Keeps the inputs of each block's linear layers until the block's backward pass is done."""

    def begin_block(*_: Any) -> None:
        if not _in_backward():
            tracker.linear_inputs.append([])

    def keep_input(_: nn.Module, args: Any) -> None:
        if not _in_backward():
            tracker.linear_inputs[-1].append(args[0])

    for block in parallel.blocks(model):
        block.register_forward_pre_hook(begin_block)
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            linear.register_forward_pre_hook(keep_input)


def _in_backward() -> bool:
    """Whether a forward pass runs inside of the backward pass, to recompute activations."""
    return torch._C._current_graph_task_id() != -1
