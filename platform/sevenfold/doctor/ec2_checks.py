"""Checks of a node type's machine on AWS: its resources, and its settings against EC2's API."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from sevenfold.cluster.cluster_file import Config
from sevenfold.cluster.hardware import machine_size
from sevenfold.doctor.finding import Finding, did_you_mean


def check_machine(setting: str, node_type: Config, is_head: bool) -> Iterator[Finding]:
    """Checks a node type's `node_config`, and its resources against the instance's size.

    The resources of the head are not checked here: they must be 0.
    """
    node_config = node_type.get("node_config") or {}
    instance_type = node_config.get("InstanceType")
    if not instance_type:
        yield Finding(
            f"{setting}.node_config.InstanceType",
            "expected an instance type, such as m6i.8xlarge, found none",
        )
    yield from _check_api(f"{setting}.node_config", node_config)
    size = machine_size(str(instance_type))
    if size is None or is_head:
        return
    resources = node_type.get("resources") or {}
    gpus, vcpus = size
    gpu_amount, cpu_amount = resources.get("GPU", gpus), resources.get("CPU", vcpus)
    if isinstance(gpu_amount, int) and gpu_amount != gpus:
        yield Finding(
            f"{setting}.resources.GPU",
            f"expected {gpus}, the number of GPUs of {instance_type}, found {gpu_amount}",
        )
    if isinstance(cpu_amount, int) and cpu_amount > vcpus:
        yield Finding(
            f"{setting}.resources.CPU",
            f"expected at most {vcpus}, the number of vCPUs of {instance_type}, found {cpu_amount}",
        )


def market_type(node_config: Config) -> Any:
    """Returns the market of an instance, such as spot; None if it is on demand."""
    return (node_config.get("InstanceMarketOptions") or {}).get("MarketType")


def _check_api(setting: str, node_config: Config) -> Iterator[Finding]:
    """Checks the settings against EC2's description of RunInstances.

    Skipped if botocore, which Ray needs for AWS, is not installed.
    """
    try:
        import botocore.validate
    except ImportError:
        return
    shape = _run_instances_shape()
    for key, value in node_config.items():
        if key not in shape.members:
            yield Finding(
                f"{setting}.{key}",
                f"unknown setting of EC2's RunInstances{did_you_mean(key, shape.members)}",
            )
            continue
        report = botocore.validate.ParamValidator().validate(
            {key: value, "MinCount": 1, "MaxCount": 1}, shape
        )
        if report.has_errors():
            yield Finding(f"{setting}.{key}", " ".join(report.generate_report().split()))
    markets = list(shape.members["InstanceMarketOptions"].members["MarketType"].enum)
    for key, value, known in (
        ("InstanceType", node_config.get("InstanceType"), shape.members["InstanceType"].enum),
        ("MarketType", market_type(node_config), markets),
    ):
        if value is not None and value not in known:
            yield Finding(
                f"{setting}.{key}", f"AWS has no {value!r}{did_you_mean(str(value), known)}"
            )


@functools.cache
def _run_instances_shape() -> Any:
    """Returns botocore's model of the parameters of RunInstances."""
    import botocore.session

    service = botocore.session.get_session().get_service_model("ec2")
    return service.operation_model("RunInstances").input_shape
