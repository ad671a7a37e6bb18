"""Finds mistakes in a `cluster.yaml` of Ray's cluster launcher before anything is started.

With a recipe it also checks whether the recipe fits the pools of nodes. Ray's own checks before
`ray up` miss about half of these mistakes (benchmarks/cluster.py).
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import ray.autoscaler

from sevenfold.cluster import ray_private
from sevenfold.cluster.cluster_file import Config
from sevenfold.doctor import ec2_checks, fit, security
from sevenfold.doctor.finding import Finding, did_you_mean
from sevenfold.errors import first_line
from sevenfold.recipe import Recipe

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

PROVIDERS = (
    "aws",
    "azure",
    "gcp",
    "local",
    "external",
    "vsphere",
    "aliyun",
    "spark",
    "readonly",
    "kuberay",
)

PROVIDER_KEYS = {  # of the provider aws
    "type",
    "region",
    "availability_zone",
    "cache_stopped_nodes",
    "use_internal_ips",
    "security_group",
    "key_pair",
    "aws_credentials",
    "cloudwatch",
    "disable_launch_config_check",
    "disable_node_updaters",
    "foreground_node_launch",
    "worker_liveness_check",
    "worker_rpc_drain",
    "endpoint_url",
}

NODE_TYPE_KEYS = (
    "resources",
    "node_config",
    "min_workers",
    "max_workers",
    "labels",
    "docker",
    "worker_setup_commands",
    "initialization_commands",
    "idle_timeout_s",
    "priority",
)

# Top-level settings of the time before Ray had node types.
LEGACY_KEYS = ("min_workers", "initial_workers", "head_node", "worker_nodes")

RESOURCES = ("CPU", "GPU", "memory", "object_store_memory", "TPU")


def find_problems(config: Config, recipe: Recipe | None = None) -> list[Finding]:
    """Returns all mistakes in a cluster.yaml.

    Ray's own checks run only if no other mistake was found.

    Args:
        config: The parsed cluster.yaml.
        recipe: A recipe that the cluster is to train.
    """
    config = copy.deepcopy(dict(config))
    findings = [
        *_check_top_level(config),
        *_check_provider(config),
        *_check_docker(config),
        *_check_head(config),
    ]
    for name, node_type in config["available_node_types"].items():
        setting = f"available_node_types.{name}"
        node_type = node_type if isinstance(node_type, dict) else {}
        findings += _check_node_type(setting, name, node_type, config)
    for check in (security.access, security.commands, security.mounts, security.secrets):
        findings += check(config)
    if recipe is not None:
        findings += fit.fit(config, recipe)
    if not findings:
        findings += _check_with_ray(config)
    return findings


def _check_top_level(config: Config) -> Iterator[Finding]:
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    for key in config:
        if key in LEGACY_KEYS:
            yield Finding(
                key,
                "found at the top level, where Ray ignores it since it has node types: put it into "
                "available_node_types.NAME",
            )
        elif key.endswith("_commands") and not isinstance(config[key], list):
            yield Finding(key, f"expected a list of commands, found {config[key]!r}")
        elif key not in schema["properties"]:
            yield Finding(key, f"unknown setting{did_you_mean(key, schema['properties'])}")
    if not NAME.fullmatch(str(config.get("cluster_name", ""))):
        yield Finding(
            "cluster_name",
            "expected letters, digits, - and _ (the name becomes part of shell commands), found "
            f"{config.get('cluster_name')!r}",
        )
    yield from _check_scaling(config)


def _check_scaling(config: Config) -> Iterator[Finding]:
    max_workers = config.get("max_workers", 2)
    if type(max_workers) is not int or max_workers < 0:
        yield Finding("max_workers", f"expected an integer of at least 0, found {max_workers!r}")
        return
    min_workers = sum(
        node_type.get("min_workers", 0)
        for node_type in config["available_node_types"].values()
        if isinstance(node_type.get("min_workers", 0), int)
    )
    if min_workers > max_workers:
        yield Finding(
            "max_workers",
            f"expected at least the sum of all min_workers ({min_workers}), found {max_workers}",
        )
    idle_timeout = config.get("idle_timeout_minutes", 5)
    if not isinstance(idle_timeout, int | float) or idle_timeout <= 0:
        yield Finding("idle_timeout_minutes", f"expected a number above 0, found {idle_timeout!r}")
    upscaling_speed = config.get("upscaling_speed", 1.0)
    if not isinstance(upscaling_speed, int | float) or upscaling_speed < 0:
        yield Finding(
            "upscaling_speed", f"expected a number of at least 0, found {upscaling_speed!r}"
        )


def _check_provider(config: Config) -> Iterator[Finding]:
    provider = config.get("provider") or {}
    provider_type = provider.get("type")
    if provider_type not in PROVIDERS:
        yield Finding(
            "provider.type",
            f"expected one of {', '.join(PROVIDERS)}, found {provider_type!r}"
            f"{did_you_mean(str(provider_type), PROVIDERS)}",
        )
    elif provider_type == "aws":
        yield from _check_aws_provider(provider)


def _check_aws_provider(provider: Config) -> Iterator[Finding]:
    for key in provider:
        if key not in PROVIDER_KEYS:
            yield Finding(f"provider.{key}", f"unknown setting{did_you_mean(key, PROVIDER_KEYS)}")
    if "region" not in provider:
        yield Finding("provider.region", "expected a region, such as us-west-2, found none")
        return
    region = provider["region"]
    zones = provider.get("availability_zone", region)
    if not str(zones).startswith(region):
        yield Finding("provider.availability_zone", f"expected zones of {region}, found {zones}")


def _check_docker(config: Config) -> Iterator[Finding]:
    docker, node_types = config.get("docker") or {}, config["available_node_types"]
    sections = {"docker": docker} | {
        f"available_node_types.{name}.docker": (node_type or {}).get("docker") or {}
        for name, node_type in node_types.items()
    }
    for setting, section in sections.items():
        for key in ("image", "head_image", "worker_image"):
            image = section.get(key)
            if image and "@sha256:" not in image:
                yield Finding(
                    f"{setting}.{key}",
                    f"expected an image by digest (name@sha256:...), found {image}: the image "
                    "behind a tag can change",
                )
    without_gpu = [
        name
        for name, node_type in node_types.items()
        if name != config.get("head_node_type")
        and not (node_type.get("resources") or {}).get("GPU")
    ]
    for key in ("run_options", "worker_run_options"):
        if without_gpu and "--gpus" in " ".join(map(str, docker.get(key) or [])):
            yield Finding(
                f"docker.{key}",
                "found --gpus, with which Docker starts no container on the machines of "
                f"{', '.join(without_gpu)}, which have no GPU: put it into "
                "available_node_types.NAME.docker.worker_run_options of the pools with GPUs",
            )
    if docker and not NAME.fullmatch(str(docker.get("container_name", ""))):
        yield Finding(
            "docker.container_name",
            f"expected letters, digits, - and _, found {docker.get('container_name')!r}",
        )


def _check_head(config: Config) -> Iterator[Finding]:
    name, node_types = config.get("head_node_type"), config["available_node_types"]
    if name not in node_types:
        yield Finding(
            "head_node_type",
            f"expected one of {', '.join(node_types)}, found {name!r}"
            f"{did_you_mean(str(name), node_types)}",
        )
        return
    setting, head = f"available_node_types.{name}", node_types[name]
    for resource in ("CPU", "GPU"):
        if (head.get("resources") or {}).get(resource) != 0:
            yield Finding(
                f"{setting}.resources.{resource}",
                "expected 0: a task that crashes the head ends the whole cluster; run work in a "
                "pool of its own",
            )
    if head.get("max_workers", 0) != 0:
        yield Finding(
            f"{setting}.max_workers",
            "expected 0: further nodes of the head's type would run no work either, found "
            f"{head['max_workers']}",
        )
    if ec2_checks.market_type(head.get("node_config") or {}) == "spot":
        yield Finding(
            f"{setting}.node_config.InstanceMarketOptions",
            "found spot: losing the head ends the cluster; use an on-demand instance",
        )


def _check_node_type(
    setting: str, name: str, node_type: Config, config: Config
) -> Iterator[Finding]:
    if not NAME.fullmatch(str(name)):
        yield Finding(
            setting,
            "expected letters, digits, - and _ in a name (it becomes part of shell commands)",
        )
    for key in node_type:
        if key not in NODE_TYPE_KEYS:
            yield Finding(f"{setting}.{key}", f"unknown setting{did_you_mean(key, NODE_TYPE_KEYS)}")
    min_workers = node_type.get("min_workers", 0)
    max_workers = node_type.get("max_workers", config.get("max_workers", 2))
    other_types = config["available_node_types"].keys() - {name}
    if (
        type(min_workers) is not int
        or type(max_workers) is not int
        or min_workers < 0
        or max_workers < 0
    ):
        yield Finding(
            f"{setting}.min_workers",
            "expected integers of at least 0 for min_workers and max_workers, found "
            f"{min_workers!r} and {max_workers!r}",
        )
    elif min_workers > max_workers:
        yield Finding(
            f"{setting}.min_workers",
            f"expected at most max_workers ({max_workers}), found {min_workers}",
        )
    elif not max_workers and config.get("head_node_type") in other_types:
        yield Finding(f"{setting}.max_workers", "found 0: no machine of this type is ever started")
    resources = node_type.get("resources") or {}
    for key, value in resources.items():
        if key not in RESOURCES and (suggestion := did_you_mean(key, RESOURCES)):
            yield Finding(
                f"{setting}.resources.{key}", f"Ray schedules by CPU and GPU only{suggestion}"
            )
        elif type(value) is not int or value < 0:
            yield Finding(
                f"{setting}.resources.{key}", f"expected an integer of at least 0, found {value!r}"
            )
    if (config.get("provider") or {}).get("type") == "aws":
        is_head = name == config.get("head_node_type")
        yield from ec2_checks.check_machine(setting, node_type, is_head)


def _check_with_ray(config: Config) -> Iterator[Finding]:
    """Runs Ray's own checks, without what they print and log."""
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ray_private.check_cluster_config(copy.deepcopy(dict(config)))
    except Exception as e:
        yield Finding("cluster.yaml", f"Ray's own check failed: {first_line(e)}")
    finally:
        logging.disable(logging.NOTSET)
