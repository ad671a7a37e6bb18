"""Who could get in by a cluster.yaml, and what it gives away."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

WORLD = ("0.0.0.0/0", "::/0")
SECRETS = (
    re.compile(r"\bA(?:KIA|SIA)[0-9A-Z]{16}\b"),
    re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|sk-|xox[bp]-)[A-Za-z0-9_-]{16,}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    re.compile(r"(?i)\b[A-Z0-9_]*(?:secret|password|passwd|token|api_?key)[A-Z0-9_]*\s*[=:]\s*[\"']?[^\s$\"'{~/]{3,}"),
)


def access(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    provider, kinds = config.get("provider") or {}, config["available_node_types"]
    if provider.get("type") != "aws":
        return
    group = provider.get("security_group") or {}
    for rule in group.get("IpPermissions") or []:
        open_to = [r.get("CidrIp") or r.get("CidrIpv6") for r in (rule.get("IpRanges") or []) + (rule.get("Ipv6Ranges") or [])]
        if set(open_to) & set(WORLD):
            ports = f"{rule.get('FromPort')}-{rule.get('ToPort')}"
            what = (
                "SSH" if rule.get("FromPort") == 22 else "the dashboard" if rule.get("FromPort") == 8265 else f"ports {ports}"
            )
            yield "provider.security_group.IpPermissions", f"{what} open to the world: give your own address, as 203.0.113.7/32"
    own = all("SecurityGroupIds" in (t.get("node_config") or {}) for t in kinds.values())
    if not own and "GroupName" not in group:
        yield (
            "provider.security_group",
            "expected a GroupName of your own: the group that Ray makes opens SSH to the world",
        )
    profiles = {n: (t.get("node_config") or {}).get("IamInstanceProfile") for n, t in kinds.items()}
    head = config.get("head_node_type")
    if head in profiles and not profiles[head]:
        yield (
            f"available_node_types.{head}.node_config.IamInstanceProfile",
            "expected a profile of your own: the one that Ray makes has FullAccess to EC2 and S3",
        )
    for where, text in _strings(config):
        if "FullAccess" in text or "ray-autoscaler-v1" in text:
            yield where, f"found {text!r}: name the actions and the bucket that are needed (platform/deploy/aws.yaml)"


def commands(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    starts = {k: " ".join(config.get(k) or []) for k in ("head_start_ray_commands", "worker_start_ray_commands")}
    head = starts["head_start_ray_commands"]
    if "ray start" not in head or "--head" not in head:
        yield "head_start_ray_commands", "expected `ray start --head ...`, found none"
    elif "--autoscaling-config" not in head:
        yield "head_start_ray_commands", "expected --autoscaling-config=~/ray_bootstrap_config.yaml: without it nothing scales"
    if re.search(r"--dashboard-host[= ](?:0\.0\.0\.0|::)", head):
        yield "head_start_ray_commands", "the dashboard open to all that reach the head: --dashboard-host=127.0.0.1"
    if "--ray-client-server-port" in head:
        yield "head_start_ray_commands", "Ray Client opens a door to any code: jobs go in by `ray job submit`"
    for where, line in starts.items():
        if "ray start" in line and "RAY_AUTH_MODE=token" not in line:
            yield where, "expected RAY_AUTH_MODE=token before `ray start`: else whoever reaches a port may run what they like"
    workers = starts["worker_start_ray_commands"]
    if "ray start" not in workers or "$RAY_HEAD_IP" not in workers:
        yield "worker_start_ray_commands", "expected `ray start --address=$RAY_HEAD_IP:6379`, found none"


def mounts(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for to, given in (config.get("file_mounts") or {}).items():
        if not os.path.exists(os.path.expanduser(str(given))):
            yield f"file_mounts.{to}", f"expected a file or folder of this machine, found none at {given}"


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _strings(v, f"{where}.{k}" if where else str(k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _strings(v, f"{where}[{i}]")
    elif isinstance(value, str):
        yield where, value


def secrets(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for where, text in _strings(config):
        if any(s.search(text) for s in SECRETS):
            yield (
                where,
                "a secret, for all who read the file or the head's logs: use an instance role, or mount a file",
            )
