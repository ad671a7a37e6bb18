"""Connects to Ray: to the cluster of RAY_ADDRESS or of a submitted job, else to a new local Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayTaskError

import sevenfold
from sevenfold.cluster import ray_private
from sevenfold.cluster.temp_folder import ray_folder
from sevenfold.errors import InputError, RunError, cause_of, first_line
from sevenfold.report.console import say

# Silences what Ray would print among a run's own lines.
_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would show each print twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own table beside ours
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray 2.60 warns about it at each start
}

# Seconds after which Ray Train stops waiting for workers that cannot be scheduled, and tries again;
# with fewer workers where their number is a range.
WORKER_START_SECONDS = 30

_WORKERS = {
    # Each pair of ranks would be connected at the start: half a million connections of 1,024 ranks.
    "TORCH_GLOO_LAZY_INIT": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # report() waits for the next check
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(WORKER_START_SECONDS),
}

_LOCAL = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a local machine is not preempted
    # By default the number of cores. A sweep with more actors than that would log warnings.
    "RAY_worker_maximum_startup_concurrency": "8",
    # By default one process per logical CPU, none of which a training run would use.
    "RAY_prestart_worker_first_driver": "0",
}

_LOCAL_STORE = 512 * 2**20  # bytes of a local Ray's object store; chunks of data are a few MB


def connect(verbose: bool = False, dashboard: bool = False) -> None:
    """Connects to Ray.

    A local Ray gets more logical CPUs than there are cores, so that workers, drivers and data tasks
    share the cores.

    Args:
        verbose: Show Ray's logs.
        dashboard: Start the dashboard of a local Ray, which `ray.util.state` needs. It adds about a
            second to the start of a run.

    Raises:
        InputError: RAY_ADDRESS is the URL of a dashboard, or another user has taken the temporary
            folder of this one.
        RunError: No cluster answers at RAY_ADDRESS.
    """
    import ray.data  # noqa: F401 (creates the loggers that `quieten` then sets the level of)

    settings = _WORKERS if verbose else _WORKERS | _QUIET
    os.environ.update({key: os.environ.get(key, value) for key, value in settings.items()})
    if not verbose:
        quieten()
        ray_private.show_ray_output(_show_first_line)
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        raise InputError(
            f"RAY_ADDRESS={address} is the URL of a dashboard: use `ray job submit`, or unset "
            "RAY_ADDRESS to start a local Ray"
        )
    log_level = logging.INFO if verbose else logging.ERROR
    try:
        if address:
            _connect_to_cluster(list(settings), verbose, log_level)
        else:
            _start_local(dashboard, verbose, log_level)
    except ConnectionError as e:
        raise RunError(f"no Ray cluster answers at {address}: {first_line(e)}") from None
    if threading.current_thread() is threading.main_thread():
        # `ray job stop` sends SIGTERM: handle it like Ctrl-C. SIGINT itself may be ignored, since a
        # shell that starts a process with `&` makes it ignore SIGINT.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    _protect_token()


def _connect_to_cluster(variables: list[str], verbose: bool, log_level: int) -> None:
    """Connects to the cluster of RAY_ADDRESS.

    Args:
        variables: Names of the environment variables that workers get from this process.
        verbose: Show the workers' output.
        log_level: Of Ray's loggers.
    """
    # workers import the same library as this process, whatever is installed on their nodes
    library = str(Path(sevenfold.__file__).parent)
    env = {key: os.environ[key] for key in variables}
    ray.init(
        log_to_driver=verbose,
        logging_level=log_level,
        runtime_env={"py_modules": [library], "env_vars": env},
        job_config=ray_private.job_without_paths(),
    )
    ray_private.start_data_actors()


def _start_local(dashboard: bool, verbose: bool, log_level: int) -> None:
    """Starts a Ray on this machine for this user only.

    It listens on the loopback address only, and other users cannot enter its folder.
    """
    library = Path(sevenfold.__file__).parent
    paths = [str(library.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ.update(_LOCAL)
    ray_private.listen_on_loopback()
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    ray.init(
        address="local",
        num_cpus=2 * (os.cpu_count() or 1) + 4,
        object_store_memory=_LOCAL_STORE,
        include_dashboard=dashboard or verbose,
        log_to_driver=verbose,
        logging_level=log_level,
        _temp_dir=ray_folder(),
        job_config=ray_private.job_without_paths(),
    )


def _protect_token() -> None:
    """Makes Ray's authentication token readable by its owner only; Ray lets everyone read it."""
    token = Path("~/.ray/auth_token").expanduser()
    if token.exists() and token.stat().st_mode & 0o077:
        token.chmod(0o600)


def is_local() -> bool:
    """Returns whether all of Ray's nodes listen on the loopback address, hence on this machine."""
    return all(
        node["NodeManagerAddress"] in ("127.0.0.1", "::1") for node in ray.nodes() if node["Alive"]
    )


def _show_first_line(output: dict[str, Any], ignore_prefix: bool) -> None:
    """Prints the first line of a message of Ray, which for a lost node is a page long."""
    say(f"ray: {' '.join(output['lines']).strip().partition(chr(10))[0][:200]}")


def quieten() -> None:
    """Lets Ray's loggers log errors only; to be called in each process that uses Ray."""
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray_private.quieten_train_context()


def fetch(ref: Any) -> Any:
    """Returns ray.get(ref); raises an InputError or RunError of the task itself, unwrapped."""
    with unwrapped_errors():
        return ray.get(ref)


@contextlib.contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Raises an InputError or RunError of a Ray task or actor itself, not what Ray makes of it."""
    try:
        yield
    except RayTaskError as e:
        if isinstance(e.cause, InputError | RunError):
            raise e.cause from None
        raise
    except ActorDiedError as e:  # of an actor's __init__ only the traceback is known, as text
        if "sevenfold.errors." in str(e):
            raise RunError(cause_of(e)) from None
        raise
