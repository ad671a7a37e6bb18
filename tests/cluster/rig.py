"""A simulated AWS cloud on one Linux machine, for `ray up`.

moto serves the EC2 and IAM APIs. Each of its instances is a simulated host on this machine: Linux
namespaces give it its own address, processes, /tmp, /dev/shm and home. Start the test program with
`isolated_command`, so that nothing remains outside its namespaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3

# Addresses within moto's default VPC.
GATEWAY, LAPTOP = "172.31.255.1", "172.31.254.1"
BRIDGE, PORT, REGION = "bridge", 5000, "us-west-2"
BIN = Path(sys.executable).parent
PATH = f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = {"ip": "iproute2", "rsync": "rsync", "sshd": "openssh-server", "ssh": "openssh-client"}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_ENDPOINT_URL": f"http://{GATEWAY}:{PORT}",
    "AWS_EC2_METADATA_DISABLED": "true",
}
# Folders that every host sees at the same path, although /tmp and /root are its own.
SHARED_FOLDERS = [
    p
    for p in {str(BIN.parent), sys.base_prefix, str(Path(__file__).parents[2])}
    if p.startswith(("/tmp/", "/root/"))
]
RAY_ENVIRONMENT = {
    # Ray must not start one worker process per (logical) CPU of its host.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_maximum_startup_concurrency": "4",
    "OMP_NUM_THREADS": "1",
}
NAMESPACES = ["--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
# The first process of a host: sets up its folders and name, then runs an SSH server.
BOOT = """set -e
hostname {name}
mount --make-rprivate /
for p in {shared}; do mkdir -p {disk}/$p; mount --rbind $p {disk}/$p; done
mount --rbind {disk}/tmp /tmp; mount --rbind {home} /root
for p in {shared}; do case $p in /root/*) mkdir -p $p; mount --rbind {disk}/$p $p;; esac; done
mount -t tmpfs -o size=1g shm /dev/shm; mount -t tmpfs -o size=1m run /run; mkdir -p /run/sshd
echo "127.0.0.1 localhost
{address} {name}" >/tmp/hosts; mount --bind /tmp/hosts /etc/hosts
ssh-keygen -q -t ed25519 -N "" -f /tmp/hostkey
/usr/sbin/sshd -h /tmp/hostkey -o PidFile=none -o UsePAM=no -o StrictModes=no \\
    -o PermitRootLogin=yes -o MaxStartups=100
touch {disk}/ready
while :; do sleep 3600 & wait $!; done
"""


def unavailable_reason() -> str:
    """Returns why the cloud cannot be simulated on this machine, or an empty string if it can.

    Installs the Debian packages that are required.
    """
    if os.geteuid():
        return "root is required"
    packages = [
        package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)
    ]
    if packages:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        install = subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
            capture_output=True,
            text=True,
        )
        if install.returncode:
            return f"apt-get install {' '.join(packages)}: {install.stderr[-200:]}"
    probe = subprocess.run(
        [*isolated_command(), "ip", "link", "add", "x", "type", "bridge"], capture_output=True
    )
    if probe.returncode:
        return f"namespaces are not allowed: {probe.stderr.decode()[-200:]}"
    return ""


def isolated_command() -> list[str]:
    """Returns a prefix that runs a command in new namespaces, which end with it; /mnt is empty."""
    script = (
        "mount --make-rprivate / && mount -t tmpfs mnt /mnt && mount -t tmpfs run /run"
        ' && ip link set lo up && exec "$@"'
    )
    return ["unshare", "--net", *NAMESPACES, "sh", "-c", script, "sh"]


class Cloud:
    """The simulated cloud; its process must run under `isolated_command`.

    A thread starts a host for each instance that moto lists, and ends it when moto no longer does.

    Attributes:
        shared: a folder that all hosts see.
        instances: (address, type, whether it is a spot instance) of each running instance, by ID.
        seen: the same for all instances that were ever started.
        ec2: a boto3 client of the EC2 API.
    """

    def __init__(self) -> None:
        self.shared = Path("/mnt/shared")
        self.instances: dict[str, tuple[str, str, bool]] = {}
        self.seen: dict[str, tuple[str, str, bool]] = {}
        self._pids: dict[str, int] = {}
        self._stop = threading.Event()
        self.shared.mkdir()
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        run("ip", "addr", "add", f"{GATEWAY}/16", "dev", BRIDGE)
        with open("/mnt/moto.log", "w") as log:
            command = [str(BIN / "moto_server"), "-H", GATEWAY, "-p", str(PORT)]
            self._moto = subprocess.Popen(command, stdout=log, stderr=log)
        self.ec2 = self.client("ec2")
        for _ in range(120):
            with contextlib.suppress(Exception):
                self.ec2.describe_instances()
                break
            time.sleep(0.5)
        self.boot("laptop", LAPTOP, "")
        self._follower = threading.Thread(target=self._follow_moto, daemon=True)
        self._follower.start()

    def client(self, service: str) -> Any:
        """Returns a boto3 client of one of moto's services."""
        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=CREDENTIALS["AWS_ENDPOINT_URL"],
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def boot(self, name: str, address: str, key: str) -> None:
        """Starts a host and waits until it runs; `key` is the public SSH key that may log in."""
        disk = Path("/mnt") / name
        home = disk / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        (disk / "tmp").mkdir(mode=0o1777)
        (home / ".ssh/authorized_keys").write_text(key)
        profile = "".join(
            f"export {k}={v}\n" for k, v in {**CREDENTIALS, **RAY_ENVIRONMENT, "PATH": PATH}.items()
        )
        for file in (".bash_profile", ".bashrc"):
            (home / file).write_text(profile)
        device = f"m{name[-8:]}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", device, "master", BRIDGE, "up")
        run("ip", "-n", name, "addr", "add", f"{address}/16", "dev", "eth0")
        for link in ("eth0", "lo"):
            run("ip", "-n", name, "link", "set", link, "up")
        run("ip", "-n", name, "route", "add", "default", "via", GATEWAY)
        shared = " ".join(SHARED_FOLDERS)
        script = disk / "boot.sh"
        script.write_text(
            BOOT.format(name=name, address=address, home=home, disk=disk, shared=shared)
        )
        with open(disk / "boot.log", "w") as log:
            command = ["ip", "netns", "exec", name, "unshare", *NAMESPACES, "bash", str(script)]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (disk / "ready").exists():
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError((disk / "boot.log").read_text())
            time.sleep(0.1)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._pids[name] = int(child)

    def start(self, name: str, *words: str, **kwargs: Any) -> subprocess.Popen[str]:
        """Starts a command on a host, in a login shell with a clean environment."""
        namespaces = ["-n", "-m", "-p", "-u", "-i"]
        enter = ["nsenter", "-t", str(self._pids[name]), *namespaces]
        enter += ["env", "-i", "HOME=/root", "TERM=dumb"]
        return subprocess.Popen(
            [*enter, "bash", "-lc", 'exec "$@"', "bash", *words], text=True, **kwargs
        )

    def run(self, name: str, *words: str, timeout: float = 400, may_fail: bool = False) -> str:
        """Runs a command on a host and returns its output.

        Raises:
            RuntimeError: It failed, and `may_fail` is not set.
        """
        process = self.start(
            name, *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        output, _ = process.communicate(timeout=timeout)
        if process.returncode and not may_fail:
            raise RuntimeError(
                f"{name}: {' '.join(words)}: exit {process.returncode}\n{output[-6000:]}"
            )
        return output

    def preempt(self, instance: str) -> None:
        """Ends an instance without a notice, as a cloud does with spot instances."""
        self._power_off(instance)
        self.ec2.terminate_instances(InstanceIds=[instance])

    def _power_off(self, name: str) -> None:
        # The first process of a PID namespace: the kernel kills all others with it.
        os.kill(self._pids.pop(name), signal.SIGKILL)
        for command in (("ip", "link", "del", f"m{name[-8:]}"), ("ip", "netns", "del", name)):
            subprocess.run(command, capture_output=True)

    def _follow_moto(self) -> None:
        while not self._stop.wait(0.5):
            listed = [
                i for r in self.ec2.describe_instances()["Reservations"] for i in r["Instances"]
            ]
            live = {
                i["InstanceId"]: i for i in listed if i["State"]["Name"] in ("pending", "running")
            }
            for key, i in live.items():
                if key not in self.seen:
                    pairs = self.ec2.describe_key_pairs(
                        KeyNames=[i["KeyName"]], IncludePublicKey=True
                    )["KeyPairs"]
                    self.boot(key, i["PrivateIpAddress"], pairs[0]["PublicKey"])
                    self.seen[key] = (
                        i["PrivateIpAddress"],
                        i["InstanceType"],
                        i.get("InstanceLifecycle") == "spot",
                    )
                    self.instances[key] = self.seen[key]
            for key in self.instances.keys() - live.keys():
                del self.instances[key]
                if key in self._pids:
                    self._power_off(key)

    def close(self) -> None:
        """Ends all hosts and moto."""
        self._stop.set()
        self._follower.join(60)
        for name in list(self._pids):
            self._power_off(name)
        self._moto.terminate()
        self._moto.wait(30)


def run(*words: str) -> None:
    """Runs a command on this machine; raises RuntimeError if it fails."""
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(words)}: {result.stderr.strip()}")


@contextlib.contextmanager
def cloud() -> Iterator[Cloud]:
    """Starts the simulated cloud, and ends it afterwards."""
    simulated = Cloud()
    try:
        yield simulated
    finally:
        simulated.close()
