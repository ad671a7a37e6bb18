"""The project's cluster.yaml, really brought up: `ray up`, a job, pools that come and go, a lost machine, `ray down`."""

import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rig
import yaml
from conftest import ROOT

import sevenfold
from sevenfold.doctor import cluster_file

TOKEN = "0123456789abcdef" * 3
AWS = " ".join(f"{k}={v}" for k, v in rig.CREDENTIALS.items())
SMALL = "--object-store-memory=150000000"
STEPS = 120


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rig.Cloud]:
    if why := rig.missing():
        pytest.skip(f"no cloud of fake machines here: {why}")
    root = tmp_path_factory.mktemp("cloud")
    prefixes = [Path(sys.prefix), Path(sysconfig.get_config_var("prefix")), ROOT, Path(sevenfold.__file__).parents[1], root]
    shared = [p for p in dict.fromkeys(prefixes) if str(p).startswith(("/tmp/", "/root/"))]
    with rig.cloud(root / "hosts", shared) as made:
        yield made


def adapted(cloud: rig.Cloud) -> dict[str, Any]:
    """cluster.yaml with what a cloud of fake machines needs changed: no containers, no image of a machine, addresses within."""
    config = cluster_file.read(str(ROOT / "cluster.yaml"))
    ec2, iam = cloud.client("ec2"), cloud.client("iam")
    ec2.import_key_pair(KeyName="mini", PublicKeyMaterial=Path(f"{cloud.key}.pub").read_bytes())
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="sevenfold", Description="x", VpcId=vpc)["GroupId"]
    ec2.authorize_security_group_ingress(GroupId=group, IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp=f"{rig.LAPTOP}/32")
    for name in ("sevenfold-head", "sevenfold-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    del config["docker"]
    config["idle_timeout_minutes"] = 1
    config["provider"]["use_internal_ips"] = True
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(cloud.key)}
    for pool in config["available_node_types"].values():
        pool["node_config"] = {**pool["node_config"], "ImageId": "ami-785db401", "KeyName": "mini"}
    config["file_mounts"] = {"/root/.ray/auth_token": str(cloud.folder / "token")}
    (cloud.folder / "token").write_text(TOKEN)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[key] = [f"{AWS} {c} {SMALL}" if "ray start" in c else c for c in config[key]]
    return config


def until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    begin = time.monotonic()
    while not (found := holds()):
        assert time.monotonic() - begin < seconds, what
        time.sleep(1)
    return found


@pytest.mark.slow
def test_up_work_loss_idle_down(cloud: rig.Cloud, tree: dict[str, Any]) -> None:
    begin = time.monotonic()

    def at(what: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {what}", flush=True)

    file = cloud.folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(adapted(cloud), sort_keys=False))
    env = {**rig.CREDENTIALS, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}

    def laptop(*words: str, fails: bool = False) -> str:
        done = cloud.inside("laptop", *words, **env)
        assert fails or done.returncode == 0, f"{words}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    laptop("ray", "up", "-y", "--no-config-cache", str(file))
    (head,) = cloud.instances
    address = cloud.instances[head][0]
    at("the head is up, alone")

    home = cloud.folder / "home"
    work = cloud.folder / "work"
    work.mkdir()
    pools = {"worker_labels": {"pool": "train"}, "data_labels": {"pool": "data"}}
    tree["train"] |= {"steps": STEPS}
    tree |= {"checkpoint": {"every": 10}, "cluster": {"num_workers": 2, "cpus_per_worker": 90, **pools}}
    (work / "r.yaml").write_text(yaml.safe_dump(tree))

    def job(name: str) -> list[str]:
        paths = f"PYTHONPATH={ROOT}/platform"
        start = ["env", f"SEVENFOLD_HOME={home}", paths, sys.executable, f"{ROOT}/jobs/pretrain.py", "r.yaml", f"name={name}"]
        return ["ray", "job", "submit", "--no-wait", "--submission-id", name, "--working-dir", str(work), "--", *start]

    # from the head itself: its dashboard is on loopback
    def on_head(*words: str, fails: bool = False) -> str:
        done = cloud.inside(head, *words, **env, RAY_ADDRESS="http://127.0.0.1:8265")
        assert fails or done.returncode == 0, f"{words}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def ended(name: str, seconds: float) -> None:
        until(lambda: (home / f"runs/{name}/summary.json").exists(), seconds, on_head("ray", "job", "logs", name)[-3000:])

    on_head(*job("whole"))
    ended("whole", 500)
    kinds = {kind for _, kind, _ in cloud.seen.values()}
    assert kinds == {"m6i.2xlarge", "m6i.8xlarge", "p4d.24xlarge"}
    at(f"a job has brought {len(cloud.seen) - 1} machines, and ended")
    assert "more nodes" in on_head("ray", "job", "logs", "whole")

    on_head(*job("lost"))
    trained = home / "runs/lost/metrics.jsonl"
    until(lambda: trained.exists() and trained.read_text().count("\n") > 3, 400, on_head("ray", "job", "logs", "lost")[-3000:])
    workers = json.loads((home / "runs/lost/workers.json").read_text())
    hosts = {a: i for i, (a, _, _) in cloud.instances.items()}
    data = [a for a, kind, _ in cloud.instances.values() if kind == "m6i.8xlarge"]
    assert not {w["host"] for w in workers} & {*data, address}  # each on a machine of its pool
    cloud.lose(hosts[workers[-1]["host"]])
    at("a machine of the run is lost")
    ended("lost", 600)
    at("the run has ended")

    def losses(name: str) -> dict[int, float]:
        rows = [json.loads(line) for line in (home / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        return {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}

    assert losses("lost") == losses("whole") and max(losses("lost")) == STEPS
    until(lambda: list(cloud.instances) == [head], 400, f"idle machines stay: {cloud.instances}")
    at("idle machines are gone")
    laptop("ray", "down", "-y", str(file))
    until(lambda: not cloud.instances, 100, f"machines stay: {cloud.instances}")
    at("nothing is left")
