"""Where things lie: local folders and URLs (s3://, gs://, ...) through fsspec, and the folder of a run."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from sevenfold.errors import InputError


def in_ray_job() -> bool:
    """Whether this process is the entry point of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def home() -> str:
    """What relative paths are below: the folder you stand in; in a submitted job, whose folder is a throw-away
    copy, `$SEVENFOLD_HOME` (default `~/sevenfold`)."""
    given = os.environ.get("SEVENFOLD_HOME")
    if given:
        return os.path.abspath(os.path.expanduser(given))
    return os.path.expanduser("~/sevenfold") if in_ray_job() else os.getcwd()


def is_url(path: str) -> bool:
    return "://" in path


def locate(path: str) -> str:
    """Absolute form of a path or URL. A relative path that came along with a job's working directory is taken there."""
    if is_url(path):
        return path.rstrip("/")
    if in_ray_job() and os.path.exists(os.path.expanduser(path)):
        return os.path.abspath(os.path.expanduser(path))
    return place(path)


def place(path: str) -> str:
    """Absolute form of where results go: as `locate`, but never into a job's throw-away folder."""
    return path.rstrip("/") if is_url(path) else os.path.normpath(os.path.join(home(), os.path.expanduser(path)))


def join(root: str, *parts: str) -> str:
    return "/".join([root.rstrip("/"), *parts]) if is_url(root) else os.path.join(root, *parts)


def files(path: str, suffix: str) -> list[str]:
    """The files that a file, folder or glob names, sorted.

    Raises:
        InputError: there is nothing at path, or a folder holds no file with this suffix.
    """
    fs, root = _fs(path)
    if any(c in root for c in "*?["):
        found = [p for p in fs.glob(root) if fs.isfile(p)]
        what = "a file that matches"
    elif fs.isdir(root):
        found = [p for p in fs.find(root, maxdepth=1) if p.endswith(suffix)]
        what = f"shards (*{suffix}) in this folder"
    else:
        found = [root] if fs.isfile(root) else []
        what = "a file or folder"
    if not found:
        raise InputError(f"{path}: expected {what}, found none")
    return [fs.unstrip_protocol(p) if is_url(path) else p for p in sorted(found)]


def exists(path: str) -> bool:
    fs, root = _fs(path)
    return bool(fs.exists(root))


def size(path: str) -> int:
    fs, root = _fs(path)
    return int(fs.size(root))


def listdir(path: str) -> list[str]:
    """Names in a folder, sorted; [] where there is none."""
    fs, root = _fs(path)
    if not fs.isdir(root):
        return []
    return sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in fs.ls(root, detail=False))


def open_read(path: str) -> BinaryIO:
    fs, root = _fs(path)
    return cast(BinaryIO, fs.open(root, "rb"))


def makedirs(path: str) -> None:
    fs, root = _fs(path)
    fs.makedirs(root, exist_ok=True)


def remove(path: str) -> None:
    fs, root = _fs(path)
    if fs.exists(root):
        fs.rm(root, recursive=True)


def write(path: str, data: bytes | str) -> None:
    """Writes a file whole or not at all: a rename on a local disk; on an object store a put is atomic by itself."""
    raw = data.encode() if isinstance(data, str) else data
    makedirs(path.rsplit("/", 1)[0])
    if is_url(path):
        fs, root = _fs(path)
        fs.pipe_file(root, raw)
        return
    aside = f"{path}.{os.getpid()}.tmp"
    with open(aside, "wb") as f:
        f.write(raw)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def read_text(path: str) -> str:
    with open_read(path) as f:
        return f.read().decode()


def read_json(path: str) -> Any:
    return json.loads(read_text(path))


@functools.cache
def local(folder: str) -> str:
    """A folder of this machine with the files of `folder`: itself, or a copy that lasts as long as the process."""
    if not is_url(folder):
        return folder
    copy = tempfile.mkdtemp(prefix="sevenfold-")
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    fs, root = _fs(folder)
    fs.get(root + "/", copy, recursive=True)
    return copy


def upload(folder: str, to: str) -> None:
    """Copies a local folder to where it belongs."""
    fs, root = _fs(to)
    fs.put(str(Path(folder)) + "/", root, recursive=True)


def _fs(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        fs, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as e:
        raise InputError(f"{path}: expected a path or a URL that fsspec knows: {e}") from None
    return fs, root


class RunFolder:
    """The files of one run. `root` is absolute or a URL."""

    def __init__(self, root: str):
        self.root = root
        self.recipe = join(root, "recipe.yaml")
        self.manifest = join(root, "manifest.json")
        self.checkpoints = join(root, "checkpoints")
        self.tensorboard = join(root, "tensorboard")
        self.tokenizer = join(root, "tokenizer")
        self.model = join(root, "model")
        self.adapter = join(root, "adapter")
        self.summary = join(root, "summary.json")
        self.metrics = join(root, "metrics.json")
        self.predictions = join(root, "predictions.jsonl")
        self.trials = join(root, "trials.json")
        self.ray = join(root, "ray")

    @property
    def name(self) -> str:
        return self.root.rsplit("/", 1)[-1]

    def finished(self) -> bool:
        return exists(self.summary)

    @staticmethod
    def of(path: str) -> RunFolder:
        """The run at a path. Raises InputError where there is none."""
        root = locate(path)
        folder = RunFolder(root)
        if not exists(folder.recipe):
            raise InputError(f"{root}: expected a run (a folder with recipe.yaml), found none")
        return folder
