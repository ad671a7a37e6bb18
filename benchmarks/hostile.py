"""Runs commands on hostile inputs, and counts what they must not do.

    python benchmarks/hostile.py [--json FILE] [--only GROUP] [--quick]

The inputs are those of tests/hostile, all generated: recipes, cluster files, data, model
directories, chat templates, runs, the states of sweeps, models with code of their own, servers, and
a current folder with modules. Each command runs in a process of its own, with a home, a working
folder and a tripwire that code in the input would trigger. Claims, each 0: `code_run`, inputs whose
code ran; `files_outside`, files that were written or changed outside the working folder and the
caches; `tracebacks`, commands that ended by one; `hangs`, commands that took longer than a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import measure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT / "tests")]
SECONDS = 60
MEMORY_BYTES = 12 << 30  # of address space, most of which libraries only reserve
PROCESSES = 2
RECIPE = {
    "name": "x",
    "data": {"sources": [{"path": "data"}], "sequence_length": 64, "lanes": 2},
    "tokenizer": {"vocab_size": 300},
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    },
    "train": {"global_batch": 4, "micro_batch": 4, "steps": 4},
}


class Input(NamedTuple):
    """A hostile input.

    Attributes:
        group: Its kind.
        name: What is hostile about it.
        write: Writes it into the working folder, given the tripwire's path, and returns the
            arguments of the command.
    """

    group: str
    name: str
    write: Callable[[Path, str], list[str]]


def yaml_inputs() -> Iterator[Input]:
    from hostile.yaml_files import yaml_cases

    for i, (kind, text, _) in enumerate(yaml_cases()):

        def write(work: Path, _: str, kind: str = kind, text: str = text) -> list[str]:
            (work / "file.yaml").write_text(text)
            if kind == "recipe":
                return ["pretrain", "file.yaml", "--dry-run"]
            return ["doctor", "--cluster", "file.yaml"]

        yield Input("YAML", f"{kind} {i}", write)


def data_inputs() -> Iterator[Input]:
    from hostile.data_files import FOLDERS

    for i, (make, _) in enumerate(FOLDERS):

        def write(work: Path, _: str, make: Callable[[Path], None] = make) -> list[str]:
            (work / "data").mkdir()
            make(work / "data")
            (work / "recipe.json").write_text(json.dumps(RECIPE))  # JSON is YAML
            return ["pretrain", "recipe.json", "--dry-run"]

        yield Input("data", str(i), write)


def model_inputs(model: Path) -> Iterator[Input]:
    from hostile.model_directories import cases, command
    from hostile.templates import BOMBS, FAULTS

    for case in cases():

        def change(work: Path, _: str, change: Callable[[Path], None] = case.change) -> list[str]:
            shutil.copytree(model, work / "model")
            (work / "model/checksums.json").unlink()
            change(work / "model")
            return command(work / "model")

        yield Input("model directory", case.name, change)
    for name, template in {**BOMBS, **{name: text for name, (text, _) in FAULTS.items()}}.items():

        def write(work: Path, _: str, template: str = template) -> list[str]:
            shutil.copytree(model, work / "model")
            (work / "model/checksums.json").unlink()
            (work / "model/chat_template.jinja").write_text(template, "utf-8", "replace")
            return ["chat", str(work / "model"), "--prompt", "a", "--max-new-tokens", "1"]

        yield Input("chat template", name, write)


def run_inputs(finished: Path) -> Iterator[Input]:
    from helpers.damages import files_of
    from helpers.handed_runs import COMMANDS
    from hostile.runs import FORMS, attack, write_run_with_code

    for file in files_of(finished / "runs/old"):
        for form in FORMS:
            # those that need no cluster; the tests take all, up to where they would ask for one
            for command in ("export", "generate", "which"):

                def write(
                    work: Path, trace: str, file: str = file, form: str = form, to: str = command
                ) -> list[str]:
                    shutil.copytree(finished / "runs/old", work / "runs/old")
                    attack(work / "runs/old", file, form, trace)
                    places = {"runs": work / "runs", "run": work / "runs/old"}
                    return [part.format(**places) for part in COMMANDS[to]]

                yield Input("run", f"{command} {file} {form}", write)
    for argv in (
        ["export", "runs/old", "--out", "out"],
        ["generate", "base", "--prompt", "a"],
        ["plan", "recipe.yaml", "--gpus", "1", "--gpu", "h100-80gb"],
        ["plan", "other.yaml", "--gpus", "1", "--gpu", "h100-80gb"],
        ["pretrain", "recipe.yaml", "--dry-run"],
        ["pretrain", "other.yaml", "--dry-run"],
        ["pretrain", "recipe.yaml", "--dry-run", "--trust-remote-code", "0" * 32],
    ):

        def write_code(work: Path, trace: str, argv: list[str] = argv) -> list[str]:
            write_run_with_code(finished, work)
            os.symlink(trace, work / "trace")  # the code makes `trace` in its folder
            return argv

        yield Input("code of a model", " ".join(argv), write_code)


def sweep_inputs() -> Iterator[Input]:
    from hostile.sweeps import hostile_states

    for name in hostile_states(Path(), ""):

        def write(work: Path, trace: str, name: str = name) -> list[str]:
            hostile_states(work / "runs/x-sweep/ray", trace)[name]()
            (work / "data.txt").write_text("text\n" * 99)
            space = {"optimizer.learning_rate": {"uniform": [0.1, 0.2]}}
            tree = {**RECIPE, "sweep": {"trials": 4, "metric": "train/loss", "space": space}}
            tree["data"] = {**RECIPE["data"], "sources": [{"path": "data.txt"}]}
            (work / "recipe.json").write_text(json.dumps(tree | {"validation": {"every": 2}}))
            return ["sweep", "recipe.json"]

        yield Input("state of a sweep", name, write)


def server_inputs(urls: dict[str, str]) -> Iterator[Input]:
    for name, url in urls.items():

        def write(work: Path, _: str, url: str = url) -> list[str]:
            return ["generate", url, "--prompt", "the", "--max-new-tokens", "1"]

        yield Input("server", name, write)


def folder_inputs(model: Path) -> Iterator[Input]:
    from hostile.current_folder import write_tripwires

    def write(work: Path, trace: str) -> list[str]:
        write_tripwires(work, Path(trace))
        return ["generate", str(model), "--prompt", "the", "--max-new-tokens", "1"]

    yield Input("current folder", "modules", write)


@contextlib.contextmanager
def servers(model: Path) -> Iterator[dict[str, str]]:
    """Starts a server for each hostile link; yields their URLs."""
    from hostile.servers import LINKS, web_server

    with contextlib.ExitStack() as stack:
        urls = {link: stack.enter_context(web_server(model, [link])) for link in LINKS}
        for endless in ("page", "folders", "names"):
            urls[f"endless {endless}"] = stack.enter_context(web_server(model, [], endless))
        yield urls


def snapshot(root: Path) -> dict[str, Any]:
    """Returns what lies in a folder, apart from caches and the working folder."""
    found = {}
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name not in ("work", "tmp")]
        if Path(folder).name == "home":
            folders[:] = [name for name in folders if name not in (".cache", ".sevenfold")]
        for name in files:
            status = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (status.st_size, status.st_mtime_ns)
    return found


def execute(argv: list[str], case: Path) -> None:
    """Runs a command in this process, which has no other work."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(case / "tmp" / name, os.O_WRONLY | os.O_CREAT), stream)
    os.environ |= {"HOME": str(case / "home"), "TMPDIR": str(case / "tmp")}
    os.environ |= {"HF_HOME": str(case / "tmp/hf"), "SEVENFOLD_HOME": str(case / "work")}
    tempfile.tempdir = None
    os.chdir(case / "work")
    from sevenfold.cli import main

    os._exit(main(argv))


