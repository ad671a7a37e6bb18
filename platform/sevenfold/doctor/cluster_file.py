"""Mistakes in a `cluster.yaml` of Ray's cluster launcher, and in how a recipe fits its pools: told before anything is started.

Ray's own checks before `ray up` accept half of what is looked for here (benchmarks/cluster.py).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from sevenfold.doctor import fit, machines, security
from sevenfold.errors import InputError
from sevenfold.recipe import Recipe

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PROVIDERS = ("aws", "azure", "gcp", "local", "external", "vsphere", "aliyun", "spark", "readonly", "kuberay")
PROVIDER_KEYS = {  # of aws
    "type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group", "key_pair",
    "aws_credentials", "cloudwatch", "disable_launch_config_check", "disable_node_updaters", "foreground_node_launch",
    "worker_liveness_check", "worker_rpc_drain", "endpoint_url",
}  # fmt: skip
RESOURCES = ("CPU", "GPU", "memory", "object_store_memory", "TPU")
Config = Mapping[str, Any]
Finding = tuple[str, str]  # where in the file; what was found, what was expected, what to do


def read(path: str) -> Config:
    """Raises InputError where it is no YAML of a cluster."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a cluster.yaml, found no file") from None
    except yaml.YAMLError as e:
        raise InputError(f"{path}: expected YAML: {' '.join(str(e).split())}") from None
    if not isinstance(found, dict) or not isinstance(found.get("available_node_types"), dict):
        raise InputError(f"{path}: expected a cluster.yaml with available_node_types, found none")
    return found


def findings(config: Config, recipe: Recipe | None = None) -> list[Finding]:
    """All mistakes, in the file's order of sections."""
    config = copy.deepcopy(dict(config))
    found = [*_top(config), *_provider(config), *_docker(config), *_head(config)]
    for name, kind in config["available_node_types"].items():
        found += _node_type(f"available_node_types.{name}", name, kind if isinstance(kind, dict) else {}, config)
    for part in (security.access, security.commands, security.mounts, security.secrets):
        found += part(config)
    if recipe is not None:
        found += fit.fit(config, recipe)
    if not found:
        found += _rays_own(config)
    return found


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f": did you mean {close[0]}?" if close else ""


def _top(config: Config) -> Iterator[Finding]:
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    for key in config:
        if key in ("min_workers", "initial_workers", "head_node", "worker_nodes"):
            yield key, "found here, where Ray ignores it since node types: put it into available_node_types.NAME"
        elif key.endswith("_commands") and not isinstance(config[key], list):
            yield key, f"expected a list of commands, found {config[key]!r}"
        elif key not in schema["properties"]:
            yield key, f"no such setting{_near(key, schema['properties'])}"
    if not NAME.fullmatch(str(config.get("cluster_name", ""))):
        yield (
            "cluster_name",
            f"expected letters, digits, - and _ (it goes into shell commands), found {config.get('cluster_name')!r}",
        )
    most = config.get("max_workers", 2)
    if type(most) is not int or most < 0:
        yield "max_workers", f"expected a whole number from 0, found {most!r}"
        return
    least = sum(
        t.get("min_workers", 0) for t in config["available_node_types"].values() if isinstance(t.get("min_workers", 0), int)
    )
    if least > most:
        yield "max_workers", f"expected at least the sum of all min_workers, {least}, found {most}"
    for key, default in (("idle_timeout_minutes", 5), ("upscaling_speed", 1.0)):
        if not isinstance(value := config.get(key, default), int | float) or value < 0 or (key[0] == "i" and not value):
            yield key, f"expected a number above 0, found {value!r}"


def _provider(config: Config) -> Iterator[Finding]:
    provider = config.get("provider") or {}
    kind = provider.get("type")
    if kind not in PROVIDERS:
        yield "provider.type", f"expected one of {', '.join(PROVIDERS)}, found {kind!r}{_near(str(kind), PROVIDERS)}"
    elif kind == "aws":
        for key in provider:
            if key not in PROVIDER_KEYS:
                yield f"provider.{key}", f"no such setting{_near(key, PROVIDER_KEYS)}"
        if "region" not in provider:
            yield "provider.region", "expected a region, as us-west-2, found none"
        elif not str(provider.get("availability_zone", provider["region"])).startswith(provider["region"]):
            yield "provider.availability_zone", f"expected zones of {provider['region']}, found {provider['availability_zone']}"


def _docker(config: Config) -> Iterator[Finding]:
    docker, kinds = config.get("docker") or {}, config["available_node_types"]
    own = {f"available_node_types.{n}.docker": (t or {}).get("docker") or {} for n, t in kinds.items()}
    for where, part in {"docker": docker, **own}.items():
        for key in ("image", "head_image", "worker_image"):
            image = part.get(key)
            if image and "@sha256:" not in image:
                why = "a tag can be another one tomorrow"
                yield f"{where}.{key}", f"expected it by digest (name@sha256:...), found {image}: {why}"
    without = [n for n, t in kinds.items() if n != config.get("head_node_type") and not (t.get("resources") or {}).get("GPU")]
    for key in ("run_options", "worker_run_options"):
        if without and "--gpus" in " ".join(map(str, docker.get(key) or [])):
            yield (
                f"docker.{key}",
                (
                    f"--gpus: Docker starts no container with it on the machines of {', '.join(without)}, which have no GPU: "
                    "put it into available_node_types.NAME.docker.worker_run_options of those that have"
                ),
            )
    if docker and not NAME.fullmatch(str(docker.get("container_name", ""))):
        yield "docker.container_name", f"expected letters, digits, - and _, found {docker.get('container_name')!r}"


