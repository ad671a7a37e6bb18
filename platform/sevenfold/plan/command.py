"""The command `sevenfold plan`: whether a recipe fits, how fast it trains, and what it costs.

With `--budget` it also shows what a sum of money can train.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from sevenfold.cluster.auto import fill_for_gpus
from sevenfold.cluster.cluster_file import read_cluster_file
from sevenfold.data.lanes import advice
from sevenfold.errors import InputError
from sevenfold.plan import budget, choose, cost, hardware, shape, show, speed
from sevenfold.plan.choose import Candidate
from sevenfold.plan.cost import Cost
from sevenfold.plan.hardware import Fleet, Table
from sevenfold.plan.write import write_settings
from sevenfold.recipe import Recipe, parse
from sevenfold.report.console import say

# The size of the vocabulary if neither recipe nor tokenizer says it: Llama 2's (arXiv 2307.09288).
VOCABULARY = 32_000


def run(
    path: str | None,
    overrides: list[str],
    *,
    cluster: str | None = None,
    gpus: int | None = None,
    gpu: str | None = None,
    hardware_file: str | None = None,
    writes: bool = False,
    usd: float | None = None,
    trusted_code: list[str] | None = None,
) -> None:
    """Runs the command.

    Args:
        path: The recipe's file; None with `usd` alone.
        overrides: Changes to the recipe, as `section.key=value`.
        cluster: A cluster.yaml, whose pools with GPUs are the machines.
        gpus: The number of GPUs, instead of a cluster; 1 if only `gpu` is given.
        gpu: The kind of GPU, instead of a cluster.
        hardware_file: A file that overrides entries of the hardware table.
        writes: Whether to write the chosen settings into the recipe's file.
        usd: A budget; what it can train is shown.
        trusted_code: The hashes of the models' Python code that may run.

    Raises:
        InputError: The recipe, cluster or hardware is not valid, or the recipe does not fit.
    """
    if path is None and (usd is None or writes or overrides):
        raise InputError(
            "plan: expected RECIPE, or --budget USD alone (without --write and overrides)"
        )
    auto: list[str] = []

    def fill(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
        auto.extend(keys)
        return fill_for_gpus(tree, keys)

    recipe = parse(path, overrides, fill).trusting(trusted_code) if path is not None else None
    table = hardware.load(hardware_file)
    fleets = _fleets(table, cluster, gpus, gpu, recipe)
    if usd is not None:
        _show_budget(usd, fleets)
    if recipe is None or path is None:
        return
    chosen = _plan(recipe, fleets, table)
    if writes:
        dtype = {"train.dtype": recipe.train.dtype} if "train.dtype" in auto else {}
        changes = settings(recipe, chosen) | dtype
        write_settings(path, changes)
        say(f"{path}: wrote {', '.join(f'{key}: {value}' for key, value in changes.items())}")


def _fleets(
    table: Table, cluster: str | None, gpus: int | None, gpu: str | None, recipe: Recipe | None
) -> list[Fleet]:
    """Returns the machines that the options name."""
    if cluster is not None and (gpus is not None or gpu is not None):
        raise InputError("plan: give either --cluster FILE or --gpus N --gpu NAME, not both")
    if cluster is not None:
        return hardware.of_cluster(table, read_cluster_file(cluster), cluster, recipe)
    if gpu is None:
        names = ", ".join(table["gpus"])
        raise InputError(f"plan: expected --cluster FILE, or --gpus N --gpu NAME (one of {names})")
    return [hardware.of_gpus(table, gpu, 1 if gpus is None else gpus)]


def _show_budget(usd: float, fleets: list[Fleet]) -> None:
    show.pretraining(usd, budget.train(usd, fleets))
    largest_of_kind = {f.gpu.name: f for f in sorted(fleets, key=lambda f: f.gpus)}
    for fleet in largest_of_kind.values():
        show.fine_tuning(fleet)


def vocabulary(recipe: Recipe) -> tuple[int, list[str]]:
    """Returns the size of the vocabulary, and what had to be assumed.

    The tokenizer need not exist yet.
    """
    from_tokenizer = None
    if recipe.tokenizer.path is not None and (recipe.model.config or {}).get("vocab_size") is None:
        from sevenfold import storage
        from sevenfold.data.tokenizer import load_tokenizer

        with contextlib.suppress(InputError, OSError, ValueError):
            from_tokenizer = len(load_tokenizer(storage.resolve_input(recipe.tokenizer.path)))
    size = shape.vocabulary(recipe, from_tokenizer or VOCABULARY)
    unknown = from_tokenizer is None and shape.vocabulary(recipe, -1) == -1
    if not unknown:
        return size, []
    return size, [
        f"a vocabulary of {size:,}, as {recipe.tokenizer.path} cannot be loaded; "
        "set another size with model.config.vocab_size=N"
    ]


def _plan(recipe: Recipe, fleets: list[Fleet], table: Table) -> Candidate:
    """Plans the recipe on each fleet, shows the plans and returns the cheapest.

    Raises:
        InputError: The recipe fits on no fleet.
    """
    vocab_size, assumptions = vocabulary(recipe)
    if recipe.objective == "classify" and not recipe.data.classes:
        # The number of classes is only known once the data was read.
        recipe = recipe.override({"data.classes": ["a", "b"]})
        assumptions.append("two classes, as data.classes names none")
    assumptions += [
        "each sequence is one document; kernel rates, FSDP's overlap and the allocator's overhead "
        "as in sevenfold/plan/speed.py and memory.py; +-15%",
        "validation, startup and compilation are not counted",
    ]
    size = speed.size(recipe, vocab_size)
    show.model(recipe, size, assumptions)
    plans: list[tuple[Candidate, Cost]] = []
    failure: InputError | None = None
    for fleet in fleets:
        on_fleet = choose.fitted(recipe, fleet)
        used = fleet.with_gpus(on_fleet.workers[1])
        try:
            found = choose.candidates(on_fleet, vocab_size, used)
            chosen = choose.best(found, on_fleet, table)
        except InputError as e:
            failure = e
            continue
        _show_plan(recipe, on_fleet, found, chosen)
        assert chosen.speed is not None
        plans.append((chosen, cost.cost(on_fleet, size, chosen.speed, chosen.layout, used)))
        if len(fleets) > 1:
            say("")
    if not plans:
        assert failure is not None
        raise failure
    if failure is not None:
        say(f"not possible: {failure}")
    show.costs(recipe, plans)
    chosen, cheapest = min(plans, key=_price_and_speed)
    assert chosen.speed is not None
    show.checkpoints_and_data(cheapest, chosen.speed.step)
    if len(plans) > 1:
        say(f"cheapest: {chosen.fleet.name}, {choose.named(chosen.layout)}")
    return chosen


def _show_plan(
    recipe: Recipe, on_fleet: Recipe, found: Sequence[Candidate], chosen: Candidate
) -> None:
    """Shows the plan on one fleet.

    Args:
        recipe: The recipe as its file says it.
        on_fleet: The recipe on this fleet's GPUs.
        found: All candidates.
        chosen: The chosen one.
    """
    show.layouts(found, chosen)
    show.choice(found, chosen)
    if on_fleet.lanes != recipe.lanes:
        say(
            f"  data.lanes: {on_fleet.lanes}, so that the workers read equally much; "
            f"the order of the data differs from that with {recipe.lanes} lanes"
        )
    readers = chosen.layout.readers
    if idle := advice(on_fleet.train.global_batch, readers, max(on_fleet.lanes, readers)):
        say(f"  {idle}")


def _price_and_speed(plan: tuple[Candidate, Cost]) -> tuple[float, float]:
    """Orders plans by price, those without a known price last, then by throughput."""
    candidate, price = plan
    assert candidate.speed is not None
    return (price.usd if price.usd is not None else float("inf"), -candidate.speed.tokens)


def settings(recipe: Recipe, picked: Candidate) -> dict[str, Any]:
    """Returns the settings of a plan, as `{"section.key": value}`.

    A setting of `parallel` that is the default both in the recipe and in the plan is left out.

    Args:
        recipe: The recipe as its file says it.
        picked: The chosen layout.
    """
    layout = picked.layout
    result: dict[str, Any] = {
        "train.micro_batch": layout.micro_batch,
        "train.activation_checkpointing": layout.activation_checkpointing,
        "parallel.replicate": layout.replicate,
        "parallel.tensor": layout.tensor,
        "cluster.num_workers": layout.gpus,
        "cluster.gpus_per_worker": 1,
    }
    lanes = choose.fitted(recipe, picked.fleet).lanes
    if lanes != recipe.lanes:
        result["data.lanes"] = lanes
    explicit = recipe.model_dump(exclude_unset=True)
    for key in [key for key in result if key.startswith("parallel.")]:
        section, name = key.split(".")
        if result[key] == 1 and name not in explicit.get(section, {}):
            del result[key]
    return result
