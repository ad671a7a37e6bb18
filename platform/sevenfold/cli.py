"""The command line: a person's words in, a recipe out. `jobs/*.py` come through here too."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sevenfold import __version__
from sevenfold.errors import InputError, RunError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 the run failed, 2 the input was wrong."""
    parser = _Parser(prog="sevenfold", description="Pretrain, fine-tune and search language models on a Ray cluster.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    _corpus(commands)
    for job, about in (
        ("pretrain", "train a model on text"),
        ("finetune", "fine-tune a model"),
        ("sweep", "search the hyperparameters that a recipe's `search` names"),
        ("tokenize", "fill a recipe's token cache (data.cache)"),
    ):
        _recipe_job(commands, job, about)
    _drill(commands)
    _evaluate(commands)
    _export(commands)
    _ledger(commands)
    for command in (_generate, _chat, _search, _inspect, _doctor, _plan):
        command(commands)
    args, rest = parser.parse_known_args(argv)  # argparse takes no second run of key.path=value after an option
    if unknown := [r for r in rest if r.startswith("-") or "=" not in r or not hasattr(args, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    return _guarded(lambda: args.run(args), goes_on=hasattr(args, "overrides"))


def job(name: str) -> None:
    """What a script in jobs/ runs: `sevenfold NAME` with the script's own arguments."""
    sys.exit(main([name, *sys.argv[1:]]))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise SystemExit(_fail(f"{self.prog}: {message}; see {self.prog} --help", InputError.exit_code))


def _guarded(work: Callable[[], None], goes_on: bool) -> int:
    try:
        work()
    except (InputError, RunError) as e:
        return _fail(str(e), e.exit_code)
    except KeyboardInterrupt:
        again = "; run the same command again to go on from the last checkpoint" if goes_on else ""
        return _fail(f"stopped{again}", RunError.exit_code)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def _corpus(commands: Any) -> None:
    parser = commands.add_parser("corpus", help="write a corpus that needs no download")
    parser.add_argument("which", choices=["python"], help="python: the source of this Python installation")
    parser.add_argument("--out", default="corpus/python", help="new folder for it (default: %(default)s)")
    parser.add_argument("--max-mb", type=float, default=48, help="most text to take (default: %(default)s)")

    def run(args: argparse.Namespace) -> None:
        from sevenfold import storage
        from sevenfold.data.corpus import build_python

        made = build_python(storage.locate(args.out), args.max_mb)
        print(
            f"{made.root}: {made.documents:,} documents, {made.text_mb:.1f} MB of text, {made.heldout_documents} of them "
            f"held out; {made.summaries:,} docstring summaries"
        )

    parser.set_defaults(run=run)


def _recipe_job(commands: Any, name: str, about: str) -> None:
    parser = commands.add_parser(name, help=about)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--dry-run", action="store_true", help="print the recipe and what follows from it; start nothing")
    parser.add_argument("-v", "--verbose", action="store_true", help="let Ray speak")

    def run(args: argparse.Namespace) -> None:
        from sevenfold.recipe import parse

        recipe = parse(args.recipe, args.overrides)
        if args.dry_run:
            from sevenfold.runs.dry import describe

            print(describe(recipe))
        else:
            importlib.import_module(f"sevenfold.runs.{name}").run(recipe, args.verbose)

    parser.set_defaults(run=run)


def _drill(commands: Any) -> None:
    parser = commands.add_parser("drill", help="do faults to runs of a recipe, and see whether they show")
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--faults", default="", metavar="A,B", help="which (default: all that can be done here)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of each run (default: %(default)s)")

    def run(args: argparse.Namespace) -> None:
        from sevenfold.recipe import parse
        from sevenfold.runs import drill

        drill.run(parse(args.recipe, args.overrides), [f for f in args.faults.split(",") if f], args.steps)

    parser.set_defaults(run=run)


def _evaluate(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="measure finished runs on their held-out documents")
    parser.add_argument("runs", nargs="+", help="folders of runs")
    about = "processes that hold the model (default: as many as trained, two at least, where they fit)"
    parser.add_argument("--workers", type=int, choices=range(1, 1025), metavar="N", help=about)
    about = "most tokens of a completion (default: as the recipe's validation)"
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=about)
    parser.add_argument("--harness", metavar="TASK.yaml", help="also a task of lm-eval (pip install 'sevenfold[harness]')")
    parser.add_argument("-v", "--verbose", action="store_true", help="let Ray speak")

    def run(args: argparse.Namespace) -> None:
        from sevenfold.runs import evaluate

        evaluate.run(args.runs, args.verbose, args.workers, args.harness, args.max_new_tokens)

    parser.set_defaults(run=run)


def _export(commands: Any) -> None:
    parser = commands.add_parser("export", help="make a checkpoint of a run into a Hugging Face directory")
    parser.add_argument("folder", help="folder of a run")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint's step (default: the newest that is whole)")
    parser.add_argument("--out", metavar="FOLDER", help="new or empty folder for it (default: the run's own model/)")
    parser.add_argument("--merge", action="store_true", help="with --out: an adapter merged into its base, not by itself")

    def run(args: argparse.Namespace) -> None:
        from sevenfold.runs import export

        export.run(args.folder, args.step, args.out, args.merge)

    parser.set_defaults(run=run)


def _ledger(commands: Any) -> None:
    parser = commands.add_parser("ledger", help="what a step of a run read")
    parser.add_argument("folder", help="folder of a run")
    parser.add_argument("what", choices=["which", "replay"], help="which: its documents; replay: its very tensors again")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="step, as the log counts them (1 is the first)")
    parser.add_argument("--out", help="which: all documents (.parquet); replay: the tensors (.safetensors)")

    def run(args: argparse.Namespace) -> None:
        from sevenfold.runs import ledger

        getattr(ledger, args.what)(args.folder, args.step, args.out)

    parser.set_defaults(run=run)


def _generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="let a model go on from a prompt")
    parser.add_argument("model", metavar="RUN", help="folder of a run, or a Hugging Face directory")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what it goes on from; an encoder-decoder: what it reads")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with it")
    _sampling(parser)

    def run(args: argparse.Namespace) -> None:
        from sevenfold.runs import use

        use.generate(args.model, _given(args.prompt, args.prompt_file), _chosen(args))

    parser.set_defaults(run=run)


