"""`sevenfold plan`: will it fit, how fast, how long, for how much; or what a sum of money trains."""

from __future__ import annotations

import contextlib
from typing import Any

from sevenfold.doctor import cluster_file
from sevenfold.errors import InputError
from sevenfold.plan import budget, choose, cost, hardware, shape, show, speed, write
from sevenfold.plan.choose import Candidate
from sevenfold.plan.cost import Cost
from sevenfold.plan.hardware import Fleet, Table
from sevenfold.recipe import Recipe, parse
from sevenfold.report.console import say

VOCABULARY = 32_000  # where nothing says it: Llama 2's (arXiv 2307.09288)


def run(
    path: str | None, overrides: list[str], *, cluster: str | None = None, gpus: int | None = None, gpu: str | None = None,
    hardware_file: str | None = None, writes: bool = False, usd: float | None = None,
) -> None:  # fmt: skip
    """
    Args:
        path: of the recipe; None: with `usd` alone.
        writes: the chosen settings into the recipe's file.

    Raises:
        InputError: what is wrong with recipe, cluster or hardware; a recipe that fits nothing.
    """
    if path is None and (usd is None or writes or overrides):
        raise InputError("plan: expected RECIPE, or --budget USD alone, found neither")
    recipe = parse(path, overrides) if path is not None else None
    table = hardware.load(hardware_file)
    fleets = _fleets(table, cluster, gpus, gpu, recipe)
    if usd is not None:
        _budget(usd, fleets)
    if recipe is None or path is None:
        return
    picked = _plan(recipe, fleets, table)
    if writes:
        changes = settings(recipe, picked)
        write.write(path, changes)
        say(f"{path}: written: {', '.join(f'{k}: {v}' for k, v in changes.items())}")


def _fleets(table: Table, cluster: str | None, gpus: int | None, gpu: str | None, recipe: Recipe | None) -> list[Fleet]:
    if cluster is not None and (gpus is not None or gpu is not None):
        raise InputError("plan: give either --cluster FILE or --gpus N --gpu NAME, not both")
    if cluster is not None:
        return hardware.of_cluster(table, cluster_file.read(cluster), cluster, recipe)
    if gpu is None:
        raise InputError(f"plan: expected --cluster FILE, or --gpus N --gpu NAME (one of {', '.join(table['gpus'])})")
    return [hardware.of_gpus(table, gpu, 1 if gpus is None else gpus)]


def _budget(usd: float, fleets: list[Fleet]) -> None:
    show.trained(usd, budget.train(usd, fleets))
    for fleet in {f.gpu.name: f for f in sorted(fleets, key=lambda f: f.gpus)}.values():
        show.tuned(fleet)


def vocabulary(recipe: Recipe) -> tuple[int, list[str]]:
    """Its size, and what had to be assumed: the tokenizer need not be there yet."""
    told = None
    if recipe.tokenizer.path is not None and (recipe.model.config or {}).get("vocab_size") is None:
        from sevenfold import storage
        from sevenfold.data.tokens import load_tokenizer

        with contextlib.suppress(InputError, OSError, ValueError):
            told = len(load_tokenizer(storage.locate(recipe.tokenizer.path)))
    size = shape.vocabulary(recipe, told or VOCABULARY)
    if told is None and shape.vocabulary(recipe, -1) == -1:
        return size, [f"a vocabulary of {size:,}: {recipe.tokenizer.path} is not there; model.config.vocab_size=N says another"]
    return size, []


def _plan(recipe: Recipe, fleets: list[Fleet], table: Table) -> Candidate:
    size, assumed = vocabulary(recipe)
    if recipe.objective == "classify" and not recipe.data.classes:  # which the data would say
        recipe = recipe.override({"data.classes": ["a", "b"]})
        assumed.append("two classes: data.classes names none")
    assumed += [
        "each row one document; rates, FSDP's overlap and the allocator as in sevenfold/plan/speed.py and memory.py; +-15%",
        "validation, start and compilation are not counted",
    ]
    made, spent, last = speed.size(recipe, size), [], None
    show.model(recipe, made, assumed)
    for fleet in fleets:
        there = choose.fitted(recipe, fleet)
        part = fleet.of(there.workers[1])
        try:
            found = choose.candidates(there, size, part)
            picked = choose.best(found, there, table)
        except InputError as e:
            last = e
            continue
        show.layouts(found, picked)
        show.chosen(there, found, picked)
        if there.lanes != recipe.lanes:
            say(f"  data.lanes: {there.lanes}, for as many readers: another order of the data than with {recipe.lanes}")
        assert picked.speed is not None
        spent.append((picked, cost.cost(there, made, picked.speed, picked.layout, part)))
        if len(fleets) > 1:
            say("")
    if not spent:
        assert last is not None
        raise last
    if last is not None:
        say(f"not there: {last}")
    show.money(recipe, spent)
    picked, best = min(spent, key=_spends)
    assert picked.speed is not None
    show.beside(best, picked.speed.step, picked.fleet)
    if len(spent) > 1:
        say(f"taken: {picked.fleet.name}, {choose.named(picked.layout)}: the cheapest")
    return picked


def _spends(one: tuple[Candidate, Cost]) -> tuple[float, float]:
    """Money where it is known, then time."""
    candidate, spent = one
    assert candidate.speed is not None
    return (spent.usd if spent.usd is not None else float("inf"), -candidate.speed.tokens)


def settings(recipe: Recipe, picked: Candidate) -> dict[str, Any]:
    """What a plan decides, as `{"section.key": value}`; what the recipe leaves at its default and the plan does too is not
    named."""
    layout = picked.layout
    out: dict[str, Any] = {
        "train.micro_batch": layout.micro_batch, "train.activation_checkpointing": layout.activation_checkpointing,
        "parallel.replicate": layout.replicate, "parallel.tensor": layout.tensor, "cluster.num_workers": layout.gpus,
        "cluster.gpus_per_worker": 1,
    }  # fmt: skip
    lanes = choose.fitted(recipe, picked.fleet).lanes
    if lanes != recipe.lanes:
        out["data.lanes"] = lanes
    given = recipe.model_dump(exclude_unset=True)
    for key in [k for k in out if k.startswith("parallel.")]:
        section, name = key.split(".")
        if out[key] == 1 and name not in given.get(section, {}):
            del out[key]
    return out
