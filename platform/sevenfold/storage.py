"""Where things lie: local folders and URLs (s3://, gs://, ...) through fsspec, and the folder of a run.

A storage that fails for a while is waited out, whatever is done with it: see `_again`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import filelock
import fsspec
import psutil

from sevenfold import object_stores
from sevenfold.errors import InputError, RunError

PATIENCE = 120.0  # seconds that a failing storage is given in all
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds between two tries: doubled from one to the other
VERSION = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "created")  # by what filesystems tell a file's
WHOLE = 2 << 30  # the largest file that is read from an http server without range requests
T = TypeVar("T")


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


def files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a file, folder or glob names, sorted; of a folder those below it with one of these suffixes, but
    none whose name, or folder's name, begins with . or _.

    Raises:
        InputError: there is nothing at path, a folder holds no such file, or it is a folder or glob over http.
        RunError: the storage keeps failing.
    """
    fs, root = _fs(path)
    info = _info(path)
    if _is_http(path) and _is_listing(path, info, suffixes):
        raise InputError(f"{path}: expected the URL of one file: over http a folder or glob cannot be listed")
    if info.get("type") == "file":
        found, what = [root], "a file"
    elif info.get("type") == "directory":
        names = _again(path, "listed", lambda: fs.find(root, on_error="raise"))
        found = [p for p in names if p.endswith(suffixes) and not re.search(r"/[._]", p[len(root) :])]
        what = f"shards ({', '.join('*' + s for s in suffixes)}) in this folder"
    elif any(c in root for c in "*?["):
        matches = _again(path, "listed", lambda: fs.glob(root, detail=True, on_error="raise"))
        found = [p for p, i in matches.items() if i["type"] == "file" or (i["type"] == "other" and fs.isfile(p))]
        what = "a file that matches"
    else:
        found, what = [], "a file or folder"
    if not found:
        raise InputError(f"{path}: expected {what}, found none")
    return [fs.unstrip_protocol(p) if is_url(path) else p for p in sorted(found)]


def exists(path: str) -> bool:
    return bool(_info(path))


def size(path: str) -> int:
    """Bytes of a file. Raises InputError where there is none."""
    info = _info(path)
    if info and info["size"] is not None:
        return int(info["size"])
    with open_read(path) as f:
        return f.size


def listdir(path: str) -> list[str]:
    """Names in a folder, sorted; [] where there is none."""
    fs, root = _fs(path)
    if _info(path).get("type") != "directory":
        return []
    found = _again(path, "listed", lambda: fs.ls(root, detail=False))
    return sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in found)


def open_read(path: str) -> Reader:
    """A file to read bytes and ranges of.

    Raises:
        InputError: there is no file at path, or it is refused.
        RunError: the storage keeps failing; so do all reads.
    """
    return Reader(path)


def makedirs(path: str) -> None:
    fs, root = _fs(path)
    _again(path, "made", lambda: fs.makedirs(root, exist_ok=True))


def remove(path: str) -> None:
    fs, root = _fs(path)
    if _info(path):
        _again(path, "removed", lambda: fs.rm(root, recursive=True))


def remove_empty(path: str) -> None:
    """Removes a folder if nothing is in it. At a URL there is nothing to do where folders are only parts of names."""
    if not is_url(path):
        with contextlib.suppress(OSError):  # not empty, or gone
            os.rmdir(path)


def write(path: str, data: bytes | str) -> None:
    """Writes a file whole or not at all: a rename on a local disk; on an object store a put is atomic by itself."""
    raw = data.encode() if isinstance(data, str) else data
    makedirs(path.rsplit("/", 1)[0])
    fs, root = _fs(path)
    _again(path, "written", lambda: fs.pipe_file(root, raw) if is_url(path) else _replace(path, raw))


