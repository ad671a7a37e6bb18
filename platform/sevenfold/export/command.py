"""The command `export`: a checkpoint of a run as a Hugging Face directory, without Ray."""

from __future__ import annotations

from sevenfold import storage
from sevenfold.engine.checkpoint import checkpoint_paths, latest_checkpoint, verified_checkpoint
from sevenfold.engine.checkpoint.manifest import Checkpoint, DamagedError
from sevenfold.errors import InputError
from sevenfold.export.hugging_face import export
from sevenfold.prepare.data import load_inputs
from sevenfold.prepare.job import read_recipe
from sevenfold.report.console import say
from sevenfold.report.run_log import logged_metrics
from sevenfold.run_folder import RunFolder


def run(
    path: str,
    step: int | None = None,
    out: str | None = None,
    merge: bool = False,
    trusted_code: list[str] | None = None,
) -> None:
    """Exports a checkpoint of a run.

    Args:
        path: The run's folder.
        step: The checkpoint's step. None: the latest valid one, or the one with the best validation
            if the run keeps it.
        out: A new or empty folder for the model; if the run has an adapter, for the adapter alone.
            None: the run's model/ and, if it has an adapter, adapter/. Earlier exports there are
            replaced; files that no export wrote stay.
        merge: With `out`, for a run with an adapter: exports the base model with the adapter merged
            into it. Its output is checked against that of the adapter.
        trusted_code: The hashes of the models' Python code that may run.

    Raises:
        InputError: There is no run, the checkpoint does not exist or is damaged, the folder is not
            empty, or there is no adapter to merge.
        RunError: The folder cannot be written, or the merged model's output differs.
    """
    folder = RunFolder.existing(path)
    target = storage.resolve_output(out) if out else folder.model
    into_run = target == folder.model
    if not into_run and storage.listdir(target):
        raise InputError(
            f"--out {target}: expected a new or empty folder, found one with files in it: "
            "choose another"
        )
    recipe = read_recipe(folder).trusting(trusted_code)
    checkpoint = _choose_checkpoint(folder.checkpoints, step, recipe.validation.keeps_best)
    manifest = load_inputs(folder).train
    has_adapter = recipe.adapter is not None
    if merge and not has_adapter:
        raise InputError(f"--merge: {folder.root} has no adapter: leave out --merge")
    adapter_only = has_adapter and not into_run and not merge
    adapter_target = target if adapter_only else folder.adapter if into_run else None
    metrics = logged_metrics(folder.log, checkpoint.step)
    export(
        recipe,
        checkpoint,
        folder.tokenizer,
        manifest,
        metrics,
        None if adapter_only else target,
        adapter_target,
        new=not into_run,
    )
    if adapter_only:
        content = "adapter only"
    elif has_adapter:
        content = "model with the adapter merged; its output was checked"
    else:
        content = "full model"
    say(f"{folder.name}, step {checkpoint.step}: {target} ({content})")


def _choose_checkpoint(folder: str, step: int | None, best: bool) -> Checkpoint:
    """Returns a verified checkpoint.

    Args:
        folder: The folder of the checkpoints.
        step: The checkpoint's step. None: the latest valid one, or the best one.
        best: Whether to choose the best one instead of the latest.

    Raises:
        InputError: There is no such checkpoint, or it is damaged.
    """
    paths = checkpoint_paths(folder)
    steps = ", ".join(map(str, paths))
    available = steps or "none (none was saved yet; those of a sweep are in its trials)"
    if step is None:
        latest = latest_checkpoint(folder, say)
        if latest is None:
            found = f"only damaged ones: {steps}" if paths else available
            raise InputError(f"{folder}: expected a valid checkpoint, found {found}")
        mark = latest.extra["best"]["mark"] if best else None
        return _choose_checkpoint(folder, mark["step"], False) if mark else latest
    if step not in paths:
        raise InputError(f"{folder}: expected a checkpoint of step {step}, found {available}")
    try:
        return verified_checkpoint(paths[step])
    except DamagedError as e:
        raise InputError(f"{e}; choose another one with --step: {available}") from None
