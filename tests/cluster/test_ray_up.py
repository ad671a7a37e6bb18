"""Brings the project's cluster.yaml up on a simulated cloud.

`ray up`, jobs, worker pools that scale up and down, a preempted spot instance, `ray down`. The test
runs this file as a program (see `main`) in namespaces of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rig
import yaml

from sevenfold.cluster.cluster_file import read_cluster_file

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
DATA, TRAIN = "m6i.8xlarge", "p4d.24xlarge"
RAY_ENV = ["env", "RAY_ADDRESS=http://127.0.0.1:8265", "RAY_AUTH_MODE=token"]


@pytest.mark.nightly
@pytest.mark.timeout(2000)
def test_ray_up_jobs_preemption_idle_and_ray_down() -> None:
    if reason := rig.unavailable_reason():
        pytest.skip(f"THE CLOUD CANNOT BE SIMULATED HERE, ray up IS NOT TESTED: {reason}")
    command = [*rig.isolated_command(), "env", f"PYTHONPATH={ROOT / 'platform'}"]
    command += [sys.executable, __file__]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:]
    assert result.stdout.rstrip().endswith("nothing is left")


def adapted_cluster_file(cloud: rig.Cloud) -> dict[str, Any]:
    """Returns cluster.yaml, adapted to the simulated hosts.

    They have no containers, log in as root, use private addresses, have little memory and a short
    idle timeout. The security group, instance profiles and roles that cluster.yaml names are
    created as platform/deploy/aws.yaml creates them.
    """
    config = read_cluster_file(str(ROOT / "cluster.yaml"))
    iam, vpc = cloud.client("iam"), cloud.ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = cloud.ec2.create_security_group(GroupName="sevenfold", Description="x", VpcId=vpc)
    cloud.ec2.authorize_security_group_ingress(
        GroupId=group["GroupId"],
        IpProtocol="tcp",
        FromPort=22,
        ToPort=22,
        CidrIp=f"{rig.LAPTOP}/32",
    )
    for name in ("sevenfold-head", "sevenfold-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    for part in (config, *config["available_node_types"].values()):
        part.pop("docker", None)
    config["idle_timeout_minutes"] = 1
    config["provider"]["use_internal_ips"] = True
    config["auth"]["ssh_user"] = "root"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[key] = [
            f"{c} --object-store-memory=150000000" if "ray start" in c else c for c in config[key]
        ]
    return config


class Transcript:
    """Prints events with their time in seconds since its start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, event: str) -> None:
        print(f"{time.monotonic() - self.start:6.0f} s  {event}", flush=True)

    def wait(
        self, condition: Callable[[], Any], seconds: float, event: str, interval: float = 0.5
    ) -> Any:
        """Waits until `condition` returns a true value, prints the event and returns the value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not within {seconds} s: {event}"
            time.sleep(interval)
        self(event)
        return value


def ray_up(cloud: rig.Cloud, log: Transcript) -> str:
    """Runs `ray up` on the laptop, as in the README, and returns the head's instance ID."""
    file = cloud.shared / "cluster.yaml"
    file.write_text(yaml.safe_dump(adapted_cluster_file(cloud), sort_keys=False))
    cloud.run("laptop", "sh", "-c", "ray get-auth-token --generate >/dev/null")
    cloud.run("laptop", "ray", "up", "-y", "--no-config-cache", str(file))
    (head,) = cloud.instances
    log(f"ray up: only the head {cloud.instances[head][0]} ({cloud.instances[head][1]}) runs")
    cloud.start(
        "laptop",
        "ray",
        "dashboard",
        str(file),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return head


class Jobs:
    """`ray job ...` on the laptop, through the SSH tunnel of `ray dashboard`, with the token."""

    def __init__(self, cloud: rig.Cloud, log: Transcript):
        self.cloud, self.log = cloud, log
        log.wait(
            lambda: "Traceback" not in self.command("list", may_fail=True),
            60,
            "ray dashboard: the head's jobs are listed",
        )

    def command(self, *words: str, may_fail: bool = False) -> str:
        """Returns the output of `ray job ...`."""
        return self.cloud.run("laptop", *RAY_ENV, "ray", "job", *words, may_fail=may_fail)

    def submit(self, name: str) -> None:
        """Submits a pretraining job with this submission ID and run name."""
        overrides = [
            f"name={name}",
            "cluster.worker_labels={pool: train, market: spot}",
            "cluster.data_labels={pool: data}",
            f"train.steps={STEPS}",
            "train.log_every=1",
            "checkpoint.every=5",
            f"validation.every={STEPS}",
        ]
        shell = ["sh", "-c", f'cd {ROOT} && exec "$@"', "sh", *RAY_ENV]
        submit = ["ray", "job", "submit", "--no-wait", "--submission-id", name]
        job = ["env", f"SEVENFOLD_HOME={self.cloud.shared}", "python", "jobs/pretrain.py"]
        job += ["jobs/recipes/quickstart.yaml", *overrides]
        self.cloud.run("laptop", *shell, *submit, "--working-dir", ".", "--", *job)
        self.log(f"ray job submit {name}")

    def wait(self, name: str, condition: Callable[[], Any], seconds: float, event: str) -> None:
        """Waits for a condition like `Transcript.wait`; fails as soon as the job has failed."""

        def check() -> Any:
            value = condition()
            assert value or "failed" not in self.command("status", name).lower()
            return value

        try:
            # Each check starts a process that imports Ray, hence the long interval.
            self.log.wait(check, seconds, event, interval=5)
        except AssertionError:
            output = self.command("logs", name, may_fail=True)
            print(output[-6000:], self.cloud.instances, flush=True)
            raise

    def wait_for_end(self, name: str) -> None:
        """Waits until the job has succeeded."""
        self.wait(
            name,
            lambda: "succeeded" in self.command("status", name).lower(),
            600,
            f"{name} has ended",
        )


def losses(run: Path) -> dict[int, float]:
    """Returns the training loss of each step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}


def worker_hosts(run: Path) -> set[str]:
    """Returns the addresses of the hosts of the run's most recent workers."""
    return {w["host"] for w in json.loads((run / "workers.json").read_text())}


def check_undisturbed_run(cloud: rig.Cloud, jobs: Jobs, head: str, log: Transcript) -> None:
    """Runs a job without faults: the autoscaler starts the pools; each task runs on its pool."""
    jobs.submit("whole")
    instances = cloud.instances.values
    jobs.wait(
        "whole",
        lambda: any(kind == DATA for _, kind, _ in instances()),
        300,
        "an instance of the pool data has started",
    )
    jobs.wait(
        "whole",
        lambda: any(spot for _, _, spot in instances()),
        300,
        "a spot instance of the pool train has started",
    )
    jobs.wait_for_end("whole")
    assert {(kind, spot) for _, kind, spot in cloud.seen.values()} == {
        ("m6i.2xlarge", False),
        (DATA, False),
        (TRAIN, True),
    }
    output = jobs.command("logs", "whole")
    assert "the autoscaler will add nodes" in output, output[-3000:]
    assert "starting: 1 train_spot" in output, output[-3000:]
    for line in output.splitlines():
        if line.startswith("waiting"):
            print(f"            its log: {line}", flush=True)
    pools = {address: kind for address, kind, _ in cloud.instances.values()}
    assert {pools[a] for a in worker_hosts(cloud.shared / "runs/whole")} == {TRAIN}
    list_tasks = ["ray", "list", "tasks", "--detail", "--format=json", "--limit=10000"]
    tasks = json.loads(cloud.run(head, *RAY_ENV, *list_tasks))
    nodes = json.loads(cloud.run(head, *RAY_ENV, "ray", "list", "nodes", "--format=json"))
    addresses = {n["node_id"]: n["node_ip"] for n in nodes}
    data_pools = [
        pools[addresses[t["node_id"]]] for t in tasks if "MapBatches" in t["name"] and t["node_id"]
    ]
    assert data_pools and set(data_pools) == {DATA}
    log(f"all {len(data_pools)} data tasks ran on the pool data, all workers on the spot instance")


def check_preempted_run(cloud: rig.Cloud, jobs: Jobs, log: Transcript) -> None:
    """Runs the same job and preempts its spot instance: the losses must be identical."""
    jobs.submit("lost")
    run, earlier = cloud.shared / "runs/lost", set(cloud.seen)
    metrics = run / "metrics.jsonl"
    step = STEPS // 3
    jobs.wait(
        "lost",
        lambda: metrics.exists() and metrics.read_text().count("\n") > step,
        300,
        f"lost is past step {step}",
    )
    (host,) = worker_hosts(run)
    (instance,) = [i for i, (address, _, _) in cloud.instances.items() if address == host]
    cloud.preempt(instance)
    log(f"the spot instance {host} is preempted at step {max(losses(run))}")

    def replaced() -> bool:
        return any(spot for i, (_, _, spot) in cloud.seen.items() if i not in earlier)

    jobs.wait("lost", replaced, 300, "another spot instance has started")
    jobs.wait_for_end("lost")
    assert losses(run) == losses(cloud.shared / "runs/whole")
    assert set(losses(run)) == set(range(1, STEPS + 1))
    output = jobs.command("logs", "lost")
    assert "resuming from step" in output, output[-3000:]
    log(f"all {STEPS} losses are bitwise identical to those of the undisturbed run")


def main() -> None:
    """Runs the test within the namespaces of `rig.isolated_command`."""
    with rig.cloud() as cloud:
        log = Transcript()
        head = ray_up(cloud, log)
        jobs = Jobs(cloud, log)
        list_without_token = ["env", "HOME=/nowhere", RAY_ENV[1], "ray", "job", "list"]
        output = cloud.run("laptop", *list_without_token, may_fail=True)
        assert "authentication" in output.lower(), output
        log("without the token: refused")
        check_undisturbed_run(cloud, jobs, head, log)
        check_preempted_run(cloud, jobs, log)
        log.wait(
            lambda: list(cloud.instances) == [head],
            400,
            "idle instances are terminated, only the head runs",
        )
        cloud.run("laptop", "ray", "down", "-y", str(cloud.shared / "cluster.yaml"))
        log.wait(lambda: not cloud.instances, 100, "ray down: no instance is left")
        volumes = [v for v in cloud.ec2.describe_volumes()["Volumes"] if v["State"] == "in-use"]
        assert not volumes, volumes
        log("nothing is left")


if __name__ == "__main__":
    main()
