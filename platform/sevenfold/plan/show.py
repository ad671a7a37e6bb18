"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from sevenfold.plan import budget, choose, speed
from sevenfold.plan.choose import Candidate
from sevenfold.plan.cost import Cost
from sevenfold.plan.hardware import GIB, Fleet
from sevenfold.plan.speed import Size
from sevenfold.recipe import Recipe
from sevenfold.report.console import say, table

SHOWN, NOT_FITTING = 8, 3  # layouts
HELD = {
    "parameters": "param", "gradients": "grad", "optimizer": "optim", "activations": "activ", "logits": "logit",
    "buffers": "buff", "reserve": "res",
}  # fmt: skip


def model(recipe: Recipe, made: Size, assumed: Sequence[str]) -> None:
    frozen = f" ({made.trained:,} trained)" if made.trained != made.parameters else ""
    steps = f", {recipe.steps:,} steps" if recipe.steps else ", as many steps as its data last"
    say(
        f"{recipe.name}: {made.parameters:,} parameters{frozen}, {made.flops_per_token / 1e9:,.4g} GFLOPs a token, "
        f"{recipe.tokens_per_step:,} tokens a step ({recipe.train.global_batch} rows of {recipe.data.sequence_length}){steps}"
    )
    for line in assumed:
        say(f"assumed: {line}")


def layouts(found: Sequence[Candidate], chosen: Candidate) -> None:
    """Of one fleet, the quickest and, of those that do not fit, the nearest."""
    fleet = chosen.fleet
    fitting = [c for c in found if c.speed is not None]
    rows = fitting[:SHOWN] + [c for c in found if c.speed is None][:NOT_FITTING]
    if chosen not in rows:
        rows = [*rows[: SHOWN - 1], chosen, *rows[SHOWN:]]
    machines = f"{fleet.nodes} machine{'s' * (fleet.nodes > 1)}{', spot' * fleet.spot}"
    title = f"{fleet.name}: {fleet.gpus} x {fleet.gpu.name}, {machines}: GiB a GPU of {fleet.gpu.memory / GIB:.1f}"
    table(
        title, ("layout, rows, checkpoint", *HELD.values(), "all", "free", "tokens/s", "MFU"), [_row(c, chosen) for c in rows]
    )
    say("  layout; rows a micro-batch; activation checkpointing; grad: of several micro-batches also whole; - does not fit")
    if hidden := len(found) - len(rows):
        say(f"  and {hidden} more: {len(fitting)} of {len(found)} fit")


def _row(c: Candidate, chosen: Candidate) -> list[str]:
    layout = c.layout
    held = [f"{getattr(c.memory, part) / GIB:.1f}" for part in HELD]
    rate = [f"{c.speed.tokens:,.0f}", f"{c.speed.mfu:.1%}"] if c.speed else ["-", "-"]
    how = {"selective": "sel."}.get(layout.activation_checkpointing, layout.activation_checkpointing)
    name = f"{'> ' if c is chosen else ''}{choose.named(layout).split(',')[0]}, {layout.micro_batch}, {how}"
    return [name, *held, f"{c.memory.total / GIB:.1f}", f"{c.free / GIB:.1f}", *rate]


def chosen(recipe: Recipe, found: Sequence[Candidate], picked: Candidate) -> None:
    assert picked.speed is not None
    say(f"chosen: {choose.named(picked.layout)}: {choose.why(picked, found)}")
    parts = picked.speed.parts
    told = ", ".join(f"{k} {v:.2f}" for k, v in parts.items() if v >= 0.005)
    say(f"a step: {picked.speed.step:.2f} s ({told} s); {picked.speed.per_gpu:,.0f} tokens/s a GPU, MFU {picked.speed.mfu:.1%}")


