"""Folders of this user's own among those of others, such as in the temporary folder."""

from __future__ import annotations

import os
import stat

from sevenfold.errors import InputError


def user_folder(parent: str) -> str:
    """Returns the path of this user's own folder in a folder that others may write to."""
    return os.path.join(os.path.abspath(parent), f"sevenfold-{os.getuid()}")


def require_private(folder: str) -> None:
    """Creates a folder that only this user can enter; checks one that exists already.

    Raises:
        InputError: It is not a folder, or another user's, or others can enter it.
    """
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    except OSError as e:
        raise InputError(f"{folder}: cannot be created: {e.strerror}") from None
    status = os.lstat(folder)  # not stat: a link of another user could lead anywhere
    if stat.S_ISLNK(status.st_mode):
        found = "a symbolic link"
    elif not stat.S_ISDIR(status.st_mode):
        found = "a file"
    elif status.st_uid != os.getuid():
        found = f"one of user {status.st_uid}"
    elif stat.S_IMODE(status.st_mode) & 0o777 != 0o700:
        found = f"the mode {stat.S_IMODE(status.st_mode):o}"
    else:
        return
    raise InputError(
        f"{folder}: expected a folder of this user (uid {os.getuid()}) with the mode 700, found "
        f"{found}: remove it, or set TMPDIR to a folder of your own (for Ray, RAY_TMPDIR)"
    )
