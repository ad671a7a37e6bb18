"""`sevenfold doctor`: checks of cluster.yaml, of the deployment files and of this machine."""

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

from sevenfold.cluster.cluster_file import read_cluster_file
from sevenfold.doctor.cluster_checks import find_problems
from sevenfold.recipe import parse

# Part of the message for some of the mistakes in benchmarks/cluster.py.
MESSAGES = {
    "a setting misspelt": "did you mean idle_timeout_minutes",
    "min_workers in the legacy place": "put it into available_node_types",
    "instance type misspelt": "did you mean p4d.24xlarge",
    "market misspelt": "did you mean spot",
    "provider unknown": "did you mean aws",
    "more GPUs than the instance has": "expected 8, the number of GPUs of p4d.24xlarge, found 16",
    "GPUs for GPU": "did you mean GPU",
    "image by tag": "by digest",
    "spot head": "losing the head ends the cluster",
    "SSH open to the world": "open to the world: SSH",
    "a FullAccess policy": "name the actions",
    "an AWS key in a command": "a secret",
}


def test_own_cluster_file_has_no_mistake() -> None:
    assert find_problems(benchmark.project_config(), parse(benchmark.RECIPE, benchmark.POOLS)) == []
    assert not benchmark.ray_refuses(benchmark.project_config())


@pytest.mark.parametrize("name", benchmark.MISTAKES)
def test_mistake_in_the_cluster_file_is_reported(name: str) -> None:
    config = benchmark.project_config()
    benchmark.MISTAKES[name](config)
    findings = find_problems(config)
    assert findings and MESSAGES.get(name, "") in " ".join(message for _, message in findings)


@pytest.mark.parametrize("name", benchmark.UNFIT)
def test_recipe_that_does_not_fit_the_cluster_is_reported(name: str) -> None:
    assert find_problems(
        benchmark.project_config(),
        parse(benchmark.RECIPE, [*benchmark.POOLS, *benchmark.UNFIT[name]]),
    )


