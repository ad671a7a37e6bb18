"""Every private name of Ray that sevenfold uses, each with the reason.

Private names may change with any release, which is why Ray is pinned to one minor version.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

# "module:name" -> what we use it for
PRIVATE = {
    "ray._private.ray_constants:ENABLE_RAY_CLUSTER": (
        "Ray listens on the loopback address only where it is False"
    ),
    "ray._private.ray_constants:ENABLE_RAY_CLUSTERS_ENV_VAR": (
        "the same, for the processes that this one starts"
    ),
    "ray.job_config:JobConfig._py_driver_sys_path": (
        "the folders that workers import from first; Ray adds the current one"
    ),
    "ray._private.worker:print_to_stdstream": (
        "prints Ray's messages about itself; we print their first line only"
    ),
    "ray._private.state:state.get_cluster_config": "what the autoscaler may start",
    "ray._private.state:available_resources_per_node": (
        "the free resources of each node; the public function returns their sum"
    ),
    "ray._private.authentication.authentication_token_setup:enable_token_auth_by_default": (
        "turns token authentication on, as ray.init does"
    ),
    "ray._private.authentication.authentication_token_setup:ensure_token_if_auth_enabled": (
        "creates the token, as ray.init does"
    ),
    "ray.autoscaler._private.util:prepare_config": "Ray's own offline check of a cluster.yaml",
    "ray.autoscaler._private.util:validate_config": "Ray's own offline check of a cluster.yaml",
    "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
    ":get_or_create_autoscaling_coordinator": (
        "an actor of Ray Data, started on the driver's node; see start_data_actors"
    ),
    "ray.data._internal.execution.node_trackers:get_or_create_actor_location_tracker": "the same",
    "ray.data._internal.stats:get_or_create_stats_actor": "the same",
    "ray.data._internal.usage.actor:get_or_create_usage_collection_actor": "the same",
    "ray.train.v2._internal.constants:ENV_VARS_TO_PROPAGATE": (
        "the environment variables that Ray Train's processes get"
    ),
    "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client"
    ":AUTOSCALING_REQUESTS_EXPIRE_TIME_S": (
        "how long a run that was killed keeps other runs from its resources"
    ),
    "ray.train.v2._internal.execution.failure_handling:DefaultFailurePolicy.make_decision": (
        "a run whose input is wrong is not tried again"
    ),
    "ray.train.v2._internal.execution.failure_handling:FailureDecision.RAISE": "the same",
    "ray.train.v2._internal.execution.context:get_train_context": (
        "preemption notices without a barrier"
    ),
    "ray.train.torch.config:_TorchBackend": (
        "a process group that listens on the loopback address"
    ),
    "ray.train.torch.config:_set_torch_distributed_env_vars": "the same",
    "ray.train.torch.config:_setup_torch_process_group": "the same",
    "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE": (
        "the environment variables that Ray Tune's trials get"
    ),
    "ray.tune.schedulers.pbt:_PBTTrialState": "trials are added to PBT while others train",
    "ray.tune.schedulers.pbt:PopulationBasedTraining._checkpoint_or_exploit": (
        "no trial continues from an earlier step"
    ),
    "ray.tune.schedulers.hyperband:HyperBandScheduler._get_r0": (
        "we round a bracket's first rung up, Ray rounds it down; it knows no grace"
    ),
}


def listen_on_loopback() -> None:
    """Makes a Ray that this process or its children start listen on the loopback address only.

    Ray does so by itself on macOS and Windows, where it does not support clusters (2.60,
    services.get_node_ip_address). Elsewhere each of its processes listens on all interfaces, and
    ray.init replaces a loopback address by the host's address.
    """
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"


class _NoPaths(list[str]):
    """A list of folders that stays empty."""

    def extend(self, _: Any) -> None:
        """Adds nothing."""


def job_without_paths() -> Any:
    """Returns a job config with which workers do not import from the driver's current folder.

    Ray (2.60) puts that folder, and the one of the driver's script, before all others on the path
    of each worker. A numpy.py in a folder that was handed over would run.
    """
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _NoPaths()
    return config


def show_ray_output(show: Callable[[dict[str, Any], bool], None]) -> None:
    """Sets the function that prints Ray's messages about itself.

    Ray's own function prints about a page for each node that is lost.

    Args:
        show: Called with a message of Ray and whether to omit its prefix.
    """
    from ray._private import worker

    worker.print_to_stdstream = show


def autoscaler_config() -> Any:
    """Returns the autoscaler's configuration as reported to Ray's head; None if it was not."""
    from ray._private.state import state

    return state.get_cluster_config()


def available_resources_per_node() -> dict[str, dict[str, float]]:
    """Returns the free resources of each node by node id."""
    from ray._private import state

    resources: dict[str, dict[str, float]] = state.available_resources_per_node()
    return resources


def enable_token_auth() -> None:
    """Turns token authentication on, and creates a token if there is none, as ray.init does."""
    from ray._private.authentication import authentication_token_setup

    authentication_token_setup.enable_token_auth_by_default()
    authentication_token_setup.ensure_token_if_auth_enabled(create_token_if_missing=True)


def check_cluster_config(config: dict[str, Any]) -> None:
    """Runs Ray's own offline checks of a cluster.yaml; raises whatever exception they raise."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def start_data_actors() -> None:
    """Starts Ray Data's detached actors, one of each kind per cluster, on the node of this process.

    They outlive the run that first uses them and stay on the node that the run used them from,
    which the autoscaler then never finds idle. That must be the driver's node rather than a node of
    a pool that is to be scaled down.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor
    from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

    get_or_create_autoscaling_coordinator()
    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()
    get_or_create_usage_collection_actor()


def quieten_train_context() -> None:
    """Lets the logger of Ray Train's context, which is named after its file, log errors only."""
    from ray.train.v2._internal.execution import context

    logging.getLogger(context.__file__).setLevel(logging.ERROR)


