"""Commands for the time before a run: whether it can run, and what it costs."""

from __future__ import annotations

from typing import Annotated

import typer

from sevenfold.commands.options import OptionalRecipe, Overrides, TrustRemoteCode


def doctor(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A cluster.yaml of `ray up`; with a recipe, also whether the recipe fits on it.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The head node of a running cluster, such as 127.0.0.1:6379.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = None,
) -> None:
    """Check a machine, cluster or recipe for problems."""
    from sevenfold.cluster.auto import fill
    from sevenfold.doctor import doctor
    from sevenfold.recipe import parse

    parsed = parse(recipe, overrides or [], fill).trusting(trust_remote_code) if recipe else None
    doctor.run(parsed, cluster, address)


def plan(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A cluster.yaml of `ray up`, for its pools of GPUs."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="The number of GPUs.  [default: 1]")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="The GPU type, such as h100-80gb.")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Overrides for the table of GPUs, machines and their prices."
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write the chosen layout into the recipe.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(metavar="USD", help="Show what can be trained and fine-tuned for this sum."),
    ] = None,
    trust_remote_code: TrustRemoteCode = None,
) -> None:
    """Estimate a recipe's memory, speed, time and price."""
    from sevenfold.plan import command

    command.run(
        recipe,
        overrides or [],
        cluster=cluster,
        gpus=gpus,
        gpu=gpu,
        hardware_file=hardware,
        writes=write,
        usd=budget,
        trusted_code=trust_remote_code,
    )
