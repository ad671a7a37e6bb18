"""Mistakes in a cluster.yaml that are told before `ray up` starts anything: `sevenfold doctor` against Ray's own checks.

    python benchmarks/cluster.py [--quick] [--json FILE]

Claim `mistakes_caught`: of common mistakes, each made by one edit of the project's cluster.yaml, how many are told. The file
itself must have none, by both.
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

from sevenfold.doctor import cluster_file
from sevenfold.recipe import parse

ROOT = Path(__file__).resolve().parents[1]
RECIPE, POOLS = str(ROOT / "jobs/recipes/llama-7b.yaml"), ["cluster.data_labels={pool: data}"]
Edit = Callable[[dict[str, Any]], Any]
START = "ray start --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"


def kind(config: dict[str, Any], name: str = "train") -> dict[str, Any]:
    found: dict[str, Any] = config["available_node_types"][name]
    return found


def ssh(config: dict[str, Any], port: int) -> None:
    rule = {"FromPort": port, "ToPort": port, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    config["provider"]["security_group"]["IpPermissions"] = [rule]


MISTAKES: dict[str, Edit] = {
    "a setting misspelt": lambda c: c.update(idle_timeout_minute=c.pop("idle_timeout_minutes")),
    "min_workers in the legacy place": lambda c: c.update(min_workers=3),
    "a pool's setting misspelt": lambda c: kind(c).update(max_worker=3),
    "instance type missing": lambda c: kind(c)["node_config"].pop("InstanceType"),
    "instance type misspelt": lambda c: kind(c)["node_config"].update(InstanceType="p4d.24xlrge"),
    "a machine's setting misspelt": lambda c: kind(c)["node_config"].update(InstanceTyp="p4d.24xlarge"),
    "a machine's setting of another type": lambda c: kind(c)["node_config"].update(BlockDeviceMappings="200 GB"),
    "provider unknown": lambda c: c["provider"].update(type="awz"),
    "provider's setting misspelt": lambda c: c["provider"].update(availabilty_zone="us-west-2a"),
    "zone of another region": lambda c: c["provider"].update(availability_zone="us-east-1a"),
    "market misspelt": lambda c: kind(c, "train_spot")["node_config"].update(InstanceMarketOptions={"MarketType": "spt"}),
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
    "workers that do not join": lambda c: c.update(worker_start_ray_commands=["RAY_AUTH_MODE=token ray start"]),
    "head_node_type unknown": lambda c: c.update(head_node_type="hed"),
    "head that takes work": lambda c: kind(c, "head")["resources"].update(CPU=8),
    "spot head": lambda c: kind(c, "head")["node_config"].update(InstanceMarketOptions={"MarketType": "spot"}),
    "image by tag": lambda c: c["docker"].update(image="registry.example.com/sevenfold:latest"),
    "a pool's image by tag": lambda c: kind(c)["docker"].update(worker_image="registry.example.com/sevenfold:latest"),
    "GPUs asked for where there are none": lambda c: c["docker"].update(worker_run_options=["--gpus all"]),
    "container without a name": lambda c: c["docker"].pop("container_name"),
    "dashboard open": lambda c: c.update(head_start_ray_commands=["RAY_AUTH_MODE=token " + START.replace("127.0.0.1", "::")]),
    "dashboard's port open to the world": lambda c: ssh(c, 8265),
    "SSH open to the world": lambda c: ssh(c, 22),
    "Ray's own security group": lambda c: c["provider"].pop("security_group"),
    "Ray's own role": lambda c: kind(c, "head")["node_config"].pop("IamInstanceProfile"),
    "a FullAccess policy": lambda c: c.update(
        setup_commands=["aws iam attach-role-policy --policy-arn arn:aws:iam::aws:policy/AmazonS3FullAccess --role-name r"]
    ),
    "no token asked for": lambda c: c.update(head_start_ray_commands=[START]),
    "a mount that is not there": lambda c: c.update(file_mounts={"/app": "/no/such/folder"}),
    "shell characters in the name": lambda c: c.update(cluster_name="a b; rm -rf /"),
    "shell characters in a pool's name": lambda c: c["available_node_types"].update({"gpu$(id)": kind(c)}),
    "an AWS key in a command": lambda c: c.update(setup_commands=["export AWS_SECRET_ACCESS_KEY=abcdefghijklmnop"]),
    "a hub's token in a command": lambda c: c.update(setup_commands=["huggingface-cli login --token hf_" + "a1B2" * 8]),
    "commands as text": lambda c: c.update(setup_commands="pip install x"),
    "idle time below 0": lambda c: c.update(idle_timeout_minutes=-3),
}
# of the file and a recipe together; edits of the recipe
UNFIT: dict[str, list[str]] = {
    "a GPU pool that the recipe cannot fill": ["cluster.num_workers=4"],
    "a GPU pool that no worker uses": ["cluster.gpus_per_worker=0"],
    "pools that cannot hold the recipe": ["cluster.num_workers=512", "data.lanes=512"],
    "CPUs a worker that leave GPUs alone": ["cluster.cpus_per_worker=20"],
    "data tasks on GPU machines": ["cluster.data_labels={}"],
    "a label that no pool has": ["cluster.data_labels={pool: dta}"],
}
TOO_FEW: Edit = lambda c: kind(c, "data").update(max_workers=1, resources={"CPU": 1})  # noqa: E731


def good() -> dict[str, Any]:
    """The project's, its mounts left out: they are of the person's own machine."""
    config = cluster_file.read(str(ROOT / "cluster.yaml"))
    config.pop("file_mounts")
    return config


def rays(config: dict[str, Any]) -> bool:
    """Whether Ray's own checks refuse it."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            validate_config(prepare_config(copy.deepcopy(config)))
    except BaseException:
        return True
    finally:
        logging.disable(logging.NOTSET)
    return False


def table() -> list[tuple[str, list[cluster_file.Finding], bool]]:
    """Of each mistake: ours, and whether Ray tells it."""
    out = []
    for name, edit in MISTAKES.items():
        config = good()
        edit(config)
        out.append((name, cluster_file.findings(config), rays(config)))
    for name, words in UNFIT.items():
        out.append((name, cluster_file.findings(good(), parse(RECIPE, [*POOLS, *words])), rays(good())))
    few = good()
    TOO_FEW(few)
    out.append(("too few CPUs to feed the GPUs", cluster_file.findings(few, parse(RECIPE, POOLS)), rays(few)))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    recipe = parse(RECIPE, POOLS)
    if wrong := cluster_file.findings(good(), recipe) or rays(good()):
        print(f"cluster.yaml itself: {wrong}")
        return 1
    found = table()
    rows = [(name, f"{ours[0][0]}: {ours[0][1]}"[:96] if ours else "-", "told" if ray else "-") for name, ours, ray in found]
    measure.show("a mistake in cluster.yaml", ("mistake", "sevenfold doctor", "Ray"), rows)
    ours, others = sum(bool(o) for _, o, _ in found) / len(found), sum(r for *_, r in found) / len(found)
    print(f"{len(found)} mistakes: {ours:.0%} told by sevenfold doctor, {others:.0%} by Ray's own checks")
    return 0 if measure.report([measure.claim("mistakes_caught", ours, None, 1.0)], a.json) else 1


if __name__ == "__main__":
    sys.exit(main())