def shorten_reservations() -> None:
    """Lets the reservations of this process, a controller of Ray Train, expire after a minute.

    A run with a range of workers starts when Ray's autoscaling coordinator reserves resources for
    it. A run whose driver was killed cannot give its reservation back, and Ray 2.60 keeps it for
    three minutes, even from the same command that resumes the run. Runs renew their reservations
    every 20 seconds.
    """
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client

    autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = 60


def end_at_once(kind: type[Exception]) -> None:
    """Lets a kind of error of a worker end a run, in this process, a controller of Ray Train.

    Ray 2.60 restarts the workers after all errors alike, up to max_failures times.
    """
    from ray.train.v2._internal.execution.failure_handling import (
        DefaultFailurePolicy,
        FailureDecision,
    )

    decide = DefaultFailurePolicy.make_decision

    def make_decision(policy: Any, training_failed_error: Any) -> Any:
        decision = decide(policy, training_failed_error)
        failures = getattr(training_failed_error, "worker_failures", {})
        if any(isinstance(error, kind) for error in failures.values()):
            return FailureDecision.RAISE
        return decision

    DefaultFailurePolicy.make_decision = make_decision


def preemption_info() -> Any:
    """Returns Ray's notice that a node of this run will be preempted; None if there is none.

    The public ray.train.get_preemption_info() returns the same value, but it is a barrier of all
    workers that goes through an actor.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def propagate_to_train(variable: str) -> None:
    """Makes Ray Train pass an environment variable of this process on to its processes."""
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.add(variable)


def keep_aws_keys_from_trials() -> None:
    """Stops Ray Tune from passing the driver's AWS keys to its trials.

    Ray 2.60 passes them in the trials' runtime environment, which a log and the dashboard show.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE -= {
        name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")
    }


def pbt_trial_state(trial: Any) -> Any:
    """Returns the state that Ray's PBT scheduler keeps of a new trial."""
    from ray.tune.schedulers.pbt import _PBTTrialState

    return _PBTTrialState(trial)


def set_hyperband_rungs(scheduler: Any, first_rung: Callable[[int], int], brackets: int) -> None:
    """Sets the brackets of a HyperBand scheduler.

    Args:
        scheduler: Ray's HyperBandScheduler.
        first_rung: Returns the first rung of the bracket with this number.
        brackets: The most brackets; Ray's number stays if it is smaller.
    """
    scheduler._get_r0 = first_rung
    scheduler._s_max_1 = min(scheduler._s_max_1, brackets)
