"""The layout of a run folder: the paths of its files, and which files sevenfold writes there."""

from __future__ import annotations

import re

from sevenfold import storage
from sevenfold.errors import InputError

# Patterns of the relative paths of all files that sevenfold writes into a run folder. Some are
# written by drills, evaluations and sweeps.
_WRITTEN_FILES = (
    r"identity|(recipe|best)\.yaml",
    r"(manifest|workers|summary|metrics|trials|spent|driver|drill|descent|reports)\.json",
    r"(metrics|predictions)\.jsonl",
    r"trials\.csv",
    r"report\.html",
    r"drill\.log",
    r"ledger/steps-\d+-\d+\.parquet",
    r"checkpoints/step-\d{8,}\.\d{2,}/((MANIFEST|tensors)\.json|\.metadata|__\d+_\d+\.distcp)",
    r"tensorboard/events\.out\..+",
    r"(ray|trials)/.+",
    r"(model|adapter)/(model|adapter_model)(-\d+-of-\d+)?\.safetensors",
    r"(model|adapter)/model\.safetensors\.index\.json",
    r"(model|adapter|tokenizer)/([a-z_]+\.(json|jinja|txt|model)|README\.md)",
    r"(model|adapter|tokenizer)/additional_chat_templates/[^/]+\.jinja",
    r"model/[12]_\w+/config\.json",
)


class RunFolder:
    """The paths of a run's files. Whether a file exists depends on how far the run is.

    Attributes:
        root: The run folder, an absolute path or a URL.
        recipe: The recipe, with all defaults.
        identity: The hash of the first recipe, if a later one has another train.micro_batch or an
            earlier version stored the recipe with secrets of URLs.
        manifest: The manifest: the data files that the run reads.
        ledger: The folder of the ledger: which documents each step read.
        workers: The workers, and the nodes that they run on.
        checkpoints: The folder of checkpoints.
        tensorboard: The folder of TensorBoard's event files.
        tokenizer: The folder of the tokenizer.
        model: The folder of the exported model, in the Hugging Face format.
        adapter: The folder of the exported LoRA adapter.
        summary: The run's results; a run that has this file is finished.
        metrics: The results of `sevenfold evaluate`.
        log: The metrics that were logged during training.
        predictions: The predictions of `sevenfold evaluate`.
        trials: A sweep's trials.
        ray: The folder that Ray Train and Ray Tune keep their own state in.
    """

    def __init__(self, root: str):
        """Sets the paths.

        Args:
            root: See the attribute.
        """
        self.root = root
        self.recipe = storage.join(root, "recipe.yaml")
        self.identity = storage.join(root, "identity")
        self.manifest = storage.join(root, "manifest.json")
        self.ledger = storage.join(root, "ledger")
        self.workers = storage.join(root, "workers.json")
        self.checkpoints = storage.join(root, "checkpoints")
        self.tensorboard = storage.join(root, "tensorboard")
        self.tokenizer = storage.join(root, "tokenizer")
        self.model = storage.join(root, "model")
        self.adapter = storage.join(root, "adapter")
        self.summary = storage.join(root, "summary.json")
        self.metrics = storage.join(root, "metrics.json")
        self.log = storage.join(root, "metrics.jsonl")
        self.predictions = storage.join(root, "predictions.jsonl")
        self.trials = storage.join(root, "trials.json")
        self.ray = storage.join(root, "ray")

    @property
    def name(self) -> str:
        """The name of the run: the last part of its folder's path."""
        return self.root.rsplit("/", 1)[-1]

    def finished(self) -> bool:
        """Returns whether the run is finished."""
        return storage.exists(self.summary)

    def existing_outputs(self) -> list[str]:
        """Returns the files and folders that exist here although a new run would write to them.

        Returns:
            Their names, sorted.
        """
        names = {path[len(self.root) + 1 :] for key, path in vars(self).items() if key != "root"}
        return sorted(names.intersection(storage.listdir(self.root)))

    def other_files(self) -> list[str]:
        """Returns the relative paths of the files here that sevenfold did not write."""
        # The endings are those of temporary files, which a killed process may have left.
        written = re.compile(rf"({'|'.join(_WRITTEN_FILES)})(\.tmp|\.\d+-[0-9a-f]{{8}}\.tmp)?")
        return [path for path in storage.find_files(self.root) if not written.fullmatch(path)]

    @staticmethod
    def existing(path: str) -> RunFolder:
        """Returns the folder of an existing run.

        Raises:
            InputError: There is no run at this path.
        """
        root = storage.resolve_input(path)
        folder = RunFolder(root)
        if not storage.exists(folder.recipe):
            raise InputError(f"{root}: expected a run (a folder with recipe.yaml)")
        return folder