def _replace(path: str, raw: bytes) -> None:
    aside = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp"  # threads of one process may write the same file
    try:
        with open(aside, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise


def copy(path: str, to: str) -> None:
    """Of a file that is never written to again: on one disk both names share its bytes."""
    makedirs(to.rsplit("/", 1)[0])
    if is_url(path):
        fs, root = _fs(path)
        _again(path, "copied", lambda: fs.cp_file(root, _fs(to)[1]))
        return
    try:
        os.link(path, to)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, to)


def read_text(path: str) -> str:
    with open_read(path) as f:
        return f.read().decode()


def read_json(path: str) -> Any:
    return json.loads(read_text(path))


@functools.cache
def local(folder: str) -> str:
    """A folder of this machine with the files of `folder`: itself, or a copy below the temporary folder. That is made once a
    machine, by the first process that asks, and again only when the files have changed."""
    if not is_url(folder):
        return folder
    fs, root = _fs(folder)
    files = _again(folder, "listed", lambda: fs.find(root, detail=True, on_error="raise"))
    version = sorted((name, *(str(about.get(k)) for k in VERSION)) for name, about in files.items())
    key = hashlib.sha256(json.dumps([folder, version]).encode()).hexdigest()[:24]
    copy = os.path.join(_private(), key)
    with filelock.FileLock(f"{copy}.lock"):
        if not os.path.isdir(copy):
            shutil.rmtree(f"{copy}.part", ignore_errors=True)  # of a process that was killed
            for name in files:
                to = os.path.join(f"{copy}.part", name[len(root) :].lstrip("/"))
                os.makedirs(os.path.dirname(to), exist_ok=True)
                with open_read(fs.unstrip_protocol(name)) as source, open(to, "wb") as target:
                    shutil.copyfileobj(source, target, 4 << 20)
            os.rename(f"{copy}.part", copy)
    return copy


def upload(folder: str, to: str) -> None:
    """Copies a local folder to where it belongs; JSON, which names what lies beside it, last."""
    fs, root = _fs(to)
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    for path in sorted(files, key=lambda p: (p.suffix == ".json", p)):
        target = f"{root}/{path.relative_to(folder).as_posix()}"
        fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        _again(to, "written", functools.partial(fs.put_file, str(path), target))


@contextlib.contextmanager
def new_folder(path: str, replaced: re.Pattern[str] | None = None) -> Iterator[str]:
    """Gives a local folder to write into, which takes its place at `path` when the block ends.

    On a local disk it does so at once; at a URL it is uploaded file after file. A block that raises leaves what was there.
    When several processes write one folder, each writes aside, and the last to end is the one that is found there.

    Args:
        path: The folder, or a link to it.
        replaced: Which files of an earlier folder at `path` are removed, by their relative paths; the block's own files
            replace those of the same name, and all other files stay. None: there must be no such folder, or an empty one.

    Yields:
        The folder to write into.

    Raises:
        InputError: There is a file at `path`, or a folder with files in it and `replaced` is None, or the storage refuses.
        RunError: The storage keeps failing.
    """
    if _info(path).get("type") == "file":
        raise InputError(f"{path}: expected a folder, found a file: choose another")
    if is_url(path):
        with tempfile.TemporaryDirectory() as aside:
            yield aside
            fs, root = _fs(path)
            there = _again(path, "listed", lambda: fs.find(root)) if exists(path) else []
            names = [p[len(root) :].lstrip("/") for p in there]
            if replaced is None and names:
                raise _in_the_way(path)
            upload(aside, path)
            for name in names:
                if replaced is not None and replaced.fullmatch(name) and not os.path.exists(os.path.join(aside, name)):
                    remove(join(path, name))
        return
    path = os.path.realpath(path)
    with aside_of(path) as aside:
        yield aside
        with filelock.FileLock(os.path.join(_private(), f"{hashlib.sha256(path.encode()).hexdigest()[:24]}.lock")):
            _take_place(aside, path, replaced)