def doctor(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs `sevenfold doctor` in the repository's root."""
    command = [sys.executable, "-m", "sevenfold.cli", "doctor", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_doctor_command(tmp_path: Path) -> None:
    config = benchmark.project_config()
    config["head_node_type"] = "hed"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    result = doctor("--cluster", str(tmp_path / "c.yaml"))
    assert result.returncode == 2 and "OK: this machine: " in result.stdout
    expected = (
        "c.yaml: head_node_type: expected one of head, data, train, train_spot, found 'hed': "
        "did you mean head?"
    )
    assert expected in " ".join(result.stdout.split())
    assert doctor("--cluster", str(tmp_path / "none.yaml")).stderr.startswith("error: ")
    assert "expected a cluster.yaml" in doctor("--cluster", "jobs/recipes/classify.yaml").stderr


def documents(name: str) -> list[dict[str, Any]]:
    """Returns the YAML documents of a file in platform/deploy."""
    return [d for d in yaml.safe_load_all((ROOT / "platform/deploy" / name).read_text()) if d]


def test_node_type_without_settings_is_refused(tmp_path: Path) -> None:
    config = benchmark.project_config()
    config["available_node_types"]["extra"] = None
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    result = doctor("--cluster", str(tmp_path / "c.yaml"))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "available_node_types.extra: expected a mapping" in result.stderr


def test_kuberay_cluster_equals_cluster_yaml() -> None:
    (manifest,) = documents("kuberay-cluster.yaml")
    spec, config = manifest["spec"], read_cluster_file(str(ROOT / "cluster.yaml"))
    version = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert version is not None and spec["rayVersion"] == version[1]
    pools = {g["groupName"].replace("-", "_"): g for g in spec["workerGroupSpecs"]}
    assert pools.keys() == config["available_node_types"].keys() - {config["head_node_type"]}
    for name, pool in pools.items():
        node_type = config["available_node_types"][name]
        assert pool["labels"] == node_type["labels"]
        assert pool["minReplicas"] == node_type["min_workers"]
        assert pool["maxReplicas"] == node_type["max_workers"]
        (container,) = pool["template"]["spec"]["containers"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu", "0")
        assert gpus == str(node_type["resources"].get("GPU", 0))
        assert "@sha256:" in container["image"]
        # The user that the Dockerfile creates.
        assert container["securityContext"]["runAsUser"] == 1000
        assert not pool["template"]["spec"]["automountServiceAccountToken"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}


# The fields of KubeRay 1.7's API ray.io/v1, copied from its reference: no package has the schema.
FIELDS = {
    "RayCluster": "upgradeStrategy authOptions suspend managedBy autoscalerOptions "
    "headServiceAnnotations enableInTreeAutoscaling gcsFaultToleranceOptions historyServerOptions "
    "networkPolicy tlsOptions headGroupSpec rayVersion workerGroupSpecs",
    "authOptions": "enableK8sTokenAuth secretName mode",
    "autoscalerOptions": "resources image imagePullPolicy securityContext idleTimeoutSeconds "
    "upscalingMode version env envFrom volumeMounts command args",
    "headGroupSpec": "template headService enableIngress ingressOptions resources labels "
    "rayStartParams serviceType",
    "workerGroupSpecs": "suspend groupName replicas minReplicas maxReplicas idleTimeoutSeconds "
    "priority resources labels rayStartParams template scaleStrategy numOfHosts",
    "RayJob": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata "
    "clusterSelector submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId "
    "submissionMode entrypointResources entrypointNumCpus entrypointNumGpus "
    "ttlSecondsAfterFinished preRunningDeadlineSeconds shutdownAfterJobFinishes suspend",
}


@pytest.mark.parametrize("name", ["kuberay-cluster.yaml", "kuberay-job.yaml"])
def test_kuberay_has_each_field_of_the_manifests(name: str) -> None:
    (manifest,) = documents(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    parts = [(manifest["kind"], manifest["spec"])]
    for key, value in manifest["spec"].items():
        parts += [
            (key, v) for v in (value if isinstance(value, list) else [value]) if key in FIELDS
        ]
    for kind, part in parts:
        assert part.keys() <= set(FIELDS[kind].split()), kind
        # The operator rejects a pod without a container, labels among rayStartParams and another
        # restart policy.
        if "template" in part:
            pod = part["template"]["spec"]
            assert len(pod["containers"]) == 1 and pod["restartPolicy"] == "Never"
            assert "labels" not in part["rayStartParams"] and all(
                type(v) is str for v in part["rayStartParams"].values()
            )


def test_image_has_the_user_home_and_programs_that_ray_needs() -> None:
    lines = (ROOT / "platform/deploy/Dockerfile").read_text().splitlines()
    env = dict(
        pair.split("=", 1) for line in lines if line.startswith("ENV ") for pair in line.split()[1:]
    )
    (user,) = re.findall(r"useradd --create-home --uid 1000 (\w+)", "\n".join(lines))
    # Ray mounts files below the HOME of the image's environment (/root if it is not set), but the
    # token is read from the user's home: they must be the same.
    assert env["HOME"] == f"/home/{user}" and f"USER {user}" in lines
    # `ray up` needs rsync, KubeRay's probes need wget.
    for word in ("rsync", "constraints.txt", "wget"):
        assert any(word in line for line in lines if not line.startswith("#"))


def test_kuberay_job_has_a_valid_entrypoint() -> None:
    (manifest,) = documents("kuberay-job.yaml")
    # An escaped space belongs to its word.
    entrypoint = manifest["spec"]["entrypoint"].replace("\\ ", "\0")
    program, script, *words = entrypoint.split()
    assert program.startswith("python")
    assert manifest["spec"]["clusterSelector"] == {"ray.io/cluster": "sevenfold"}
    path = words[0].replace("/opt/sevenfold/", "") if words[0].endswith(".yaml") else ""
    assert (ROOT / script.replace("/opt/sevenfold/", "")).exists() and (ROOT / path).exists()
    recipe = parse(str(ROOT / path), [w.replace("\0", " ") for w in words[1:]])
    assert recipe.cluster.data_labels == {"pool": "data"} and recipe.storage == "s3://my-bucket"


class _Tagged(yaml.SafeLoader):
    """Reads CloudFormation's tags (!Ref, !Sub, !GetAtt) as their plain arguments."""


_Tagged.add_multi_constructor("!", lambda loader, _, node: loader.construct_scalar(node))


def test_aws_stack_opens_only_ssh_and_grants_no_wildcard_actions() -> None:
    text = (ROOT / "platform/deploy/aws.yaml").read_text()
    stack = yaml.load(text, _Tagged)
    rules = stack["Resources"]["Group"]["Properties"]["SecurityGroupIngress"]
    assert [(r["FromPort"], r["CidrIp"]) for r in rules] == [(22, "MyAddress")]
    assert not re.fullmatch(stack["Parameters"]["MyAddress"]["AllowedPattern"], "0.0.0.0/0")
    actions = re.findall(r'"((?:s3|ec2|iam):[A-Za-z*]+)"', text)
    assert actions and not any("*" in a for a in actions)
    # The stack creates what cluster.yaml refers to.
    config = read_cluster_file(str(ROOT / "cluster.yaml"))
    profiles = {
        t["node_config"]["IamInstanceProfile"]["Name"]
        for t in config["available_node_types"].values()
    }
    created = {r["Properties"].get("InstanceProfileName") for r in stack["Resources"].values()}
    assert profiles <= created
    group = stack["Resources"]["Group"]["Properties"]["GroupName"]
    assert config["provider"]["security_group"]["GroupName"] == group
