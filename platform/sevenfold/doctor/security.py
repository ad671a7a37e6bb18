"""Finds security problems in a cluster.yaml: open ports, broad permissions, secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sevenfold.doctor.finding import Finding

WORLD = ("0.0.0.0/0", "::/0")
SECRETS = (
    re.compile(r"\bA(?:KIA|SIA)[0-9A-Z]{16}\b"),
    re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|sk-|xox[bp]-)[A-Za-z0-9_-]{16,}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    re.compile(
        r"(?i)\b[A-Z0-9_]*(?:secret|password|passwd|token|api_?key)[A-Z0-9_]*\s*[=:]\s*"
        r"[\"']?[^\s$\"'{~/]{3,}"
    ),
)
_PORT_NAMES = {22: "SSH", 8265: "the dashboard"}


def access(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Checks who can connect to a cluster on AWS, and what its machines may do there."""
    provider, node_types = config.get("provider") or {}, config["available_node_types"]
    if provider.get("type") != "aws":
        return
    group = provider.get("security_group") or {}
    yield from _check_open_ports(group)
    has_own_groups = all(
        "SecurityGroupIds" in (node_type.get("node_config") or {})
        for node_type in node_types.values()
    )
    if not has_own_groups and "GroupName" not in group:
        yield Finding(
            "provider.security_group",
            "expected the GroupName of a security group of your own: the group that Ray creates "
            "opens SSH to the world",
        )
    head = config.get("head_node_type")
    if head in node_types:
        node_config = node_types[head].get("node_config") or {}
        if not node_config.get("IamInstanceProfile"):
            yield Finding(
                f"available_node_types.{head}.node_config.IamInstanceProfile",
                "expected an instance profile of your own: the one that Ray creates has FullAccess "
                "to EC2 and S3",
            )
    for setting, text in _strings(config):
        if "FullAccess" in text or "ray-autoscaler-v1" in text:
            yield Finding(
                setting,
                f"found {text!r}: name the actions and the bucket that are needed "
                "(platform/deploy/aws.yaml)",
            )


def _check_open_ports(security_group: Mapping[str, Any]) -> Iterator[Finding]:
    for rule in security_group.get("IpPermissions") or []:
        ranges = (rule.get("IpRanges") or []) + (rule.get("Ipv6Ranges") or [])
        sources = {entry.get("CidrIp") or entry.get("CidrIpv6") for entry in ranges}
        if not sources & set(WORLD):
            continue
        ports = f"ports {rule.get('FromPort')}-{rule.get('ToPort')}"
        name = _PORT_NAMES.get(rule.get("FromPort"), ports)
        yield Finding(
            "provider.security_group.IpPermissions",
            f"open to the world: {name}; allow your own address only, such as 203.0.113.7/32",
        )


def commands(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Checks the `ray start` commands: they must form a cluster, scale, and ask for a token."""
    start_commands = {
        key: " ".join(config.get(key) or [])
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
    }
    head = start_commands["head_start_ray_commands"]
    if "ray start" not in head or "--head" not in head:
        yield Finding("head_start_ray_commands", "expected `ray start --head ...`, found none")
    elif "--autoscaling-config" not in head:
        yield Finding(
            "head_start_ray_commands",
            "expected --autoscaling-config=~/ray_bootstrap_config.yaml: without it the cluster "
            "does not scale",
        )
    if re.search(r"--dashboard-host[= ](?:0\.0\.0\.0|::)", head):
        yield Finding(
            "head_start_ray_commands",
            "the dashboard is open to everyone who can connect to the head: use "
            "--dashboard-host=127.0.0.1",
        )
    if "--ray-client-server-port" in head:
        yield Finding(
            "head_start_ray_commands",
            "found --ray-client-server-port: Ray Client lets anyone who can connect run code; "
            "remove it and submit jobs with `ray job submit`",
        )
    for key, command in start_commands.items():
        if "ray start" in command and "RAY_AUTH_MODE=token" not in command:
            yield Finding(
                key,
                "expected RAY_AUTH_MODE=token before `ray start`: without it anyone who can "
                "connect to a port can run code",
            )
    workers = start_commands["worker_start_ray_commands"]
    if "ray start" not in workers or "$RAY_HEAD_IP" not in workers:
        yield Finding(
            "worker_start_ray_commands",
            "expected `ray start --address=$RAY_HEAD_IP:6379`, found none",
        )


def mounts(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Checks that the files to mount exist on this machine."""
    for target, source in (config.get("file_mounts") or {}).items():
        if not os.path.exists(os.path.expanduser(str(source))):
            yield Finding(
                f"file_mounts.{target}",
                f"expected a file or folder on this machine, found none at {source}",
            )


def secrets(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Checks that no text of the file looks like a key, a token or a password."""
    for setting, text in _strings(config):
        if any(pattern.search(text) for pattern in SECRETS):
            yield Finding(
                setting,
                "found a secret, which everyone who reads the file or the head's logs can see: "
                "use an instance role, or mount a file",
            )


def _strings(value: Any, setting: str = "") -> Iterator[tuple[str, str]]:
    """Yields each text in a parsed YAML file with the path of its setting."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{setting}.{key}" if setting else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{setting}[{index}]")
    elif isinstance(value, str):
        yield setting, value
