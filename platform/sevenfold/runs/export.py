"""Any checkpoint of a run as a Hugging Face directory, made in this process: no Ray is started."""

from __future__ import annotations

from sevenfold import storage
from sevenfold.data.manifest import Manifest
from sevenfold.engine import checkpoint as ckpt
from sevenfold.engine.checkpoint import Checkpoint, DamagedError
from sevenfold.errors import InputError
from sevenfold.model.export import export
from sevenfold.report.console import say
from sevenfold.report.metrics import logged
from sevenfold.runs import prepare
from sevenfold.storage import RunFolder


def run(path: str, step: int | None = None, out: str | None = None, merge: bool = False) -> None:
    """Exports a checkpoint of a run.

    Args:
        path: The run's folder.
        step: The checkpoint's step. None: the newest whole one, or the best validated one where the run keeps it.
        out: A new or empty folder. It gets the model; of a run with an adapter the adapter alone. None: the run's model/,
            whose earlier export is replaced, and its adapter/ where it has one; files that no export wrote stay.
        merge: With `out`, of a run with an adapter: the base model with the adapter in it, whose output is checked against
            the adapter's.

    Raises:
        InputError: no run, no such checkpoint or a damaged one, a folder that is not empty, nothing to merge.
        RunError: it could not be written, or the merged model is not the adapted one.
    """
    folder = RunFolder.of(path)
    to = storage.place(out) if out else folder.model
    if to != folder.model and storage.listdir(to):
        raise InputError(f"--out {to}: expected a new or empty folder, found one with files in it: choose another")
    recipe = prepare.recipe_of(folder)
    found = _chosen(folder.checkpoints, step, recipe.validation.keeps_best)
    manifest = Manifest.from_json(storage.read_json(folder.manifest)["train"])
    adapted = recipe.adapter is not None
    if merge and not adapted:
        raise InputError(f"--merge: {folder.root} has no adapter: its model is whole as it is")
    alone = adapted and to != folder.model and not merge
    adapter = to if alone else folder.adapter if to == folder.model else None
    metrics = logged(folder.log, found.step)
    export(
        recipe, found, folder.tokenizer, manifest, metrics, None if alone else to, adapter, new=to != folder.model
    )  # fmt: skip
    what = "its adapter alone" if alone else "its adapter merged, the output as the adapter's" if adapted else "the whole model"
    say(f"{folder.name}, step {found.step}: {to} ({what})")


def _chosen(folder: str, step: int | None, best: bool) -> Checkpoint:
    """A verified checkpoint. Raises InputError where there is none."""
    steps = ckpt.steps(folder)
    there = ", ".join(map(str, steps)) or "none (the run has saved none yet; those of a sweep are its trials')"
    if step is None:
        if found := ckpt.latest(folder, say):
            mark = found.extra["best"]["mark"] if best else None
            return _chosen(folder, mark["step"], False) if mark else found
        raise InputError(f"{folder}: expected a whole checkpoint, found {f'only damaged ones: {there}' if steps else there}")
    if step not in steps:
        raise InputError(f"{folder}: expected a checkpoint of step {step}, found {there}")
    try:
        return ckpt.verified(steps[step])
    except DamagedError as e:
        raise InputError(f"{e}; choose another by --step, of {there}") from None
