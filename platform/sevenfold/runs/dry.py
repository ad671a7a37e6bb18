"""What a recipe comes to, told without starting anything."""

from __future__ import annotations

from sevenfold import storage
from sevenfold.data.order import Plan, most_rows
from sevenfold.recipe import Recipe
from sevenfold.runs import prepare


def describe(recipe: Recipe) -> str:
    """The resolved recipe in YAML, and the figures derived from it as comments. Raises InputError as a run."""
    _, count = prepare.check(recipe)
    if root := prepare.corpus_to_make(recipe):
        data = [f"corpus: {root} is not there yet; the run makes it first"]
    else:
        found = prepare.inputs(recipe)
        plan = Plan(found.train, recipe.seed, recipe.lanes)
        windows, groups = plan.windows_per_epoch, plan.groups_per_window
        held_out = f"; held out {found.validation.documents:,}" if found.validation else ""
        data = [
            f"documents: {found.train.documents:,} in {len(found.train.shards)} shards, "
            f"{found.train.bytes / 1e6:,.1f} MB of text{held_out}",
            f"chunks: {windows} windows an epoch (row groups a window: {groups}), {plan.lanes} lanes",
        ]
    rows = most_rows(recipe.train.global_batch, recipe.cluster.num_workers, recipe.lanes)
    figures = [
        f"parameters: {count:,}",
        f"tokens a step: {recipe.tokens_per_step:,} ({recipe.train.global_batch} rows of {recipe.data.sequence_length})",
        f"steps: {recipe.steps:,}, {recipe.steps * recipe.tokens_per_step:,} tokens in all",
        f"each worker: at most {rows} rows a step in {-(-rows // recipe.train.micro_batch)} micro-batches",
        *data,
        "needs: " + ", ".join(f"{v:g} {k}" for k, v in prepare.needs(recipe).items() if v),
        f"run folder: {storage.join(storage.place(recipe.storage), recipe.name)}",
    ]
    return recipe.to_yaml() + "".join(f"# {line}\n" for line in figures)