def _private() -> str:
    """Makes and returns this user's folder below the temporary folder, for copies and locks of this machine."""
    folder = os.path.join(tempfile.gettempdir(), f"sevenfold-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder


def _in_the_way(path: str) -> InputError:
    return InputError(f"{path}: expected a new or empty folder, found one with files in it: choose another")


@contextlib.contextmanager
def aside_of(path: str) -> Iterator[str]:
    """Gives a new folder beside `path`, on the same disk, and removes it in the end. Those that killed processes of this
    machine left there are removed first."""
    for left in _left_behind(path, "unfinished"):
        shutil.rmtree(left, ignore_errors=True)
    aside = _beside(path, "unfinished")
    os.makedirs(aside)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _beside(path: str, what: str) -> str:
    parent, base = os.path.split(path)
    return os.path.join(parent, f".{base}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.{what}")


def _left_behind(path: str, what: str) -> list[str]:
    """Returns the folders that `_beside` named for processes of this machine that have ended since."""
    parent, base = os.path.split(path)
    name = re.compile(rf"\.{re.escape(base)}\.{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]{{8}}\.{what}")
    matches = [name.fullmatch(n) for n in os.listdir(parent)] if os.path.isdir(parent) else []
    return [os.path.join(parent, m[0]) for m in matches if m and not psutil.pid_exists(int(m[1]))]


def _take_place(aside: str, path: str, replaced: re.Pattern[str] | None) -> None:
    """Renames `aside` to `path`. What was there is moved away first, and what is to stay of it is moved back."""
    before = _left_behind(path, "replaced")  # killed between the two renames: what it moved away comes back now
    while True:
        try:
            os.rename(aside, path)  # succeeds where nothing, or an empty folder, is there
            break
        except OSError:
            if not os.path.isdir(path):
                raise
        if replaced is None:
            raise _in_the_way(path)
        before.append(_beside(path, "replaced"))
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            os.rename(path, before[-1])
    for old in before:
        for folder, folders, names in os.walk(old):
            for name in [*names, *(f for f in folders if os.path.islink(os.path.join(folder, f)))]:
                source = os.path.join(folder, name)
                relative = os.path.relpath(source, old)
                target = os.path.join(path, relative)
                if not (os.path.lexists(target) or (replaced and replaced.fullmatch(relative.replace(os.sep, "/")))):
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    os.rename(source, target)
        shutil.rmtree(old, ignore_errors=True)


class Reader(io.RawIOBase):
    """A file whose reads outlast a failing storage: it is opened again at the same place. `size`: bytes, when it was
    opened. It is not buffered; for lines wrap it in io.BufferedReader."""

    _file: BinaryIO | None = None

    def __init__(self, path: str):
        self.name = path
        self.size = -1
        self._at = self._there = 0  # where the next read begins; where _file stands
        _again(path, "read", self._opened)

    def _opened(self) -> BinaryIO:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if self._file is None:
            file = _open(self.name)
            size = file.seek(0, os.SEEK_END)
            if self.size not in (-1, size):
                raise RunError(f"{self.name}: had {self.size} bytes, has {size} now: it was changed while it was read")
            self._file, self.size, self._there = file, size, size
        if self._there != self._at or is_url(self.name):  # memory:// has one position for all readers
            self._there = self._file.seek(self._at)
        return self._file

    def _read(self, wanted: int, read: Callable[[BinaryIO], T], count: Callable[[T], int]) -> T:
        def attempt() -> T:
            try:
                got = read(self._opened())
                if count(got) < min(wanted, self.size - self._at):
                    raise OSError(f"ended {count(got)} bytes after byte {self._at} of {self.size}")
                return got
            except Exception:
                self._drop()
                raise

        got = _again(self.name, "read", attempt)
        self._at = self._there = self._at + count(got)
        return got

    def read(self, n: int | None = -1) -> bytes:
        left = max(0, self.size - self._at)  # never -1: pyarrow's S3 files fail on it
        n = left if n is None or n < 0 else min(n, left)
        return self._read(n, lambda f: f.read(n), len)

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        return self._read(len(view), lambda f: cast(Any, f).readinto(view), int)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + (0, self._at, self.size)[whence]
        if at < 0:
            raise ValueError(f"negative seek position {at}")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._drop()
        super().close()

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def _open(path: str) -> BinaryIO:
    if not is_url(path):
        return open(path, "rb")
    fs, root = _fs(path)
    file = fs.open(root, "rb")
    if not _is_http(path):
        return cast(BinaryIO, file)
    with contextlib.suppress(ValueError):  # of fsspec, where the server ignores ranges
        if file.size is not None:
            file.seek(file.size - 1)
            file.read(1)
            return cast(BinaryIO, file)
    file.close()
    body = io.BytesIO()
    with fs.open(root, "rb", block_size=0) as stream:
        while chunk := stream.read(1 << 20):
            if body.write(chunk) and body.tell() > WHOLE:
                raise InputError(f"{path}: over {WHOLE >> 20} MiB on a server without range requests: copy it elsewhere")
    return body


def _info(path: str) -> dict[str, Any]:
    """What the storage tells about a path; {} where there is nothing."""
    fs, root = _fs(path)
    try:
        return _again(path, "looked up", lambda: cast(dict[str, Any], fs.info(root)))
    except _MissingError:
        return {}


def _is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _is_listing(url: str, info: dict[str, Any], suffixes: tuple[str, ...]) -> bool:
    if not info:
        return any(c in url for c in "*[")
    return info.get("mimetype") == "text/html" and not urlsplit(url).path.endswith(suffixes)


def _again(path: str, done: str, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, tried again and again where the storage fails.

    Raises:
        InputError: there is nothing at path, or it is refused.
        RunError: the storage has failed for PATIENCE seconds.
    """
    began, wait = None, FIRST_WAIT
    while True:
        try:
            return attempt()
        except Exception as e:
            final = _final(path, e)
            if final is e:
                raise
            if final is not None:
                raise final from e
            told = e.__cause__ if isinstance(e, FileNotFoundError) and e.__cause__ else e  # fsspec's word for an outage
            now, why = time.monotonic(), " ".join(str(told).split()) or type(told).__name__
            if began is None:
                began = now
                logging.getLogger(__name__).warning("%s: %s; trying again for %.0f s", path, why, PATIENCE)
            left = began + PATIENCE - now
            if left <= 0:
                raise RunError(
                    f"{path}: could not be {done}, tried for {now - began:.0f} s: {why}: "
                    "check the storage and the way to it, then start the run again"
                ) from e
        time.sleep(min(wait, left))
        wait = min(2 * wait, LONGEST_WAIT)


class _MissingError(InputError):
    """There is nothing at a path."""


def _final(path: str, e: Exception) -> Exception | None:
    """What to raise for a failure that another try cannot cure; None for one that it can."""
    import aiohttp

    if isinstance(e, FileNotFoundError) and isinstance(e.__cause__, (OSError, TimeoutError, aiohttp.ClientError)):
        e = e.__cause__  # fsspec calls outages and refusals missing files
    why = " ".join(str(e).split())
    told = re.search(r"HTTP status (\d+)", why)  # by pyarrow
    status = e.status if isinstance(e, aiohttp.ClientResponseError) else int(told[1]) if told else 0
    if "NO_SUCH_BUCKET" in why:
        return _MissingError(f"{path}: expected a bucket of this name, found none")
    if isinstance(e, (FileNotFoundError, NotADirectoryError)) or status in (404, 410) or "NO_SUCH_KEY" in why:
        return _MissingError(f"{path}: expected a file, found none")
    if isinstance(e, IsADirectoryError):
        return InputError(f"{path}: expected a file, found a folder")
    refused = isinstance(e, PermissionError) or re.search(REFUSED, why)
    if refused or (300 <= status < 500 and status not in (408, 425, 429)):
        return InputError(f"{path}: refused ({why}): check the address, the credentials and the rights that they give")
    if isinstance(e, FileExistsError) or (isinstance(e, aiohttp.ClientError) and isinstance(e, ValueError)):
        return InputError(f"{path}: cannot be used: {why}")
    return None if isinstance(e, (OSError, TimeoutError, aiohttp.ClientError)) else e


REFUSED = (  # what S3 and GCS say, in pyarrow's words
    "ACCESS_DENIED|ACCESS_KEY_ID|SIGNATURE|CLIENT_TOKEN|AUTHENTICATION_TOKEN|EXPIRED_TOKEN|UNRECOGNIZED_CLIENT"
    "|PERMISSION_DENIED|UNAUTHENTICATED"
)


def _fs(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    options: dict[str, Any] = {}
    if _is_http(path):
        import aiohttp

        silence = aiohttp.ClientTimeout(total=None, sock_connect=object_stores.SILENCE, sock_read=object_stores.SILENCE)
        # identity: sizes and ranges are those of the file, not of its gzip
        options = {"headers": {"Accept-Encoding": "identity"}, "client_kwargs": {"timeout": silence}}
    try:
        fs, root = fsspec.core.url_to_fs(path, **options)
    except (ValueError, ImportError) as e:
        raise InputError(f"{path}: expected a path or a URL that fsspec knows: {e}") from None
    return fs, root


# What a run writes into its folder, by relative path; drills, evaluations and sweeps too.
_OWN = (
    r"(recipe|best)\.yaml", r"(manifest|workers|summary|metrics|trials|spent|driver|drill|descent|reports)\.json",
    r"(metrics|predictions)\.jsonl", r"trials\.csv", r"report\.html", r"drill\.log", r"ledger/steps-\d+-\d+\.parquet",
    r"checkpoints/step-\d{8,}\.\d{2,}/(MANIFEST\.json|\.metadata|__\d+_\d+\.distcp)", r"tensorboard/events\.out\..+",
    r"(ray|trials)/.+", r"(model|adapter)/((model|adapter_model)(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)",
    r"(model|adapter|tokenizer)/([a-z_]+\.(json|jinja|txt|model)|README\.md)", r"model/[12]_\w+/config\.json",
)  # fmt: skip


class RunFolder:
    """The files of one run. `root` is absolute or a URL."""

    def __init__(self, root: str):
        self.root = root
        self.recipe = join(root, "recipe.yaml")
        self.manifest = join(root, "manifest.json")
        self.ledger = join(root, "ledger")
        self.workers = join(root, "workers.json")
        self.checkpoints = join(root, "checkpoints")
        self.tensorboard = join(root, "tensorboard")
        self.tokenizer = join(root, "tokenizer")
        self.model = join(root, "model")
        self.adapter = join(root, "adapter")
        self.summary = join(root, "summary.json")
        self.metrics = join(root, "metrics.json")
        self.log = join(root, "metrics.jsonl")
        self.predictions = join(root, "predictions.jsonl")
        self.trials = join(root, "trials.json")
        self.ray = join(root, "ray")

    @property
    def name(self) -> str:
        return self.root.rsplit("/", 1)[-1]

    def finished(self) -> bool:
        return exists(self.summary)

    def taken(self) -> list[str]:
        """Returns the names in the folder, sorted, that a run would write to."""
        own = {path[len(self.root) + 1 :] for key, path in vars(self).items() if key != "root"}
        return sorted(own.intersection(listdir(self.root)))

    def foreign(self) -> list[str]:
        """Returns the files in the folder, by relative path, that sevenfold did not write."""
        fs, root = _fs(self.root)
        names = (p[len(root) :].lstrip("/") for p in _again(self.root, "listed", lambda: fs.find(root)))
        own = re.compile(rf"({'|'.join(_OWN)})(\.tmp|\.\d+-[0-9a-f]{{8}}\.tmp)?")
        return sorted(n for n in names if not own.fullmatch(n))

    @staticmethod
    def of(path: str) -> RunFolder:
        """The run at a path. Raises InputError where there is none."""
        root = locate(path)
        folder = RunFolder(root)
        if not exists(folder.recipe):
            raise InputError(f"{root}: expected a run (a folder with recipe.yaml), found none")
        return folder
