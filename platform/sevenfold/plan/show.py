"""Prints a plan as text and tables."""

from __future__ import annotations

from collections.abc import Sequence

from sevenfold.plan import budget, choose, speed
from sevenfold.plan.choose import Candidate
from sevenfold.plan.cost import Cost
from sevenfold.plan.hardware import GIB, Fleet
from sevenfold.plan.speed import Size
from sevenfold.recipe import Recipe
from sevenfold.report.console import say, table

# The number of layouts to show: of those that fit, and of the others.
FITTING, NOT_FITTING = 8, 3
# The columns of memory.Memory's parts.
MEMORY_COLUMNS = {
    "parameters": "param",
    "gradients": "grad",
    "optimizer": "optim",
    "activations": "activ",
    "logits": "logit",
    "buffers": "buff",
    "reserve": "res",
}
# The names of the parts of speed.Speed.parts.
STEP_PARTS = {
    "products": "matmuls",
    "attention": "attention",
    "memory": "memory-bound kernels",
    "host": "kernel launches",
    "communication": "communication",
    "optimizer": "optimizer",
}


def model(recipe: Recipe, size: Size, assumptions: Sequence[str]) -> None:
    """Prints the size of the recipe's model, the tokens of a step, and what is assumed."""
    trained = f" ({size.trained:,} trained)" if size.trained != size.parameters else ""
    sequences, length = recipe.train.global_batch, recipe.data.sequence_length
    steps = f"{recipe.steps:,} steps" if recipe.steps else "steps until the data ends"
    say(
        f"{recipe.name}: {size.parameters:,} parameters{trained}, "
        f"{size.flops_per_token / 1e9:,.4g} GFLOPs per token, "
        f"{recipe.tokens_per_step:,} tokens per step ({sequences} sequences of {length}), {steps}"
    )
    for assumption in assumptions:
        say(f"assumed: {assumption}")


def layouts(found: Sequence[Candidate], chosen: Candidate) -> None:
    """Prints a table of a fleet's layouts.

    It has the fastest layouts, and the smallest of those that do not fit.
    """
    fleet = chosen.fleet
    fitting = [c for c in found if c.speed is not None]
    shown = fitting[:FITTING] + [c for c in found if c.speed is None][:NOT_FITTING]
    if chosen not in shown:
        shown = [*shown[: FITTING - 1], chosen, *shown[FITTING:]]
    machines = f"{fleet.nodes} machine{'s' * (fleet.nodes > 1)}{', spot' * fleet.spot}"
    table(
        f"{fleet.name}: {fleet.gpus} x {fleet.gpu.name}, {machines}; "
        f"GiB per GPU, of {fleet.gpu.memory / GIB:.1f}",
        (
            "layout, micro-batch, ckpt",
            *MEMORY_COLUMNS.values(),
            "total",
            "free",
            "tokens/s",
            "MFU",
        ),
        [_layout_row(c, chosen) for c in shown],
    )
    say("  micro-batch: sequences; ckpt: activation checkpointing (sel. = selective)")
    say(
        "  grad: including unsharded gradients of several micro-batches; "
        "res: unusable memory of the allocator, CUDA and NCCL; -: does not fit"
    )
    if hidden := len(found) - len(shown):
        say(f"  {hidden} layouts not shown; {len(fitting)} of {len(found)} fit")


def _layout_row(candidate: Candidate, chosen: Candidate) -> list[str]:
    layout = candidate.layout
    checkpointing = layout.activation_checkpointing
    if checkpointing == "selective":
        checkpointing = "sel."
    mark = "> " if candidate is chosen else ""
    mesh = choose.named(layout).split(",")[0]
    rate = ["-", "-"]
    if candidate.speed:
        rate = [f"{candidate.speed.tokens:,.0f}", f"{candidate.speed.mfu:.1%}"]
    return [
        f"{mark}{mesh}, {layout.micro_batch}, {checkpointing}",
        *(f"{getattr(candidate.memory, part) / GIB:.1f}" for part in MEMORY_COLUMNS),
        f"{candidate.memory.total / GIB:.1f}",
        f"{candidate.free / GIB:.1f}",
        *rate,
    ]


def choice(found: Sequence[Candidate], chosen: Candidate) -> None:
    """Prints the chosen layout, the reason for it, and the time of a step by parts."""
    estimate = chosen.speed
    assert estimate is not None
    say(f"chosen: {choose.named(chosen.layout)}: {choose.why(chosen, found)}")
    parts = ", ".join(
        f"{STEP_PARTS[name]} {seconds:.2f} s"
        for name, seconds in estimate.parts.items()
        if seconds >= 0.005
    )
    say(
        f"step: {estimate.step:.2f} s ({parts}); {estimate.per_gpu:,.0f} tokens/s per GPU, "
        f"MFU {estimate.mfu:.1%}"
    )


