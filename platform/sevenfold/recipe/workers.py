"""The sections of a recipe about its workers and how they divide the model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from sevenfold.recipe.section import OrAuto, Section


class Parallel(Section):
    """How the workers divide a model among them. This changes no number beyond rounding.

    Each group of `tensor` workers splits the model's matrices, there are `replicate` whole copies
    of the model, and FSDP shards each copy over num_workers / (tensor * replicate) groups.
    """

    replicate: int = Field(
        1,
        gt=0,
        description="HSDP: number of copies of the model; shards are gathered within one copy",
    )
    tensor: int = Field(
        1,
        gt=0,
        description="Tensor parallelism: number of workers that split each matrix. They read the "
        "same sequences",
    )


class Cluster(Section):
    """The workers of a run and the resources that they need."""

    num_workers: Annotated[int | tuple[int, int], OrAuto()] = Field(
        1,
        description="Number of workers, or [fewest, most]: the run grows and shrinks with the "
        "cluster, while the global batch and the data order stay the same. auto: one per GPU, "
        "else one per machine",
    )
    cpus_per_worker: float = Field(
        1,
        gt=0,
        description="CPUs per worker, and threads that it computes with. Below 1, workers share "
        "cores",
    )
    gpus_per_worker: Annotated[int, OrAuto()] = Field(
        0,
        ge=0,
        le=1,
        description="1: one GPU per worker, with nccl; 0: CPUs, with gloo. auto: 1 if there are "
        "GPUs",
    )
    worker_labels: dict[str, str] = Field(
        {},
        description="Ray labels of the nodes that workers run on, such as {pool: train}. "
        "Default: any node",
    )
    data_labels: dict[str, str] = Field(
        {},
        description="Ray labels of the nodes that Ray Data tasks run on, such as {pool: data}. "
        "Default: any node",
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="Maximum number of worker failures from which the run recovers, by a restart "
        "from its last checkpoint; at the next one it fails",
    )
    resize_seconds: float = Field(
        60,
        gt=0,
        description="If num_workers is a range: seconds between two checks for room for more "
        "workers",
    )
    wait_seconds: float = Field(
        300,
        ge=0,
        description="How many seconds to wait for resources that the cluster has but that others "
        "hold",
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="Peak TFLOP/s of a worker, which MFU is relative to. Default: of a GPU, from "
        "a table; of a CPU, measured",
    )

    @field_validator("num_workers", mode="before")
    @classmethod
    def _check_num_workers(cls, value: Any) -> Any:
        bounds = value if isinstance(value, list | tuple) else (value, value)
        if (
            len(bounds) != 2
            or not all(type(n) is int and n > 0 for n in bounds)
            or bounds[0] > bounds[1]
        ):
            raise ValueError(f"expected a number above 0, [fewest, most] or auto, found {value!r}")
        return tuple(bounds) if bounds is value else value