def money(recipe: Recipe, rows: Sequence[tuple[Candidate, Cost]]) -> None:
    out = []
    for c, spent in rows:
        assert c.speed is not None
        out.append([
            f"{c.fleet.name}: {c.layout.gpus} x {c.fleet.gpu.name}", f"{c.speed.tokens:,.0f} +-{speed.SPREAD:.0%}",
            _span(spent.hours, "h"), _span(spent.usd, "USD"), f"{spent.effective:.2%}", f"{spent.mtbf:,.0f} h",
        ])  # fmt: skip
    columns = ("machines", "tokens/s", "time", "money", "lasts", "a failure each")
    tokens = rows[0][1].tokens
    what = f"{tokens:,} tokens" if tokens else "its data, of which the plan does not know how much it is"
    table(f"{recipe.name}: {what}", columns, out)
    for line in dict.fromkeys(c.fleet.priced for c, _ in rows):
        say(f"price: {line}")
    for beside in {c.fleet.beside for c, _ in rows if c.fleet.beside and c.fleet.hourly is not None}:
        say(f"  and {beside:,.2f} USD an hour for the head and a machine that feeds, which the money counts")


def _span(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    form = ",.0f" if value >= 10 else ".2g"
    low, high = value / (1 + speed.SPREAD), value / (1 - speed.SPREAD)
    return f"{value:{form}} {unit} ({low:{form}} - {high:{form}})"


def beside(spent: Cost, step: float, fleet: Fleet) -> None:
    """Checkpoints, and the CPUs that feed."""
    every = f"the recipe saves each {spent.every:,}" if spent.every else "the recipe saves at the end alone"
    say(
        f"a checkpoint: {spent.checkpoint / 1e9:,.3g} GB; best each {spent.best:,} steps "
        f"({spent.best * step / 60:,.1f} min), {every}"
    )
    say(
        f"fed by {spent.cores:.3f} CPU cores at work; its data tasks ask Ray for {spent.asked:g} CPUs"
        if spent.asked
        else f"fed by {spent.cores:.3f} CPU cores at work, in the workers themselves"
    )


def trained(usd: float, found: Sequence[budget.Trained]) -> None:
    rows = []
    for t in found:
        low = t.speed.range
        rows.append([
            f"{t.size.parameters / 1e6:,.0f}M", f"{t.config['hidden_size']} x {t.config['num_hidden_layers']}",
            f"{t.fleet.gpus} x {t.fleet.gpu.name}, {t.fleet.name}", f"{low[0]:,.0f} - {low[1]:,.0f}", f"{t.speed.mfu:.0%}",
            f"{t.hours:,.1f}", f"{t.tokens / 1e9:,.2f}e9", f"{t.ratio:,.1f}", f"{t.loss:.3f}",
        ])  # fmt: skip
    columns = ("model", "width x blocks", "GPUs", "tokens/s", "MFU", "hours", "tokens", "a parameter", "loss by the law")
    table(
        f"{usd:,.0f} USD: new decoders of {budget.LENGTH} tokens a row, {budget.BATCH:,} a step", columns, rows, left=("GPUs",)
    )
    twenty, least = budget.optimum(found)
    sizes = [t.size.parameters for t in found]

    def told(point: tuple[float, float]) -> str:
        at_end = "" if sizes[0] * 1.01 < point[0] < sizes[-1] * 0.99 else " (an end of the sizes looked at)"
        return f"{point[0] / 1e6:,.0f}M parameters, {point[1] / 1e9:,.2f}e9 tokens{at_end}"

    say(
        f"the largest that is compute-optimal: {told(twenty)}: {budget.RATIO} tokens a parameter (arXiv 2203.15556, approach 1)"
    )
    say(f"least loss by the refit of approach 3 (arXiv 2404.10102): {told(least)}")
    for line in dict.fromkeys(t.fleet.priced for t in found):
        say(f"price: {line}")


def tuned(fleet: Fleet) -> None:
    def count(gpus: int | None) -> str:
        return "-" if gpus is None else f"{gpus}"

    rows = [[t.name, f"{t.parameters / 1e9:,.2f}e9", count(t.whole), count(t.adapter)] for t in budget.tune(fleet)]
    what = (
        f"{fleet.name}: fewest of {fleet.gpus} {fleet.gpu.name} that fine-tune it, a row of {budget.TUNED_LENGTH} tokens each"
    )
    table(what, ("pretrained", "parameters", "whole", "LoRA"), rows)
    say(
        "by a closed form, full checkpointing, float32 shards, AdamW (the plan of a recipe with model.path traces it); "
        "-: does not fit"
    )
