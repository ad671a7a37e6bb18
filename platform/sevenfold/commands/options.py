"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe: a YAML file, or a name from `sevenfold recipes`."
    ),
]
RecipeOrData = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|DATA",
        help="A recipe: a YAML file, or a name from `sevenfold recipes`. Or data to train "
        "on: a file or folder.",
    ),
]
OptionalRecipe = Annotated[
    str | None,
    typer.Argument(metavar="[RECIPE]", help="A recipe, a YAML file.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="Changes to the recipe, such as train.steps=100.",
        show_default=False,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help="chat, classify, summarize, translate, retrieve, prefer or pretrain.  "
        "[default: by the columns]",
        show_default=False,
    ),
]
StartFrom = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The model to start from: a run, a Hugging Face directory, a GGUF file or "
        "hf://ORGANIZATION/NAME.  [default: a new small one]",
        show_default=False,
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
Model = Annotated[
    str, typer.Argument(metavar="RUN", help="The folder of a run, or a Hugging Face directory.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's logs.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the full recipe and what follows from it, then exit without a run."
    ),
]
Preview = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        max=1000,
        help="With --dry-run, which it implies: show N rows as the model will see them.",
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HASH",
        help="Run the Python code of a model, which is then not checked any further. A refusal of "
        "the model tells the hash of its code. Can be repeated.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Maximum number of new tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        help="Sampling temperature; 0 = greedy.  [default: 0.8; 0 with beam search]",
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="P", help="Sample from the most probable tokens whose probabilities sum to P."
    ),
]
TopK = Annotated[
    int, typer.Option(metavar="K", help="Sample from the K most probable tokens; 0 = all.")
]
Beams = Annotated[
    int, typer.Option(metavar="B", help="Number of beams of beam search; 1 = no beam search.")
]
Seed = Annotated[
    int, typer.Option(metavar="S", help="Seed of the sampling: the same seed gives the same text.")
]
