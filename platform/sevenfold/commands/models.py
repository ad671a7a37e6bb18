"""Commands that use a trained model, or report on one."""

from __future__ import annotations

from typing import Annotated

import typer

from sevenfold.commands.options import Beams, MaxNewTokens, Model, Seed, Temperature, TopK, TopP
from sevenfold.errors import InputError


def base(
    name: Annotated[str, typer.Argument(help="smollm2-135m: a chat model; minilm-l6: an encoder.")],
    folder: Annotated[str, typer.Argument(help="A new folder for the model.")],
) -> None:
    """Write a pretrained model that is published as a package, to start runs from."""
    from sevenfold import storage
    from sevenfold.model.bases import write_base
    from sevenfold.report.console import say

    path = storage.resolve_output(folder)
    write_base(name, path)
    say(f"{path}: {name}; start from it with model.path={folder}")


def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The prompt; for an encoder-decoder, the source text."),
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file with the prompt.")
    ] = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = None,
    top_p: TopP = 1.0,
    top_k: TopK = 50,
    beams: Beams = 1,
    seed: Seed = 0,
) -> None:
    """Generate text from a prompt."""
    from sevenfold.engine.decode import Sampling
    from sevenfold.inference import chat

    text = _read_text(prompt, prompt_file, "--prompt", "--prompt-file")
    chat.generate(model, text, Sampling(max_new_tokens, temperature, top_p, top_k, beams, seed))


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Answer this message and exit; repeat the option for several turns.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = None,
    top_p: TopP = 1.0,
    top_k: TopK = 50,
    beams: Beams = 1,
    seed: Seed = 0,
) -> None:
    """Chat with a model."""
    from sevenfold.engine.decode import Sampling
    from sevenfold.inference import chat

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, beams, seed)
    chat.chat(model, system, prompt, sampling)


def retrieve(
    model: Model,
    corpus: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="The texts: Parquet, Arrow, JSON Lines, CSV or text (one per line); or a folder.",
        ),
    ],
    query: Annotated[
        list[str],
        typer.Option(metavar="TEXT", help="A query; repeat the option for several queries."),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="The column with the texts.  [default: text, document or content]",
        ),
    ] = None,
    id: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="The column with the ids of the texts.  [default: file and row]"
        ),
    ] = None,
    top: Annotated[int, typer.Option(metavar="K", help="Number of texts to show per query.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the texts that are nearest to a query."""
    from sevenfold.inference import retrieve

    retrieve.run(model, corpus, query, top, text, id, json)


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="The folder of a run, or a Hugging Face directory.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The model's input text.")
    ] = None,
    text_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file with the input text.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Data to report on: a file, folder or glob. Needs no model."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="The text that follows; for an encoder-decoder, its output."
        ),
    ] = None,
    saliency: Annotated[
        bool,
        typer.Option(
            "--saliency", help="Input attribution of the next token, or of the target's first."
        ),
    ] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="Attention of the last layer for that token.")
    ] = False,
    text_column: Annotated[
        str | None,
        typer.Option(
            metavar="C",
            help="The data's text column.  [default: text, document, content; else all strings]",
        ),
    ] = None,
    near: Annotated[
        int, typer.Option(metavar="N", help="Texts to check for near duplicates; 0 = none.")
    ] = 10_000,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write all results to this JSON file.")
    ] = None,
) -> None:
    """Show a model's predictions, or report on training data."""
    if (model is None) != (data is not None):
        raise InputError("inspect: expected either RUN with --text or --text-file, or --data alone")
    if data is not None:
        if text is not None or text_file is not None:
            raise InputError("inspect: --text and --text-file are not allowed with --data")
        from sevenfold.inspect.data import run

        run(data, text_column, near, json)
        return
    from sevenfold.inspect import model as inspect_model

    input_text = _read_text(text, text_file, "--text", "--text-file")
    inspect_model.run(str(model), input_text, target, saliency, attention, json)


def _read_text(text: str | None, file: str | None, option: str, file_option: str) -> str:
    """Returns a text that is given by one of two options, either directly or as a file.

    Args:
        text: The value of the option for the text itself.
        file: The value of the option for a file with the text.
        option: The name of the first option, for errors.
        file_option: The name of the second option, for errors.

    Raises:
        InputError: None or both are given, or the file cannot be read as UTF-8.
    """
    from sevenfold import storage

    if (text is None) == (file is None):
        found = "neither" if text is None else "both"
        raise InputError(f"expected one of {option} and {file_option}, found {found}")
    if text is not None:
        return text
    return storage.read_text(storage.resolve_input(str(file)))
