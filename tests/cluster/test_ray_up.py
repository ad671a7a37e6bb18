"""The project's cluster.yaml, really brought up: `ray up`, a job, pools that come and go, a lost machine, `ray down`."""

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

from sevenfold.doctor import cluster_file

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
DATA, TRAIN = "m6i.8xlarge", "p4d.24xlarge"
DOOR = ["env", "RAY_ADDRESS=http://127.0.0.1:8265", "RAY_AUTH_MODE=token"]


@pytest.mark.nightly
@pytest.mark.timeout(2000)
def test_up_work_loss_idle_down() -> None:
    if why := rig.missing():
        pytest.skip(f"NO CLOUD OF FAKE MACHINES HERE, ray up IS NOT TESTED: {why}")
    words = [*rig.unshared(), "env", f"PYTHONPATH={ROOT / 'platform'}", sys.executable, __file__]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:]
    assert done.stdout.rstrip().endswith("nothing is left")


def adapted(cloud: rig.Cloud) -> dict[str, Any]:
    """cluster.yaml, with what fake machines need changed: no containers, root, addresses within, little memory, less patience.
    What it names is made as platform/deploy/aws.yaml makes it."""
    config = cluster_file.read(str(ROOT / "cluster.yaml"))
    iam, vpc = cloud.client("iam"), cloud.ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = cloud.ec2.create_security_group(GroupName="sevenfold", Description="x", VpcId=vpc)["GroupId"]
    cloud.ec2.authorize_security_group_ingress(
        GroupId=group, IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp=f"{rig.LAPTOP}/32"
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
        config[key] = [f"{c} --object-store-memory=150000000" if "ray start" in c else c for c in config[key]]
    return config


class Transcript:
    """Says when what was seen, seconds from its beginning."""

    def __init__(self) -> None:
        self.begin = time.monotonic()

    def __call__(self, what: str) -> None:
        print(f"{time.monotonic() - self.begin:6.0f} s  {what}", flush=True)

    def until(self, holds: Callable[[], Any], seconds: float, what: str, pace: float = 0.5) -> Any:
        """What `holds` gives as soon as that is something."""
        end = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < end, f"not within {seconds} s: {what}"
            time.sleep(pace)
        self(what)
        return found


def up(cloud: rig.Cloud, say: Transcript) -> str:
    """Brings the head up from the laptop, as the README has it. Returns its instance."""
    file = cloud.shared / "cluster.yaml"
    file.write_text(yaml.safe_dump(adapted(cloud), sort_keys=False))
    cloud.inside("laptop", "sh", "-c", "ray get-auth-token --generate >/dev/null")
    cloud.inside("laptop", "ray", "up", "-y", "--no-config-cache", str(file))
    (head,) = cloud.instances
    say(f"ray up: the head {cloud.instances[head][0]} ({cloud.instances[head][1]}) is there, alone")
    cloud.start("laptop", "ray", "dashboard", str(file), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return head


class Jobs:
    """From the laptop, through SSH, with its token."""

    def __init__(self, cloud: rig.Cloud, say: Transcript):
        self.cloud, self.say = cloud, say
        say.until(lambda: "Traceback" not in self.ask("list", fails=True), 60, "ray dashboard: the head's jobs are listed")

    def ask(self, *words: str, fails: bool = False) -> str:
        return self.cloud.inside("laptop", *DOOR, "ray", "job", *words, fails=fails)

    def submit(self, name: str) -> None:
        pools = ["cluster.worker_labels={pool: train, market: spot}", "cluster.data_labels={pool: data}"]
        less = [f"train.steps={STEPS}", "train.log_every=1", "checkpoint.every=5", f"validation.every={STEPS}"]
        shell = ["sh", "-c", f'cd {ROOT} && exec "$@"', "sh", *DOOR]
        self.cloud.inside(
            "laptop", *shell, "ray", "job", "submit", "--no-wait", "--submission-id", name, "--working-dir", ".", "--",
            "env", f"SEVENFOLD_HOME={self.cloud.shared}", "python", "jobs/pretrain.py", "jobs/recipes/quickstart.yaml",
            f"name={name}", *pools, *less,
        )  # fmt: skip
        self.say(f"ray job submit {name}")

    def until(self, name: str, holds: Callable[[], Any], seconds: float, what: str) -> None:
        """Transcript.until, while the job has not failed."""

        def fine() -> Any:
            found = holds()
            assert found or "failed" not in self.ask("status", name).lower()
            return found

        try:
            self.say.until(fine, seconds, what, pace=5)  # each look is a process that imports Ray
        except AssertionError:
            print(self.ask("logs", name, fails=True)[-6000:], self.cloud.instances, flush=True)
            raise

    def ended(self, name: str) -> None:
        self.until(name, lambda: "succeeded" in self.ask("status", name).lower(), 600, f"{name} has ended")


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}


def workers(run: Path) -> set[str]:
    """Addresses of the machines that trained last."""
    return {w["host"] for w in json.loads((run / "workers.json").read_text())}


def whole(cloud: rig.Cloud, jobs: Jobs, head: str, say: Transcript) -> None:
    """A run that nothing happens to: its demand makes the pools, each task is on its own."""
    jobs.submit("whole")
    there = cloud.instances.values
    jobs.until("whole", lambda: any(kind == DATA for _, kind, _ in there()), 300, "a machine of the pool data has come")
    jobs.until("whole", lambda: any(spot for _, _, spot in there()), 300, "a spot machine of the pool train has come")
    jobs.ended("whole")
    assert {(kind, spot) for _, kind, spot in cloud.seen.values()} == {("m6i.2xlarge", False), (DATA, False), (TRAIN, True)}
    log = jobs.ask("logs", "whole")
    assert "the cluster is asked for more nodes" in log and "starting: 1 train_spot" in log, log[-3000:]
    print(
        "".join(f"            its log: {line}\n" for line in log.splitlines() if line.startswith("waiting")), end="", flush=True
    )
    pools = {address: kind for address, kind, _ in cloud.instances.values()}
    assert {pools[a] for a in workers(cloud.shared / "runs/whole")} == {TRAIN}
    listed = json.loads(cloud.inside(head, *DOOR, "ray", "list", "tasks", "--detail", "--format=json", "--limit=10000"))
    nodes = json.loads(cloud.inside(head, *DOOR, "ray", "list", "nodes", "--format=json"))
    at = {n["node_id"]: n["node_ip"] for n in nodes}
    data = [pools[at[t["node_id"]]] for t in listed if "MapBatches" in t["name"] and t["node_id"]]
    assert data and set(data) == {DATA}
    say(f"all {len(data)} data tasks were on the pool data, all workers on the spot machine")


def lost(cloud: rig.Cloud, jobs: Jobs, say: Transcript) -> None:
    """The same run, but its spot machine is taken away."""
    jobs.submit("lost")
    run, begun = cloud.shared / "runs/lost", set(cloud.seen)
    trained = run / "metrics.jsonl"
    part = STEPS // 3
    jobs.until("lost", lambda: trained.exists() and trained.read_text().count("\n") > part, 300, f"lost is past step {part}")
    (host,) = workers(run)
    (machine,) = [i for i, (address, _, _) in cloud.instances.items() if address == host]
    cloud.lose(machine)
    say(f"the spot machine {host} is taken away at step {max(losses(run))}")
    new = lambda: any(spot for i, (_, _, spot) in cloud.seen.items() if i not in begun)  # noqa: E731
    jobs.until("lost", new, 300, "another one has come")
    jobs.ended("lost")
    assert losses(run) == losses(cloud.shared / "runs/whole") and set(losses(run)) == set(range(1, STEPS + 1))
    log = jobs.ask("logs", "lost")
    assert "going on from step" in log, log[-3000:]
    say(f"all {STEPS} losses are those of the run that lost nothing, to the bit")


def drive() -> None:
    with rig.cloud() as cloud:
        say = Transcript()
        head = up(cloud, say)
        jobs = Jobs(cloud, say)
        without = cloud.inside("laptop", "env", "HOME=/nowhere", DOOR[1], "ray", "job", "list", fails=True)
        assert "authentication" in without.lower(), without
        say("without the token: refused")
        whole(cloud, jobs, head, say)
        lost(cloud, jobs, say)
        say.until(lambda: list(cloud.instances) == [head], 400, "idle machines are gone, the head is alone")
        cloud.inside("laptop", "ray", "down", "-y", str(cloud.shared / "cluster.yaml"))
        say.until(lambda: not cloud.instances, 100, "ray down: no machine is left")
        left = [r for r in cloud.ec2.describe_volumes()["Volumes"] if r["State"] == "in-use"]
        assert not left, left
        say("nothing is left")


if __name__ == "__main__":
    drive()
