"""Commands that start runs, and that work on finished ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import typer

from sevenfold.commands.options import (
    DryRun,
    Overrides,
    Preview,
    Recipe,
    RecipeOrData,
    Run,
    StartFrom,
    Task,
    TrustRemoteCode,
    Verbose,
)


def corpus(
    which: Annotated[
        Literal["python"],
        typer.Argument(help="python: the source code of this Python installation."),
    ],
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="A new folder for the corpus.")
    ] = "corpus/python",
    max_mb: Annotated[
        float, typer.Option(metavar="MB", help="Maximum size of the text, in MB.")
    ] = 48,
) -> None:
    """Write a built-in corpus, which needs no download."""
    from sevenfold import storage
    from sevenfold.data.sources.python_corpus import build_python
    from sevenfold.report.console import say

    built = build_python(storage.resolve_input(out), max_mb)
    say(
        f"{built.root}: {built.documents:,} documents ({built.text_mb:.1f} MB of text), "
        f"{built.heldout_documents:,} of them held out; {built.summaries:,} docstring summaries"
    )


def _trainer(name: str, what: str) -> Callable[..., None]:
    """Returns the command that runs `train.launch.NAME` with a recipe or with data."""

    def command(
        recipe: RecipeOrData,
        overrides: Overrides = None,
        model: StartFrom = None,
        task: Task = None,
        preview: Preview = 0,
        dry_run: DryRun = False,
        verbose: Verbose = False,
        trust_remote_code: TrustRemoteCode = None,
    ) -> None:
        from sevenfold.train import launch

        parsed = _read(recipe, overrides, trust_remote_code, model, task)
        _run_or_describe(getattr(launch, name), parsed, dry_run, verbose, preview)

    command.__name__ = name
    command.__doc__ = f"""{what}

    With data instead of a recipe, the recipe that `sevenfold init DATA` writes is run.
    """
    return command


pretrain = _trainer("pretrain", "Pretrain a model on text.")
finetune = _trainer("finetune", "Fine-tune a model.")


def sweep(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    trust_remote_code: TrustRemoteCode = None,
    trust_state: Annotated[
        bool,
        typer.Option(
            "--trust-state",
            help="Resume a sweep whose state was not saved with your key. Such a state can run "
            "any code.",
        ),
    ] = False,
) -> None:
    """Tune hyperparameters, as the recipe's section `sweep` says."""
    from sevenfold.sweep.sweep import run

    parsed = _read(recipe, overrides, trust_remote_code)
    _run_or_describe(partial(run, trust_state=trust_state), parsed, dry_run, verbose)


def tokenize(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    trust_remote_code: TrustRemoteCode = None,
) -> None:
    """Fill the token cache of a recipe (data.cache)."""
    from sevenfold.train.tokenize import run

    _run_or_describe(run, _read(recipe, overrides, trust_remote_code), dry_run, verbose)


def _read(
    recipe: str,
    overrides: list[str] | None,
    trust_remote_code: list[str] | None,
    model: str | None = None,
    task: str | None = None,
) -> Any:
    """Returns the recipe that a command was given, or one that is made for its data.

    Args:
        recipe: The recipe's file, or data.
        overrides: Changes to the recipe.
        trust_remote_code: The hashes of the models' code that may run.
        model: For data: the model to start from.
        task: For data: the task.

    Raises:
        InputError: Also: model or task is given beside a recipe.
    """
    from sevenfold.cluster.auto import fill
    from sevenfold.errors import InputError
    from sevenfold.init.command import is_data, recipe_of
    from sevenfold.recipe import parse

    if is_data(recipe):
        parsed = recipe_of(recipe, task, model, overrides or [])
    elif model is not None or task is not None:
        option = f"--model {model}" if model is not None else f"--task {task}"
        raise InputError(
            f"{option}: {recipe} is a recipe, which has both: change it, or give data instead"
        )
    else:
        parsed = parse(recipe, overrides or [], fill)
    return parsed.trusting(trust_remote_code)


def _run_or_describe(run: Any, recipe: Any, dry_run: bool, verbose: bool, preview: int = 0) -> None:
    """Runs a recipe, or describes it if this is a dry run.

    Args:
        run: Runs a recipe; called with the recipe and `verbose`.
        recipe: The recipe.
        dry_run: Whether to describe the recipe instead.
        verbose: Whether to show Ray's logs.
        preview: The number of rows to show; if there are any, this is a dry run.
    """
    if dry_run or preview:
        from sevenfold.prepare.dry_run import describe
        from sevenfold.report.console import print_text

        print_text(describe(recipe, preview))
    else:
        run(recipe, verbose)


def drill(
    recipe: Recipe,
    overrides: Overrides = None,
    faults: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="The faults to inject.  [default: all that are possible here]"
        ),
    ] = "",
    steps: Annotated[int, typer.Option(metavar="N", help="Training steps of each run.")] = 60,
) -> None:
    """Inject faults and check that the results are identical."""
    from sevenfold.faults.drill import run

    run(_read(recipe, overrides, None), [fault for fault in faults.split(",") if fault], steps)


def evaluate(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            metavar="N",
            help="Number of processes, each with a copy of the model.  [default: as in training]",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Maximum number of new tokens.  [default: the recipe's]"),
    ] = None,
    bleu_tokenize: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="BLEU's tokenizer: 13a, intl, zh, ja-mecab, ko-mecab, char or none.  [default: "
            "the recipe's, or that of the references' script]",
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="TASK.yaml",
            help="Also evaluate on this task of lm-eval (pip install 'sevenfold[harness]').",
        ),
    ] = None,
    verbose: Verbose = False,
    trust_remote_code: TrustRemoteCode = None,
) -> None:
    """Evaluate finished runs against baselines and each other."""
    from sevenfold.evaluate.run import run

    run(runs, verbose, workers, harness, max_new_tokens, bleu_tokenize, trust_remote_code)


def export(
    run: Run,
    step: Annotated[
        int | None,
        typer.Option(metavar="N", help="The checkpoint's step.  [default: the latest valid one]"),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="A new or empty folder.  [default: the run's model/]"),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="With --out: merge the adapter into its base model.")
    ] = False,
    trust_remote_code: TrustRemoteCode = None,
) -> None:
    """Export a checkpoint of a run as a Hugging Face directory."""
    from sevenfold.export import command

    command.run(run, step, out, merge, trust_remote_code)


def ledger(
    run: Run,
    what: Annotated[
        Literal["which", "replay"],
        typer.Argument(help="which: list the documents; replay: rebuild the input tensors."),
    ],
    step: Annotated[
        int, typer.Option(metavar="N", help="The training step, as in the log; the first is 1.")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="which: save all documents (.parquet); replay: save the tensors (.safetensors).",
        ),
    ] = None,
) -> None:
    """Show which data a training step of a run read."""
    from sevenfold.inspect import ledger

    (ledger.which if what == "which" else ledger.replay)(run, step, out)