def examine(given: Input) -> dict[str, bool]:
    """Runs the command of an input; returns which claims it breaks."""
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder)
        for name in ("home", "work", "tmp", "outside"):
            (case / name).mkdir()
        (case / "outside/file").write_text("theirs")
        (case / "home/.bashrc").write_text("theirs")
        trace = case / "tmp/trace"
        argv = given.write(case / "work", str(trace))
        before, began = snapshot(case), time.monotonic()
        if given.group == "current folder":  # imports are what counts: a process of its own
            environment = {
                "HOME": str(case / "home"),
                "PATH": os.environ["PATH"],
                "PYTHONPATH": f"{ROOT / 'platform'}:",
            }
            command = [str(Path(sys.executable).with_name("sevenfold")), *argv]
            done = subprocess.run(
                command, cwd=case / "work", env=environment, capture_output=True, timeout=300
            )
            error, hangs = done.stderr.decode(errors="replace"), False
        else:
            process = multiprocessing.get_context("fork").Process(
                target=execute, args=(argv, case), daemon=True
            )
            process.start()
            process.join(SECONDS)
            hangs = process.is_alive()
            process.kill()
            process.join()
            error = (case / "tmp/err").read_text(errors="replace")
        broken = {
            "code_run": trace.exists(),
            "files_outside": snapshot(case) != before,
            "tracebacks": "Traceback (most recent call last)" in error or "core dumped" in error,
            "hangs": hangs,
        }
        if any(broken.values()):
            names = ", ".join(name for name, is_broken in broken.items() if is_broken)
            print(f"{given.group}: {given.name}: {names}: {error[-300:]!r}", flush=True)
        elif os.environ.get("HOSTILE_VERBOSE"):
            seconds = time.monotonic() - began
            print(f"{given.group}: {given.name}: {seconds:.1f} s {error[-200:]!r}", flush=True)
        return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", dest="json_path")
    parser.add_argument("--only", default="", help="the inputs of this group only")
    parser.add_argument("--quick", action="store_true", help="every tenth input")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as shared:
        from conftest import SHARED

        os.environ[SHARED] = shared
        from helpers.handed_runs import finished_run

        finished = finished_run()
        model = finished / "runs/old/model"
        # what each process would import otherwise
        import peft  # noqa: F401
        import torch
        import transformers  # noqa: F401

        import sevenfold.export.command
        import sevenfold.inference.load
        import sevenfold.sweep.sweep  # noqa: F401

        torch.set_num_threads(1)
        with servers(model) as urls:
            inputs = [
                *yaml_inputs(),
                *data_inputs(),
                *model_inputs(model),
                *run_inputs(finished),
                *sweep_inputs(),
                *server_inputs(urls),
                *folder_inputs(model),
            ]
            inputs = [given for given in inputs if arguments.only in given.group]
            if arguments.quick:
                inputs = inputs[::10]
            with ThreadPoolExecutor(PROCESSES) as pool:
                results = list(pool.map(examine, inputs))
    groups = Counter(given.group for given in inputs)
    rows = []
    for group, number in groups.items():
        of_group = [r for given, r in zip(inputs, results, strict=True) if given.group == group]
        counts = [str(sum(broken[name] for broken in of_group)) for name in results[0]]
        rows.append([group, str(number), *counts])
    measure.show("hostile inputs", ["inputs", "number", *results[0]], rows)
    claims = [
        measure.claim(name, sum(broken[name] for broken in results), None, 0, at_most=True)
        for name in results[0]
    ]
    sys.exit(0 if measure.report(claims, arguments.json_path) else 1)


if __name__ == "__main__":
    main()
