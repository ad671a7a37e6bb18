"""Facts about GPUs and machines from one table, hardware.yaml. Does not need Ray."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_VCPUS = {"large": 2, "xlarge": 4}  # of general-purpose instances; an N-times xlarge has 4 N


@functools.cache
def hardware_table() -> Mapping[str, Any]:
    """Returns the contents of hardware.yaml; the comment at its top documents the fields."""
    table: dict[str, Any] = yaml.safe_load(
        Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8")
    )
    return table


def peak_flops(device_name: str) -> float | None:
    """Returns the peak of a GPU from its data sheet: dense bfloat16 (else float16), in FLOP/s.

    Args:
        device_name: The device's name as torch reports it.

    Returns:
        None if the GPU is not in the table.
    """
    # longest names first: "H100 PCIe" before "H100"
    gpus = sorted(hardware_table()["gpus"].values(), key=lambda gpu: -len(gpu["device"]))
    tflops = next((gpu["tflops"] for gpu in gpus if gpu["device"] in device_name), None)
    return None if tflops is None else 1e12 * float(tflops.get("bfloat16", tflops["float16"]))


def gpu_memory_gib(device_name: str) -> float | None:
    """Returns the memory of a GPU in GiB, of the smallest of its name; None if it is not known."""
    gpus = hardware_table()["gpus"].values()
    return min(
        (float(gpu["memory_gib"]) for gpu in gpus if gpu["device"] in device_name), default=None
    )


def gpus_without_bfloat16() -> set[str]:
    """Returns Ray's names of the GPUs that do not compute in bfloat16."""
    table = hardware_table()
    known = {gpu["device"] for gpu in table["gpus"].values() if "bfloat16" not in gpu["tflops"]}
    return known | set(table["old_gpus"])


def machine_size(instance_type: str) -> tuple[int, int] | None:
    """Returns the numbers of GPUs and vCPUs of an AWS instance type; None if it is not known."""
    table = hardware_table()
    if machine := table["machines"].get(instance_type):
        return machine["gpus"], machine["vcpus"]
    if instance_type in table["other_machines"]:
        gpus, vcpus = table["other_machines"][instance_type]
        return gpus, vcpus
    general_purpose = re.fullmatch(r"[cmr]\d[a-z]*\.(?:(\d+)x|x)?large", instance_type)
    if not general_purpose:
        return None
    if general_purpose[1]:
        return 0, 4 * int(general_purpose[1])
    return 0, _VCPUS[instance_type.partition(".")[2]]
