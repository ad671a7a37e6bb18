"""Compares how many mistakes in a cluster.yaml `sevenfold doctor` and Ray's own checks find.

    python benchmarks/cluster.py [--quick] [--json FILE]

Both check before `ray up` starts anything. Claim `mistakes_caught`: the share of common mistakes,
each made by one edit of the project's cluster.yaml, that `sevenfold doctor` finds. In the file
itself neither may find any.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
from ray.autoscaler._private.util import prepare_config, validate_config

from sevenfold.cluster.cluster_file import read_cluster_file
from sevenfold.doctor.cluster_checks import Finding, find_problems
from sevenfold.recipe import parse

ROOT = Path(__file__).resolve().parents[1]
RECIPE, POOLS = str(ROOT / "jobs/recipes/llama-7b.yaml"), ["cluster.data_labels={pool: data}"]
Edit = Callable[[dict[str, Any]], Any]
START = (
    "ray start --head --port=6379 --dashboard-host=127.0.0.1 "
    "--autoscaling-config=~/ray_bootstrap_config.yaml"
)


def kind(config: dict[str, Any], name: str = "train") -> dict[str, Any]:
    node_type: dict[str, Any] = config["available_node_types"][name]
    return node_type


def ssh(config: dict[str, Any], port: int) -> None:
    rule = {
        "FromPort": port,
        "ToPort": port,
        "IpProtocol": "tcp",
        "IpRanges": [{"CidrIp": "0.0.0.0/0"}],
    }
    config["provider"]["security_group"]["IpPermissions"] = [rule]


MISTAKES: dict[str, Edit] = {
    "a setting misspelt": lambda c: c.update(idle_timeout_minute=c.pop("idle_timeout_minutes")),
    "min_workers in the legacy place": lambda c: c.update(min_workers=3),
    "a pool's setting misspelt": lambda c: kind(c).update(max_worker=3),
    "instance type missing": lambda c: kind(c)["node_config"].pop("InstanceType"),
    "instance type misspelt": lambda c: kind(c)["node_config"].update(InstanceType="p4d.24xlrge"),
    "a machine's setting misspelt": lambda c: kind(c)["node_config"].update(
        InstanceTyp="p4d.24xlarge"
    ),
    "a machine's setting of another type": lambda c: kind(c)["node_config"].update(
        BlockDeviceMappings="200 GB"
    ),
    "provider unknown": lambda c: c["provider"].update(type="awz"),
    "provider's setting misspelt": lambda c: c["provider"].update(availabilty_zone="us-west-2a"),
    "zone of another region": lambda c: c["provider"].update(availability_zone="us-east-1a"),
    "market misspelt": lambda c: kind(c, "train_spot")["node_config"].update(
        InstanceMarketOptions={"MarketType": "spt"}
    ),
    "min above max": lambda c: kind(c).update(min_workers=5, max_workers=2),
    "sum of min above max": lambda c: kind(c).update(min_workers=50, max_workers=60),
    "max_workers a word": lambda c: c.update(max_workers="ten"),
    "a pool that never starts": lambda c: kind(c).update(max_workers=0),
    "more GPUs than the instance has": lambda c: kind(c)["resources"].update(GPU=16),
    "fewer GPUs than the instance has": lambda c: kind(c)["resources"].update(GPU=4),
    "more CPUs than the instance has": lambda c: kind(c, "data")["resources"].update(CPU=64),
    "GPUs for GPU": lambda c: kind(c)["resources"].update(GPUs=kind(c)["resources"].pop("GPU")),
    "resources as text": lambda c: kind(c)["resources"].update(GPU="8"),
    "no autoscaling config on the head": lambda c: c.update(
        head_start_ray_commands=["RAY_AUTH_MODE=token ray start --head --dashboard-host=127.0.0.1"]
    ),
    "workers that do not join": lambda c: c.update(
        worker_start_ray_commands=["RAY_AUTH_MODE=token ray start"]
    ),
    "head_node_type unknown": lambda c: c.update(head_node_type="hed"),
    "head that takes work": lambda c: kind(c, "head")["resources"].update(CPU=8),
    "spot head": lambda c: kind(c, "head")["node_config"].update(
        InstanceMarketOptions={"MarketType": "spot"}
    ),
    "image by tag": lambda c: c["docker"].update(image="registry.example.com/sevenfold:latest"),
    "a pool's image by tag": lambda c: kind(c)["docker"].update(
        worker_image="registry.example.com/sevenfold:latest"
    ),
    "GPUs asked for where there are none": lambda c: c["docker"].update(
        worker_run_options=["--gpus all"]
    ),
    "container without a name": lambda c: c["docker"].pop("container_name"),
    "dashboard open": lambda c: c.update(
        head_start_ray_commands=["RAY_AUTH_MODE=token " + START.replace("127.0.0.1", "::")]
    ),
    "dashboard's port open to the world": lambda c: ssh(c, 8265),
    "SSH open to the world": lambda c: ssh(c, 22),
    "Ray's own security group": lambda c: c["provider"].pop("security_group"),
    "Ray's own role": lambda c: kind(c, "head")["node_config"].pop("IamInstanceProfile"),
    "a FullAccess policy": lambda c: c.update(
        setup_commands=[
            "aws iam attach-role-policy --role-name r "
            "--policy-arn arn:aws:iam::aws:policy/AmazonS3FullAccess"
        ]
    ),
    "no token asked for": lambda c: c.update(head_start_ray_commands=[START]),
    "a mount that is not there": lambda c: c.update(file_mounts={"/app": "/no/such/folder"}),
    "shell characters in the name": lambda c: c.update(cluster_name="a b; rm -rf /"),
    "shell characters in a pool's name": lambda c: c["available_node_types"].update(
        {"gpu$(id)": kind(c)}
    ),
    "an AWS key in a command": lambda c: c.update(
        setup_commands=["export AWS_SECRET_ACCESS_KEY=abcdefghijklmnop"]
    ),
    "a hub's token in a command": lambda c: c.update(
        setup_commands=["huggingface-cli login --token hf_" + "a1B2" * 8]
    ),
    "commands as text": lambda c: c.update(setup_commands="pip install x"),
    "idle time below 0": lambda c: c.update(idle_timeout_minutes=-3),
}
# Mistakes of the file and a recipe together, made by edits of the recipe.
UNFIT: dict[str, list[str]] = {
    "a GPU pool that the recipe cannot fill": ["cluster.num_workers=4"],
    "a GPU pool that no worker uses": ["cluster.gpus_per_worker=0"],
    "pools that cannot hold the recipe": ["cluster.num_workers=512", "data.lanes=512"],
    "CPUs a worker that leave GPUs alone": ["cluster.cpus_per_worker=20"],
    "data tasks on GPU machines": ["cluster.data_labels={}"],
    "a label that no pool has": ["cluster.data_labels={pool: dta}"],
}


def too_few_cpus(config: dict[str, Any]) -> None:
    """Leaves too few CPUs for the tasks that feed the GPUs."""
    kind(config, "data").update(max_workers=1, resources={"CPU": 1})


def project_config() -> dict[str, Any]:
    """Returns the project's cluster.yaml without its mounts, which are the user's own files."""
    config = read_cluster_file(str(ROOT / "cluster.yaml"))
    config.pop("file_mounts")
    return config


def ray_refuses(config: dict[str, Any]) -> bool:
    """Returns whether Ray's own checks refuse a configuration."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            validate_config(prepare_config(copy.deepcopy(config)))
    except BaseException:
        return True
    finally:
        logging.disable(logging.NOTSET)
    return False


