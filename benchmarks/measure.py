"""What the benchmark scripts share.

It measures the cost of a command, creates environments for other libraries, alternates the sides of
a comparison, and prints the table of claims.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median as median
from typing import Any, NamedTuple

CPU_EVERY, PSS_EVERY = 0.1, 0.5  # seconds between two samples
PSS_SHARE = 0.05  # the maximum share of a core that reading PSS may take
LIBRARIES = ("torch", "ray", "transformers", "tokenizers", "pyarrow", "numpy")
Key = tuple[int, int]  # pid and start time, since pids are reused
_TAIL = 3000  # characters of stderr that an error shows
_ROOT = (0, 0)  # the Key of this process


class Measured(NamedTuple):
    wall_s: float  # until the command itself ended
    cpu_s: float  # of all its processes
    peak_mb: float  # PSS of all its processes: shared memory counts once
    stdout_json: Any  # the last line of its output


class _Process(NamedTuple):
    key: Key
    parent: int
    state: str
    own_s: float
    waited_s: float  # CPU time of the children that it has waited for


class _Tree:
    """All descendants of this process that start from now on.

    Those whose own parent has ended are included.
    """

    def __init__(self) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0):
            # without it, orphans would become children of init and be missed
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        self._before = {p.key for p in _processes()}
        self._seen: dict[Key, tuple[_Process, Key]] = {}  # the process and its parent
        # CPU seconds of reaped processes, from the kernel, with the children they waited for
        self._reaped: dict[Key, float] = {}
        self.status: dict[int, int] = {}  # exit codes of reaped processes
        self.peak_mb, self._pss_due = 0.0, 0.0

    def sample(self) -> list[int]:
        """Reads all processes of the tree; returns the pids of those that have not ended."""
        children = defaultdict[int, list[_Process]](list)
        for p in _processes():
            children[p.parent].append(p)
        alive: list[int] = []
        level = [(p, _ROOT) for p in children[os.getpid()] if p.key not in self._before]
        while level:
            for p, parent in level:
                self._seen[p.key] = p, parent
                if p.state not in "ZX":
                    alive.append(p.key[0])
                elif parent == _ROOT:
                    pid, status, usage = os.wait4(p.key[0], os.WNOHANG)
                    if pid:
                        self._reaped[p.key] = usage.ru_utime + usage.ru_stime
                        self.status[pid] = os.waitstatus_to_exitcode(status)
            level = [(c, p.key) for p, _ in level for c in children[p.key[0]]]
        if (now := time.perf_counter()) >= self._pss_due:
            self.peak_mb = max(self.peak_mb, sum(map(_pss_mb, alive)))
            self._pss_due = now + max(PSS_EVERY, (time.perf_counter() - now) / PSS_SHARE)
        return alive

    def cpu_s(self) -> float:
        """Returns the CPU seconds of all processes of the tree.

        For each subtree there are two numbers, of which the larger one is taken: the kernel's for
        its root and the children that it waited for, which includes children too short-lived to be
        sampled; and the sum over the sampled processes, which includes those nobody waited for.
        """
        below = defaultdict[Key, list[Key]](list)
        # no other process has waited for those that this one reaped
        for key, (_, parent) in self._seen.items():
            below[_ROOT if key in self._reaped or parent not in self._seen else parent].append(key)

        def total(key: Key) -> float:
            p, _ = self._seen[key]
            return max(
                self._reaped.get(key, p.own_s + p.waited_s), p.own_s + sum(map(total, below[key]))
            )

        return sum(map(total, below[_ROOT]))

    def end(self, patience: float = 5) -> None:
        """Terminates all processes, kills those that remain, and returns when all have ended."""
        start, terminated = time.perf_counter(), set[int]()
        while alive := self.sample():
            late = time.perf_counter() - start > patience
            for pid in alive if late else set(alive) - terminated:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            terminated.update(alive)
            time.sleep(0.05)
        self.sample()  # reaps those that ended while the last sample was read


def run(
    command: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout: float = 600
) -> Measured:
    """Runs a command and measures it with all its processes, daemons included.

    All of them are ended afterwards. Only one command can be measured at a time.

    Args:
        command: The command; the last line that it prints is JSON.
        env: Environment variables, in addition to those of this process.
        timeout: Seconds after which it is ended.

    Raises:
        RuntimeError: It fails, takes too long, or its last line is not JSON.
    """
    tree, words, start = _Tree(), [os.fspath(c) for c in command], time.perf_counter()
    # files instead of pipes: a daemon that keeps a pipe open would block the reader
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **(env or {})},
        )
        ended = os.pidfd_open(child.pid)
        try:
            while (
                not (ready := select.select([ended], [], [], CPU_EVERY)[0])
                and time.perf_counter() - start < timeout
            ):
                tree.sample()
            wall = time.perf_counter() - start
        finally:
            tree.end()
            os.close(ended)
            # the tree has waited for the child, so subprocess must not
            child.returncode = tree.status.get(child.pid, -1)
        printed, errors = (
            os.pread(f.fileno(), 1 << 30, 0).decode(errors="replace").strip() for f in (out, err)
        )
    if not ready or child.returncode:
        problem = (
            f"failed with status {child.returncode}" if ready else f"took longer than {timeout:g} s"
        )
        raise RuntimeError(f"{' '.join(words)}: {problem}\n{errors[-_TAIL:]}")
    try:
        return Measured(wall, tree.cpu_s(), tree.peak_mb, json.loads(printed.rpartition("\n")[2]))
    except ValueError:
        raise RuntimeError(
            f"{' '.join(words)}: expected JSON as the last line, found:\n{printed[-_TAIL:]}"
        ) from None


def _processes() -> Iterator[_Process]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            # the process's name, in parentheses, may contain spaces
            v = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            own, waited = (sum(map(int, v[i : i + 2])) / os.sysconf("SC_CLK_TCK") for i in (11, 13))
            yield _Process((int(pid), int(v[19])), int(v[1]), v[0].decode(), own, waited)


def _pss_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0]) / 1024
    except (OSError, IndexError):  # the process has ended
        return 0.0


def environment(name: str, requirements: Sequence[str]) -> Path:
    """Returns the Python executable of a virtual environment with these packages.

    The environment is created at the first call. Without requirements it is the current one.
    """
    if not requirements:
        return Path(sys.executable)
    cache = os.environ.get("SEVENFOLD_BENCH") or Path.home() / ".cache" / "sevenfold-bench"
    folder = Path(cache).absolute() / name
    python, ready = folder / "bin" / "python", folder / "ready.json"
    expected = json.dumps([platform.python_version(), *sorted(requirements)])
    if not ready.exists() or ready.read_text() != expected:
        print(f"creating the environment of {name}: {expected}", file=sys.stderr, flush=True)
        ready.unlink(missing_ok=True)
        create = (sys.executable, "-m", "venv", "--clear", str(folder))
        for command in (create, (str(python), "-m", "pip", "install", "--quiet", *requirements)):
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                raise RuntimeError(
                    f"environment of {name}: failed\n{(process.stdout + process.stderr)[-_TAIL:]}"
                )
        ready.write_text(expected)  # written last: an incomplete environment is created again
    return python


def machine() -> dict[str, Any]:
    """Returns the properties of this machine that results depend on."""
    models = [
        s.partition(":")[2].strip()
        for s in Path("/proc/cpuinfo").read_text().splitlines()
        if s[:10] == "model name"
    ]
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    hardware = {
        "cpu": (models or [platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": memory,
    }
    versions = {
        d.name: d.version for d in importlib.metadata.distributions() if d.name in LIBRARIES
    }
    return {**hardware, "python": platform.python_version(), "libraries": versions}


def claim(
    name: str, ours: float, other: float | None, goal: float, at_most: bool = False
) -> dict[str, Any]:
    """Compares a result with a goal.

    Args:
        name: The name of the claim.
        ours: Our result.
        other: The result to divide it by; None: `ours` itself is compared.
        goal: The minimum of the ratio (or of `ours`).
        at_most: Whether `goal` is the maximum instead.
    """
    ratio, value = (None, ours) if other is None else (ours / other,) * 2
    holds, sign = (value <= goal, "<=") if at_most else (value >= goal, ">=")
    return {
        "name": name,
        "ours": ours,
        "other": other,
        "ratio": ratio,
        "goal": f"{sign} {goal:g}",
        "holds": holds,
    }


def report(claims: Sequence[dict[str, Any]], json_path: str | Path | None = None) -> bool:
    """Prints the table of claims, writes it to a JSON file if given; returns whether all hold."""
    from rich.console import Console
    from rich.table import Table

    properties = machine()
    caption = ", ".join(
        f"{k} {v}" for k, v in (properties | properties["libraries"]).items() if k != "libraries"
    )
    table = Table(*claims[0], caption=caption)
    for c in claims:
        cells = [
            f"{v:,.4g}" if type(v) in (int, float) else "-" if v is None else str(v)
            for v in c.values()
        ]
        table.add_row(*cells[:-1], "yes" if c["holds"] else "[bold red]NO")
    Console().print(table)
    if json_path:
        Path(json_path).write_text(
            json.dumps({"machine": properties, "claims": claims}, indent=1) + "\n"
        )
    return all(c["holds"] for c in claims)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs the sides in turn (A B A B), so that other load on the machine affects all of them."""
    figures = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
    return {name: [row[name] for row in figures] for name in sides}
