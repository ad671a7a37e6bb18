"""What is told of a cluster.yaml, of manifests, of a machine, before anything is started."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import cluster as benchmark

from sevenfold.doctor import cluster_file, machines
from sevenfold.recipe import parse

TOLD = {  # by a word of what is said, that it is said of the mistake
    "a setting misspelt": "did you mean idle_timeout_minutes",
    "min_workers in the legacy place": "put it into available_node_types",
    "instance type misspelt": "did you mean p4d.24xlarge",
    "market misspelt": "did you mean spot",
    "provider unknown": "did you mean aws",
    "more GPUs than the instance has": "expected 8, what a p4d.24xlarge has, found 16",
    "GPUs for GPU": "did you mean GPU",
    "image by tag": "by digest",
    "spot head": "its loss ends the cluster",
    "SSH open to the world": "SSH open to the world",
    "a FullAccess policy": "name the actions",
    "an AWS key in a command": "a secret",
}


def test_the_projects_own_files_have_no_mistake() -> None:
    assert cluster_file.findings(benchmark.good(), parse(benchmark.RECIPE, benchmark.POOLS)) == []
    assert not benchmark.rays(benchmark.good())


@pytest.mark.parametrize("name", benchmark.MISTAKES)
def test_a_mistake_is_told(name: str) -> None:
    config = benchmark.good()
    benchmark.MISTAKES[name](config)
    found = cluster_file.findings(config)
    assert found and TOLD.get(name, "") in " ".join(said for _, said in found)


@pytest.mark.parametrize("name", benchmark.UNFIT)
def test_a_recipe_that_does_not_fit_is_told(name: str) -> None:
    assert cluster_file.findings(benchmark.good(), parse(benchmark.RECIPE, [*benchmark.POOLS, *benchmark.UNFIT[name]]))


def test_what_machines_have() -> None:
    assert machines.of("m6i.8xlarge") == (0, 32) and machines.of("c7g.large") == (0, 2) and machines.of("r6i.xlarge") == (0, 4)
    assert machines.of("p4d.24xlarge") == (8, 96) and machines.of("x2iedn.metal") is None


def doctor(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sevenfold.cli", "doctor", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_the_doctor_speaks(tmp_path: Path) -> None:
    config = benchmark.good()
    config["head_node_type"] = "hed"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    done = doctor("--cluster", str(tmp_path / "c.yaml"))
    assert done.returncode == 2 and "well: this machine: " in done.stdout
    assert "c.yaml: head_node_type: expected one of head, data, train, train_spot, found 'hed': did you mean head?" in (
        " ".join(done.stdout.split())
    )
    assert doctor("--cluster", str(tmp_path / "none.yaml")).stderr.startswith("error: ")
    assert "expected a cluster.yaml" in doctor("--cluster", "jobs/recipes/classify.yaml").stderr


def documents(name: str) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all((ROOT / "platform/deploy" / name).read_text()) if d]


def test_the_manifests_say_what_cluster_yaml_says() -> None:
    (made,) = documents("kuberay-cluster.yaml")
    spec, config = made["spec"], cluster_file.read(str(ROOT / "cluster.yaml"))
    version = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert version is not None and spec["rayVersion"] == version[1]
    pools = {g["groupName"].replace("-", "_"): g for g in spec["workerGroupSpecs"]}
    assert pools.keys() == config["available_node_types"].keys() - {config["head_node_type"]}
    for name, pool in pools.items():
        theirs = config["available_node_types"][name]
        assert pool["labels"] == theirs["labels"]
        assert (pool["minReplicas"], pool["maxReplicas"]) == (theirs["min_workers"], theirs["max_workers"])
        (container,) = pool["template"]["spec"]["containers"]
        assert container["resources"]["limits"].get("nvidia.com/gpu", "0") == str(theirs["resources"].get("GPU", 0))
        assert "@sha256:" in container["image"]
        assert container["securityContext"]["runAsUser"] == 1000  # the Dockerfile's
        assert not pool["template"]["spec"]["automountServiceAccountToken"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}


FIELDS = {  # of KubeRay 1.7's reference of its ray.io/v1 API, transcribed: there is no package of the schema to check by
    "RayCluster": "upgradeStrategy authOptions suspend managedBy autoscalerOptions headServiceAnnotations "
    "enableInTreeAutoscaling gcsFaultToleranceOptions historyServerOptions networkPolicy tlsOptions headGroupSpec rayVersion "
    "workerGroupSpecs",
    "authOptions": "enableK8sTokenAuth secretName mode",
    "autoscalerOptions": "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode version env envFrom "
    "volumeMounts command args",
    "headGroupSpec": "template headService enableIngress ingressOptions resources labels rayStartParams serviceType",
    "workerGroupSpecs": "suspend groupName replicas minReplicas maxReplicas idleTimeoutSeconds priority resources labels "
    "rayStartParams template scaleStrategy numOfHosts",
    "RayJob": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector submitterConfig "
    "managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus "
    "entrypointNumGpus ttlSecondsAfterFinished preRunningDeadlineSeconds shutdownAfterJobFinishes suspend",
}


@pytest.mark.parametrize("name", ["kuberay-cluster.yaml", "kuberay-job.yaml"])
def test_kuberay_knows_each_field_of_the_manifests(name: str) -> None:
    (made,) = documents(name)
    assert made["apiVersion"] == "ray.io/v1" and made.keys() == {"apiVersion", "kind", "metadata", "spec"}
    parts = [(made["kind"], made["spec"])]
    for key, value in made["spec"].items():
        parts += [(key, v) for v in (value if isinstance(value, list) else [value]) if key in FIELDS]
    for kind, part in parts:
        assert part.keys() <= set(FIELDS[kind].split()), kind
        if "template" in part:  # what the operator refuses: no container; labels in another place; a restart policy
            pod = part["template"]["spec"]
            assert len(pod["containers"]) == 1 and pod["restartPolicy"] == "Never"
            assert "labels" not in part["rayStartParams"] and all(type(v) is str for v in part["rayStartParams"].values())


def test_the_image_is_what_its_users_take_it_for() -> None:
    lines = (ROOT / "platform/deploy/Dockerfile").read_text().splitlines()
    env = dict(pair.split("=", 1) for line in lines if line.startswith("ENV ") for pair in line.split()[1:])
    (made,) = re.findall(r"useradd --create-home --uid 1000 (\w+)", "\n".join(lines))
    # Ray mounts files below HOME as the image's environment has it, or below /root; the reader of the token is the user
    assert env["HOME"] == f"/home/{made}" and f"USER {made}" in lines
    for word in ("rsync", "constraints.txt", "wget"):  # `ray up` and KubeRay's probes need the first and the last
        assert any(word in line for line in lines if not line.startswith("#"))


def test_the_job_of_the_manifest_is_one() -> None:
    (made,) = documents("kuberay-job.yaml")
    script, recipe, *words = made["spec"]["entrypoint"].replace("\\ ", "\0").split()
    assert script.startswith("python") and made["spec"]["clusterSelector"] == {"ray.io/cluster": "sevenfold"}
    path = words[0].replace("/opt/sevenfold/", "") if words[0].endswith(".yaml") else ""
    assert (ROOT / recipe.replace("/opt/sevenfold/", "")).exists() and (ROOT / path).exists()
    found = parse(str(ROOT / path), [w.replace("\0", " ") for w in words[1:]])
    assert found.cluster.data_labels == {"pool": "data"} and found.storage == "s3://my-bucket"


class _Tagged(yaml.SafeLoader):
    """CloudFormation's !Ref, !Sub, !GetAtt, as what they are given."""


_Tagged.add_multi_constructor("!", lambda loader, _, node: loader.construct_scalar(node))


def test_the_stack_opens_nothing_and_allows_little() -> None:
    stack = yaml.load((ROOT / "platform/deploy/aws.yaml").read_text(), _Tagged)
    rules = stack["Resources"]["Group"]["Properties"]["SecurityGroupIngress"]
    assert [(r["FromPort"], r["CidrIp"]) for r in rules] == [(22, "MyAddress")]
    assert not re.fullmatch(stack["Parameters"]["MyAddress"]["AllowedPattern"], "0.0.0.0/0")
    actions = re.findall(r'"((?:s3|ec2|iam):[A-Za-z*]+)"', (ROOT / "platform/deploy/aws.yaml").read_text())
    assert actions and not any("*" in a for a in actions)
    named = cluster_file.read(str(ROOT / "cluster.yaml"))
    profiles = {t["node_config"]["IamInstanceProfile"]["Name"] for t in named["available_node_types"].values()}
    made = {r["Properties"].get("InstanceProfileName") for r in stack["Resources"].values()}
    assert (
        profiles <= made
        and named["provider"]["security_group"]["GroupName"] == stack["Resources"]["Group"]["Properties"]["GroupName"]
    )