def costs(recipe: Recipe, plans: Sequence[tuple[Candidate, Cost]]) -> None:
    """Prints a table of the time and cost of the run on each fleet, and the prices."""
    rows = []
    for candidate, cost in plans:
        assert candidate.speed is not None
        fleet = candidate.fleet
        rows.append(
            [
                f"{fleet.name}: {candidate.layout.gpus} x {fleet.gpu.name}",
                f"{candidate.speed.tokens:,.0f} +-{speed.SPREAD:.0%}",
                _with_range(cost.hours, "h"),
                _with_range(cost.usd, "USD"),
                f"{cost.goodput:.2%}",
                f"{cost.mtbf_hours:,.0f} h",
            ]
        )
    tokens = plans[0][1].tokens
    amount = f"{tokens:,} tokens" if tokens else "all its data (size not known to the plan)"
    columns = ("machines", "tokens/s", "time", "cost", "goodput", "MTBF")
    table(f"{recipe.name}: {amount}", columns, rows)
    for priced in dict.fromkeys(candidate.fleet.price_source for candidate, _ in plans):
        say(f"price: {priced}")
    priced_fleets = [c.fleet for c, _ in plans if c.fleet.hourly is not None]
    for usd in {fleet.other_nodes_usd for fleet in priced_fleets if fleet.other_nodes_usd}:
        say(f"price: head node and data node {usd:,.2f} USD per hour, included in the cost")


def _with_range(value: float | None, unit: str) -> str:
    """Returns a value with the range that it should be in, such as "20 h (17 - 24)"."""
    if value is None:
        return "-"
    form = ",.0f" if value >= 10 else ".2g"
    low, high = value / (1 + speed.SPREAD), value / (1 - speed.SPREAD)
    return f"{value:{form}} {unit} ({low:{form}} - {high:{form}})"


def checkpoints_and_data(cost: Cost, step: float) -> None:
    """Prints the size and interval of checkpoints, and the CPUs that prepare the data.

    Args:
        cost: What the run costs.
        step: Seconds per step.
    """
    saves = f"every {cost.save_every:,} steps" if cost.save_every else "only at the end"
    say(
        f"checkpoint: {cost.checkpoint / 1e9:,.3g} GB; best interval {cost.best_save_every:,} "
        f"steps ({cost.best_save_every * step / 60:,.1f} min); the recipe saves {saves}"
    )
    where = (
        f"the data tasks request {cost.data_cpus:g} CPUs from Ray"
        if cost.data_cpus
        else "the workers prepare the data themselves"
    )
    say(f"data: keeps {cost.cores:.3f} CPU cores busy; {where}")


def pretraining(usd: float, found: Sequence[budget.Trained]) -> None:
    """Prints what a budget can pretrain, and the compute-optimal sizes."""
    rows = []
    for result in found:
        low, high = result.speed.range
        rows.append(
            [
                f"{result.size.parameters / 1e6:,.0f}M",
                f"{result.config['hidden_size']} x {result.config['num_hidden_layers']}",
                f"{result.fleet.gpus} x {result.fleet.gpu.name}, {result.fleet.name}",
                f"{low:,.0f} - {high:,.0f}",
                f"{result.speed.mfu:.0%}",
                f"{result.hours:,.1f}",
                f"{result.tokens / 1e9:,.2f}e9",
                f"{result.ratio:,.1f}",
                f"{result.loss:.3f}",
            ]
        )
    columns = (
        "model",
        "width x blocks",
        "GPUs",
        "tokens/s",
        "MFU",
        "hours",
        "tokens",
        "tokens/param",
        "predicted loss",
    )
    title = (
        f"{usd:,.0f} USD: decoders to pretrain, with sequences of {budget.SEQUENCE_LENGTH} tokens "
        f"and {budget.TOKENS_PER_STEP:,} tokens per step"
    )
    table(title, columns, rows, left=("GPUs",))
    by_ratio, by_loss = budget.optimum(found)
    smallest, largest = found[0].size.parameters, found[-1].size.parameters

    def text(point: tuple[float, float]) -> str:
        parameters, tokens = point
        inside = smallest * 1.01 < parameters < largest * 0.99
        note = "" if inside else " (at the end of the sizes considered)"
        return f"{parameters / 1e6:,.0f}M parameters, {tokens / 1e9:,.2f}e9 tokens{note}"

    say(
        f"compute-optimal with {budget.TOKENS_PER_PARAMETER} tokens per parameter "
        f"(arXiv 2203.15556, approach 1): {text(by_ratio)}"
    )
    say(f"lowest predicted loss (arXiv 2404.10102, refit of approach 3): {text(by_loss)}")
    for priced in dict.fromkeys(result.fleet.price_source for result in found):
        say(f"price: {priced}")


def fine_tuning(fleet: Fleet) -> None:
    """Prints how many GPUs of a fleet are needed to fine-tune pretrained models."""
    rows = [
        [
            result.name,
            f"{result.parameters / 1e9:,.2f}e9",
            "-" if result.whole is None else f"{result.whole}",
            "-" if result.adapter is None else f"{result.adapter}",
        ]
        for result in budget.tune(fleet)
    ]
    table(
        f"{fleet.name}: GPUs needed to fine-tune, of {fleet.gpus} {fleet.gpu.name}; "
        f"one sequence of {budget.TUNED_LENGTH} tokens per GPU",
        ("pretrained model", "parameters", "all parameters", "LoRA"),
        rows,
    )
    say(
        "estimated with full checkpointing, float32 shards and AdamW, without tracing the model "
        "(the plan of a recipe with model.path traces it); -: does not fit"
    )
