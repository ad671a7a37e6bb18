"""The saved state of a sweep, in one file that only its owner can write.

Tune, its searcher and the schedulers save their state as pickles, and reading a pickle can run any
code that someone put into it. A sweep's state is therefore authenticated: the file begins with an
HMAC-SHA256 of its content, by a key that only the owner of the sweep has. The key is the
environment variable SEVENFOLD_KEY, or else a file in the home folder, which is created if needed.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import secrets
import stat
import zipfile
from pathlib import Path

from ray import cloudpickle, tune

from sevenfold import storage
from sevenfold.errors import InputError
from sevenfold.run_folder import RunFolder

TUNE = "tune"  # Tune's own folder, in the run folder's ray/
SNAPSHOT = "sweep-state"  # the file, beside it
_MAGIC = b"sevenfold sweep state 1\n"
_KEY_VARIABLE = "SEVENFOLD_KEY"
_KEY_FILE = "~/.sevenfold/key"
_MIN_KEY = 16  # characters
# The names of the files of Tune's that a resumed sweep reads, and unpickles.
_STATE_FILES = (".json", ".pkl")
_GENERATOR = "search_gen_state"  # how the name of the state of Tune's generator of trials begins


def save(sweep: str, files: dict[str, bytes]) -> None:
    """Replaces the saved state of a sweep.

    Args:
        sweep: The sweep's folder.
        files: The content of each file by its name.

    Raises:
        InputError: There is no key, or others can read it.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    content = archive.getvalue()
    storage.write(_path(sweep), _MAGIC + _code(content).encode() + b"\n" + content)


def load(sweep: str, *, trusted: bool = False) -> dict[str, bytes] | None:
    """Returns the saved state of a sweep, after a check that its owner has written it.

    Args:
        sweep: The sweep's folder.
        trusted: Whether the user has said that the state is to be read in any case.

    Returns:
        The content of each file by its name; {} if an earlier version of sevenfold has written the
        state, in Tune's folder, and `trusted` is set; None if there is no saved state.

    Raises:
        InputError: The state was not written with the key, or there is no key.
    """
    path = _path(sweep)
    if not storage.exists(path):
        folder = storage.join(RunFolder(sweep).ray, TUNE)
        if not any(name.startswith("experiment_state") for name in storage.listdir(folder)):
            return None
        if not trusted:
            raise _refusal(folder, "found one of an earlier version of sevenfold, without a key")
        return {}
    with storage.open_read(path) as file:
        magic, code, content = file.read(len(_MAGIC)), file.read(65), file.read()
    if magic != _MAGIC:
        raise InputError(f"{path}: damaged: it is not the state of a sweep; {storage.DAMAGED_HINT}")
    if not trusted and not hmac.compare_digest(code.strip(), _code(content).encode()):
        raise _refusal(path, "found one that was written with another key, or changed")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            return {name: packed.read(name) for name in packed.namelist()}
    except (zipfile.BadZipFile, ValueError, EOFError) as e:  # only with `trusted`
        raise InputError(f"{path}: damaged: {e}; {storage.DAMAGED_HINT}") from None


def restore(sweep: str, files: dict[str, bytes]) -> None:
    """Replaces what Tune reads when it resumes a sweep by files of its saved state."""
    folder = storage.join(RunFolder(sweep).ray, TUNE)
    for name in storage.listdir(folder):
        if name.endswith(_STATE_FILES):
            storage.remove(storage.join(folder, name))
    for name, content in files.items():
        if name.startswith(_GENERATOR):
            content = _with_folder(content, sweep)
        storage.write(storage.join(folder, os.path.basename(name)), content)


def _with_folder(state: bytes, sweep: str) -> bytes:
    """Returns the state of Tune's generator of trials with the folder where the sweep is now.

    Tune lets a resumed sweep create trials in the folder that this state names.
    """
    tree = cloudpickle.loads(state)  # authenticated, see `load`
    if tree["experiment"].storage.storage_fs_path == _ray_path(sweep):
        return state
    tree["experiment"].storage.storage_fs_path = _ray_path(sweep)
    return bytes(cloudpickle.dumps(tree))


def moved(checkpoint: tune.Checkpoint, sweep: str) -> tune.Checkpoint:
    """Returns a checkpoint of Tune's where the sweep's folder is now.

    Args:
        checkpoint: The checkpoint where it was saved. Since then the folder may have been renamed
            or copied. Tune itself follows only a trial's own checkpoints.
        sweep: The sweep's folder.
    """
    _, found, rest = checkpoint.path.rpartition(f"/ray/{TUNE}/")
    if not found:
        return checkpoint
    return tune.Checkpoint(f"{_ray_path(sweep)}/{TUNE}/{rest}", checkpoint.filesystem)


def _ray_path(sweep: str) -> str:
    """Returns the path of Ray's folder within its filesystem, as Tune keeps it."""
    return RunFolder(sweep).ray.rpartition("://")[2]


def remove(sweep: str) -> None:
    """Removes the saved state of a sweep, so that the same command starts the sweep anew."""
    for name in (SNAPSHOT, TUNE):
        storage.remove(storage.join(RunFolder(sweep).ray, name))


def _path(sweep: str) -> str:
    return storage.join(RunFolder(sweep).ray, SNAPSHOT)


def _refusal(path: str, found: str) -> InputError:
    return InputError(
        f"{path}: expected the state of a sweep that was saved with your key ({_KEY_VARIABLE}, or "
        f"{_KEY_FILE}), {found}: reading it can run code: if you trust whoever wrote it, add "
        "--trust-state; else choose another name (name=...)"
    )


def _code(content: bytes) -> str:
    """Returns the HMAC-SHA256 of a content by the owner's key."""
    return hmac.new(_key(), content, hashlib.sha256).hexdigest()


def _key() -> bytes:
    """Returns the owner's key, which is created if there is none."""
    key = os.environ.get(_KEY_VARIABLE)
    if key is None:
        key = _key_of_file(Path(_KEY_FILE).expanduser())
    if len(key) < _MIN_KEY:
        where = _KEY_VARIABLE if _KEY_VARIABLE in os.environ else _KEY_FILE
        raise InputError(f"{where}: expected a key of {_MIN_KEY} characters or more")
    return key.encode()


def _key_of_file(path: Path) -> str:
    """Returns the key in a file that nobody else can read or write; creates the file if needed."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
        except FileExistsError:
            pass
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as file:
            status = os.fstat(file.fileno())
            key = file.read().strip()
    except OSError as e:
        raise InputError(
            f"{path}: the key that authenticates the state of sweeps cannot be kept there "
            f"({e.strerror}): set {_KEY_VARIABLE} to a secret of {_MIN_KEY} characters or more"
        ) from None
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise InputError(
            f"{path}: expected a file that only you can read, found mode "
            f"{stat.S_IMODE(status.st_mode):o} of user {status.st_uid}: remove it"
        )
    return key
