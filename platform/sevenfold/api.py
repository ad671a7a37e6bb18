"""sevenfold as a library: train, tune, evaluate and use models from Python or a notebook.

    from sevenfold import api as sf

    recipe = sf.load_recipe("quickstart", {"train.steps": 100})
    run = sf.train(recipe)
    run.metrics.plot(x="step", y="train/loss")
    print(sf.generate(run, "def add(a, b):"))

The functions do what the commands of the same names do, with the same files. Errors are exceptions:
`InputError` for wrong input, `RunError` for a run that failed; no function ends the process. Each
function starts the Ray that it needs and ends it, or joins the cluster of RAY_ADDRESS and leaves
it, so that they can be called any number of times, one after the other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sevenfold import storage
from sevenfold.errors import InputError, RunError, StoppedError
from sevenfold.recipe import PRETRAINING, Recipe
from sevenfold.run_folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "InputError",
    "Recipe",
    "Run",
    "RunError",
    "StoppedError",
    "evaluate",
    "generate",
    "load_recipe",
    "recipe_for",
    "sweep",
    "train",
]


class Run:
    """A run or a sweep: a folder with a recipe and what training has written.

    What is read from files is read at each access, so that a run that trains in another process
    can be watched.

    Attributes:
        folder: The run's folder, an absolute path or a URL.
        name: The run's name.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens an existing run.

        Args:
            folder: Its folder.

        Raises:
            InputError: There is no run.
        """
        self._files = RunFolder.existing(os.fspath(folder))
        self.folder, self.name = self._files.root, self._files.name

    def __repr__(self) -> str:
        return f"Run({self.folder!r})"

    def __fspath__(self) -> str:
        return self.folder

    @property
    def recipe(self) -> Recipe:
        """The recipe, with all defaults."""
        from sevenfold.prepare.job import read_recipe

        return read_recipe(self._files)

    @property
    def finished(self) -> bool:
        """Whether training has finished."""
        return self._files.finished()

    @property
    def metrics(self) -> pd.DataFrame:
        """What was logged while training: a row per line of the log, a column per metric."""
        import pandas as pd

        rows = _read_lines(self._files.log) if storage.exists(self._files.log) else []
        return pd.DataFrame(rows)

    @property
    def trials(self) -> pd.DataFrame:
        """The trials of a sweep, best first; empty if the run is no sweep."""
        import pandas as pd

        path = self._files.trials
        trials: list[Any] = storage.read_json(path) if storage.exists(path) else []
        return pd.json_normalize(trials)

    @property
    def results(self) -> dict[str, Any]:
        """What `evaluate` has measured; empty if it was not called yet."""
        path = self._files.metrics
        return dict(storage.read_json(path)) if storage.exists(path) else {}

    @property
    def model(self) -> str:
        """The folder of the exported model, in the Hugging Face format."""
        return self._files.model

    @property
    def checkpoints(self) -> dict[int, str]:
        """The folders of the committed checkpoints by their steps."""
        from sevenfold.engine.checkpoint.manifest import checkpoint_paths

        return dict(sorted(checkpoint_paths(self._files.checkpoints).items()))

    def export(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        step: int | None = None,
        merge: bool = False,
    ) -> str:
        """Exports a checkpoint as a Hugging Face directory.

        Args:
            out: A new or empty folder. Default: the run's own `model`.
            step: The checkpoint's step. Default: the latest valid one.
            merge: With `out`: merges a LoRA adapter into its base.

        Returns:
            The folder.
        """
        from sevenfold.export import command

        command.run(self.folder, step, None if out is None else os.fspath(out), merge)
        return self.model if out is None else os.path.abspath(out)


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """Reads a recipe.

    Args:
        source: A YAML file, the name of a recipe that comes with sevenfold, or a recipe as nested
            dictionaries.
        changes: Values to change, as {"key.path": value}.

    Raises:
        InputError: It is no recipe; all its mistakes are reported.
    """
    from sevenfold.cluster.auto import fill
    from sevenfold.recipe import from_tree, parse

    if isinstance(source, Mapping):
        return from_tree(source, changes or {}, fill)
    recipe = parse(os.fspath(source), (), fill)
    return recipe.override(dict(changes)) if changes else recipe


def recipe_for(
    data: str | os.PathLike[str],
    *,
    task: str | None = None,
    model: str | os.PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """Looks at data and returns a recipe that trains on it, as `sevenfold init` writes it.

    Args:
        data: A file, folder or glob, local or a URL.
        task: chat, classify, summarize, translate, retrieve, prefer or pretrain. Default: by the
            columns of the data.
        model: The model to start from. Default: a new small one.
        changes: Values to change, as {"key.path": value}.

    Raises:
        InputError: The data, the model or both together cannot be used.
    """
    from sevenfold.init.command import recipe_of

    recipe = recipe_of(os.fspath(data), task, None if model is None else os.fspath(model), ())
    return recipe.override(dict(changes)) if changes else recipe


def train(recipe: Recipe, *, verbose: bool = False) -> Run:
    """Pretrains or fine-tunes a model. A run that was interrupted is resumed.

    Args:
        recipe: The recipe.
        verbose: Shows Ray's logs.

    Returns:
        The finished run.

    Raises:
        InputError: The recipe, its data or its model cannot be used.
        StoppedError: The run was asked to stop, and has saved a checkpoint.
        RunError: The run failed.
    """
    from sevenfold.train import launch

    with _own_ray():
        job = launch.pretrain if recipe.objective in PRETRAINING else launch.finetune
        return Run(job(recipe, verbose).root)


def sweep(recipe: Recipe, *, verbose: bool = False) -> Run:
    """Tunes the hyperparameters in a recipe's section `sweep`. A sweep is resumed like a run.

    Args:
        recipe: The recipe.
        verbose: Shows Ray's logs.

    Returns:
        The finished sweep, whose model is that of the best trial.

    Raises:
        InputError: As for `train`; or the section is missing or wrong.
        RunError: The sweep stopped early, or no trial gave a result.
    """
    from sevenfold.sweep.sweep import run

    with _own_ray():
        return Run(run(recipe, verbose).root)


def evaluate(
    *runs: Run | str | os.PathLike[str], workers: int | None = None, verbose: bool = False
) -> dict[str, dict[str, Any]]:
    """Measures finished runs on all their held-out documents, beside baselines.

    Args:
        *runs: The runs, or their folders.
        workers: The number of processes, each with a copy of the model. Default: as in training.
        verbose: Shows Ray's logs.

    Returns:
        For each run's folder its results, as `Run.results` reads them later.

    Raises:
        InputError: A run does not exist, is not finished, or has no held-out data.
        RunError: The evaluation failed.
    """
    from sevenfold.evaluate.run import run

    opened = [each if isinstance(each, Run) else Run(each) for each in runs]
    with _own_ray():
        run([each.folder for each in opened], verbose, workers)
    return {each.folder: each.results for each in opened}


def generate(
    model: Run | str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float | None = None,
    top_p: float = 1.0,
    top_k: int = 50,
    beams: int = 1,
    seed: int = 0,
) -> str:
    """Generates text in this process, and shows it while it is generated.

    Args:
        model: A run, or a Hugging Face directory.
        prompt: The prompt; for an encoder-decoder, the source text.
        max_new_tokens: The maximum number of new tokens.
        temperature: The sampling temperature; 0 is greedy. Default: 0.8, or 0 with beams.
        top_p: Samples from the most probable tokens whose probabilities sum to this.
        top_k: Samples from this number of the most probable tokens; 0: from all.
        beams: The number of beams of beam search; 1: none.
        seed: The seed of the sampling.

    Returns:
        The text.

    Raises:
        InputError: There is no such model, or it cannot generate.
    """
    from sevenfold.engine.decode import Sampling
    from sevenfold.inference import chat

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, beams, seed)
    return chat.generate(os.fspath(model), prompt, sampling)


@contextlib.contextmanager
def _own_ray() -> Iterator[None]:
    """Ends the Ray that a command has started, and restores what it has changed in this process.

    Raises:
        InputError: This process is connected to Ray already.
    """
    import ray

    if ray.is_initialized():
        raise InputError(
            "this process is connected to Ray already: call ray.shutdown() first; with RAY_ADDRESS "
            "set, sevenfold connects to that cluster by itself"
        )
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if is_main else None
    environment = dict(os.environ)
    try:
        yield
    finally:
        ray.shutdown()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if is_main:
            signal.signal(signal.SIGTERM, handler)


def _read_lines(path: str) -> list[dict[str, Any]]:
    """Returns the rows of a log in JSON lines; the last one may be written at this moment."""
    import json

    rows = []
    for line in storage.read_text(path).splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
