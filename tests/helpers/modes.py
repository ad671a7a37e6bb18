"""The modes of files, which the umask should give."""

import stat
from pathlib import Path


def wrong_modes(paths: list[Path], umask: int) -> dict[str, str]:
    """Returns the paths whose mode is not the one of new files and folders under an umask."""
    expected = {True: 0o777 & ~umask, False: 0o666 & ~umask}
    return {
        str(p): oct(mode)
        for p in paths
        if not p.is_symlink() and (mode := stat.S_IMODE(p.stat().st_mode)) != expected[p.is_dir()]
    }