def _chat(commands: Any) -> None:
    parser = commands.add_parser("chat", help="talk with a model")
    parser.add_argument("model", metavar="RUN", help="folder of a run, or a Hugging Face directory")
    parser.add_argument("--system", metavar="TEXT", help="message that the conversation begins with")
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="answer this and end; may be given several times")
    _sampling(parser)

    def run(args: argparse.Namespace) -> None:
        from sevenfold.runs import use

        use.chat(args.model, args.system, args.prompt, _chosen(args))

    parser.set_defaults(run=run)


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="most tokens made (default: %(default)s)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest (default: 0.8; with beams 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="likeliest of this probability (default: all)")
    parser.add_argument("--top-k", type=int, default=50, metavar="K", help="so many likeliest; 0: all (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=1, metavar="B", help="of beam search (default: none)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same text (default: %(default)s)")


def _chosen(args: argparse.Namespace) -> Any:
    from sevenfold.evaluate.stream import Sampling

    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.beams, args.seed)


def _given(text: str | None, file: str | None) -> str:
    """A text, or the one in a file."""
    from sevenfold import storage

    if text is not None:
        return text
    path = storage.locate(file or "")
    try:
        return storage.read_text(path)
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: expected text, found no UTF-8 at byte {e.start}") from None


def _search(commands: Any) -> None:
    parser = commands.add_parser("search", help="find the texts of a corpus that are nearest to a query, by an encoder")
    parser.add_argument("model", metavar="RUN", help="folder of a run, or a Hugging Face directory")
    parser.add_argument("--corpus", required=True, metavar="FILE", help="parquet, JSON lines or text, a line each; or a folder")
    parser.add_argument("--text", metavar="COLUMN", help="of the text (default: text, document or content)")
    parser.add_argument("--id", metavar="COLUMN", help="of what a text is called (default: its file and row)")
    parser.add_argument("--query", required=True, action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="texts shown of each (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(args: argparse.Namespace) -> None:
        from sevenfold.runs import search

        search.run(args.model, args.corpus, args.query, args.top, args.text, args.id, args.json)

    parser.set_defaults(run=run)


def _inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="what a text costs a model, token by token; or what is in training data")
    parser.add_argument("model", nargs="?", metavar="RUN", help="folder of a run, or a Hugging Face directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="TEXT", help="for the model")
    what.add_argument("--text-file", metavar="FILE", help="a file with it")
    what.add_argument("--data", metavar="PATH", help="file, folder or glob of data to report on; no model is needed")
    parser.add_argument("--target", metavar="TEXT", help="what follows the text: an encoder-decoder's answer")
    parser.add_argument("--saliency", action="store_true", help="what the next token (or the target's first) hangs on")
    parser.add_argument("--attention", action="store_true", help="where the last layer looks for the next token")
    parser.add_argument("--text-column", metavar="C", help="of the data (default: text, document, content; else all strings)")
    about = "texts looked at for near duplicates (default: %(default)s; 0: none)"
    parser.add_argument("--near", type=int, default=10_000, metavar="N", help=about)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")

    def run(args: argparse.Namespace) -> None:
        if (args.model is None) != (args.data is not None):
            raise InputError("inspect: expected either RUN with --text or --text-file, or --data alone")
        if args.data is not None:
            from sevenfold.runs import survey

            survey.run(args.data, args.text_column, args.near, args.json)
        else:
            from sevenfold.runs import inspect

            inspect.run(args.model, _given(args.text, args.text_file), args.target, args.saliency, args.attention, args.json)

    parser.set_defaults(run=run)


def _doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="what is wrong with this machine, a cluster, a cluster.yaml, a recipe")
    parser.add_argument("recipe", nargs="?", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--cluster", metavar="FILE", help="a cluster.yaml of `ray up`; with a recipe also whether it fits")
    parser.add_argument("--address", metavar="HOST:PORT", help="a running cluster's head, as 127.0.0.1:6379")

    def run(args: argparse.Namespace) -> None:
        from sevenfold.recipe import parse
        from sevenfold.runs import doctor

        doctor.run(parse(args.recipe, args.overrides) if args.recipe else None, args.cluster, args.address)

    parser.set_defaults(run=run)


def _plan(commands: Any) -> None:
    parser = commands.add_parser("plan", help="before paying: whether a recipe fits, how fast, how long, for how much")
    parser.add_argument("recipe", nargs="?", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")
    parser.add_argument("--cluster", metavar="FILE", help="a cluster.yaml of `ray up`: its pools of GPUs")
    parser.add_argument("--gpus", type=int, metavar="N", help="so many GPUs (default: 1)")
    parser.add_argument("--gpu", metavar="NAME", help="of this kind, as h100-80gb")
    parser.add_argument("--hardware", metavar="FILE", help="laid over the table of GPUs, machines and prices")
    parser.add_argument("--write", action="store_true", help="put what is chosen into the recipe")
    parser.add_argument("--budget", type=float, metavar="USD", help="what so much money trains, and what can be fine-tuned")

    def run(args: argparse.Namespace) -> None:
        from sevenfold.plan import command

        command.run(
            args.recipe, args.overrides, cluster=args.cluster, gpus=args.gpus, gpu=args.gpu, hardware_file=args.hardware,
            writes=args.write, usd=args.budget,
        )  # fmt: skip

    parser.set_defaults(run=run)


if __name__ == "__main__":
    sys.exit(main())
