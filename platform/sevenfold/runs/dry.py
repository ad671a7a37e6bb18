"""What a recipe comes to, told without starting anything."""

from __future__ import annotations

from sevenfold import storage
from sevenfold.data.order import Plan, most_rows
from sevenfold.recipe import Recipe
from sevenfold.runs import prepare


def describe(recipe: Recipe) -> str:
    """The resolved recipe in YAML, and the figures derived from it as comments. Raises InputError as a run."""
    found = None if prepare.corpus_to_make(recipe) else prepare.inputs(recipe)
    _, count = prepare.check(recipe if found is None else prepare.with_classes(recipe, found.train))
    if root := prepare.corpus_to_make(recipe):
        data = [f"corpus: {root} is not there yet; the run makes it first"]
    else:
        assert found is not None
        data = _data(recipe, found)
    rows = most_rows(recipe.train.global_batch, recipe.readers, recipe.lanes)
    figures = [
        f"parameters: {count:,}",
        f"tokens a step: {recipe.tokens_per_step:,} ({recipe.train.global_batch} rows of {recipe.data.sequence_length})",
        f"steps: {recipe.steps:,}, {recipe.steps * recipe.tokens_per_step:,} tokens in all"
        if recipe.steps
        else f"steps: as many as {recipe.data.epochs} epochs last",
        f"each worker: at most {rows} rows a step in {-(-rows // recipe.train.micro_batch)} micro-batches",
        *data,
        "needs: " + ", ".join(f"{v:g} {k}" for k, v in prepare.needs(recipe).items() if v),
        f"run folder: {storage.join(storage.place(recipe.storage), recipe.name)}",
    ]
    return recipe.to_yaml() + "".join(f"# {line}\n" for line in figures)


def _data(recipe: Recipe, found: prepare.Inputs) -> list[str]:
    """What the sources hold and how they will be read. Tokens are guessed, 4 bytes each: there is no tokenizer yet."""
    plan = Plan.of(found.train, recipe.data, recipe.seed, recipe.lanes)
    documents, held = found.train.documents, found.validation
    aside = f"; held out {recipe.data.held_out:.2%}" if recipe.data.held_out else ""
    aside = f"; held out {held.bytes / 1e6:,.1f} MB" if held else aside
    out = [
        f"documents: {f'{documents:,}' if documents else 'uncounted'} in {len(found.train.shards)} shards, "
        f"{found.train.bytes / 1e6:,.1f} MB of text"
        + aside,
        f"chunks: {plan.windows_per_epoch} windows an epoch ({plan.groups_per_window} row groups a window), {plan.lanes} lanes",
    ]  # fmt: skip
    for (begin, weights), segment in zip(plan.stages, plan.segments, strict=False):
        share = ", ".join(f"{s.name} {w / sum(weights):.1%}" for s, w in zip(recipe.data.sources, weights, strict=True))
        out.append(f"mixture from token {begin:,} (window {segment.first // plan.groups_per_window}): {share}")
    return out