def table() -> list[tuple[str, list[Finding], bool]]:
    """Returns for each mistake its name, our findings, and whether Ray finds it."""
    results = []
    for name, edit in MISTAKES.items():
        config = project_config()
        edit(config)
        results.append((name, find_problems(config), ray_refuses(config)))
    for name, words in UNFIT.items():
        results.append(
            (
                name,
                find_problems(project_config(), parse(RECIPE, [*POOLS, *words])),
                ray_refuses(project_config()),
            )
        )
    few = project_config()
    too_few_cpus(few)
    results.append(
        (
            "too few CPUs to feed the GPUs",
            find_problems(few, parse(RECIPE, POOLS)),
            ray_refuses(few),
        )
    )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="no difference: it takes seconds")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    recipe = parse(RECIPE, POOLS)
    if mistakes := find_problems(project_config(), recipe) or ray_refuses(project_config()):
        print(f"cluster.yaml itself has mistakes: {mistakes}")
        return 1
    results = table()
    rows = [
        (name, f"{ours[0][0]}: {ours[0][1]}"[:96] if ours else "-", "found" if ray else "-")
        for name, ours, ray in results
    ]
    measure.show("a mistake in cluster.yaml", ("mistake", "sevenfold doctor", "Ray"), rows)
    ours = sum(bool(o) for _, o, _ in results) / len(results)
    rays_share = sum(r for *_, r in results) / len(results)
    print(
        f"{len(results)} mistakes: sevenfold doctor finds {ours:.0%}, Ray's own checks "
        f"{rays_share:.0%}"
    )
    return 0 if measure.report([measure.claim("mistakes_caught", ours, None, 1.0)], a.json) else 1


if __name__ == "__main__":
    sys.exit(main())