def _head(config: Config) -> Iterator[Finding]:
    name, kinds = config.get("head_node_type"), config["available_node_types"]
    if name not in kinds:
        yield "head_node_type", f"expected one of {', '.join(kinds)}, found {name!r}{_near(str(name), kinds)}"
        return
    where, head = f"available_node_types.{name}", kinds[name]
    for what in ("CPU", "GPU"):
        if (head.get("resources") or {}).get(what) != 0:
            yield f"{where}.resources.{what}", "expected 0: work on the head can end the whole cluster; give it a pool"
    if head.get("max_workers", 0) != 0:
        yield f"{where}.max_workers", f"expected 0: others of its kind take no work either, found {head['max_workers']}"
    if ((head.get("node_config") or {}).get("InstanceMarketOptions") or {}).get("MarketType") == "spot":
        yield f"{where}.node_config.InstanceMarketOptions", "found spot: its loss ends the cluster; take it on demand"


def _node_type(where: str, name: str, kind: Config, config: Config) -> Iterator[Finding]:
    if not NAME.fullmatch(str(name)):
        yield where, "expected letters, digits, - and _ in a name (it goes into shell commands)"
    known = ("resources", "node_config", "min_workers", "max_workers", "labels", "docker", "worker_setup_commands",
             "initialization_commands", "idle_timeout_s", "priority")  # fmt: skip
    for key in kind:
        if key not in known:
            yield f"{where}.{key}", f"no such setting{_near(key, known)}"
    least, most = kind.get("min_workers", 0), kind.get("max_workers", config.get("max_workers", 2))
    if type(least) is not int or type(most) is not int or least < 0 or most < 0:
        yield (
            f"{where}.min_workers",
            f"expected whole numbers from 0 here and for max_workers, found {least!r} and {most!r}",
        )
    elif least > most:
        yield f"{where}.min_workers", f"expected at most max_workers, {most}, found {least}"
    elif not most and config.get("head_node_type") in config["available_node_types"].keys() - {name}:
        yield f"{where}.max_workers", "found 0: no machine of this kind is ever started"
    resources = kind.get("resources") or {}
    for key, value in resources.items():
        if key not in RESOURCES and (near := _near(key, RESOURCES)):
            yield f"{where}.resources.{key}", f"Ray schedules by CPU and GPU{near}"
        elif type(value) is not int or value < 0:
            yield f"{where}.resources.{key}", f"expected a whole number from 0, found {value!r}"
    if (config.get("provider") or {}).get("type") == "aws":
        yield from _machine(where, name, kind, resources, config)


def _machine(where: str, name: str, kind: Config, resources: Config, config: Config) -> Iterator[Finding]:
    node = kind.get("node_config") or {}
    instance = node.get("InstanceType")
    if not instance:
        yield f"{where}.node_config.InstanceType", "expected an instance type, as m6i.8xlarge, found none"
    yield from _as_aws_reads(f"{where}.node_config", node)
    has = machines.of(str(instance))
    if has is None or name == config.get("head_node_type"):
        return
    for what, most in zip(("GPU", "CPU"), has, strict=True):
        said = resources.get(what, most)
        if isinstance(said, int) and (said > most or (what == "GPU" and said != most)):
            yield f"{where}.resources.{what}", f"expected {most}, what a {instance} has, found {said}"


def _as_aws_reads(where: str, node: Config) -> Iterator[Finding]:
    """Against EC2's own description of RunInstances, where botocore is installed (Ray needs it for AWS)."""
    try:
        import botocore.validate
    except ImportError:
        return
    shape = _run_instances()
    for key, value in node.items():
        if key not in shape.members:
            yield f"{where}.{key}", f"no such setting of a machine{_near(key, shape.members)}"
            continue
        report = botocore.validate.ParamValidator().validate({key: value, "MinCount": 1, "MaxCount": 1}, shape)
        if report.has_errors():
            yield f"{where}.{key}", " ".join(report.generate_report().split())
    for at, value in (("InstanceType", node.get("InstanceType")), ("MarketType", _market(node))):
        known = shape.members["InstanceType"].enum if at == "InstanceType" else _markets(shape)
        if value is not None and value not in known:
            yield f"{where}.{at}", f"AWS knows no {value!r}{_near(str(value), known)}"


@functools.cache
def _run_instances() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _market(node: Config) -> Any:
    return (node.get("InstanceMarketOptions") or {}).get("MarketType")


def _markets(shape: Any) -> list[str]:
    return list(shape.members["InstanceMarketOptions"].members["MarketType"].enum)


def _rays_own(config: Config) -> Iterator[Finding]:
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as e:
        yield "cluster.yaml", f"Ray's own check: {(str(e).strip() or type(e).__name__).splitlines()[0][:200]}"
    finally:
        logging.disable(logging.NOTSET)
