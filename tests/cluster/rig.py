"""A cloud on one Linux machine, for `ray up`: moto answers EC2's and IAM's questions, and each of its instances is a host here,
with its own address, processes, /tmp, /dev/shm and home, by the kernel's namespaces. Needs root. Nothing leaves the machine."""

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

BRIDGE, GATE, LAPTOP = (
    "sfbr0",
    "172.31.255.1",
    "172.31.254.1",
)  # within moto's default VPC
PORT = 5000
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = {"ip": "iproute2", "rsync": "rsync", "sshd": "openssh-server", "ssh": "openssh-client"}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-west-2",
    "AWS_ENDPOINT_URL": f"http://{GATE}:{PORT}", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
BOOT = """
hostname {name}
mount --make-rprivate /
mkdir -p /mnt/{name}; mount -t tmpfs -o size=1500m tmp /mnt/{name}
for p in {shared}; do
    case $p in /tmp/*) mkdir -p /mnt/{name}/${{p#/tmp/}}; mount --rbind $p /mnt/{name}/${{p#/tmp/}};; esac
done
mount --rbind /mnt/{name} /tmp; chmod 1777 /tmp
mount -t tmpfs -o size=1g shm /dev/shm; mount -t tmpfs -o size=1m run /run; mkdir -p /run/sshd
for p in {shared}; do case $p in /root/*) mkdir -p {home}/${{p#/root/}}; mount --bind $p {home}/${{p#/root/}};; esac; done
mount --rbind {home} /root
ssh-keygen -q -t ed25519 -N "" -f /tmp/hostkey
/usr/sbin/sshd -h /tmp/hostkey -o PidFile=none -o UsePAM=no -o StrictModes=no
touch {home}/ready
while :; do sleep 3600 & wait $!; done
"""


def missing() -> str:
    """Why it cannot be set up here; nothing where it can. Installs Debian's packages that it takes."""
    if os.geteuid():
        return "it takes root"
    wanted = [package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)]
    if wanted:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        done = subprocess.run(["apt-get", "install", "-y", "-qq", *wanted], capture_output=True, text=True)
        if done.returncode:
            return f"apt-get install {' '.join(wanted)}: {done.stderr[-200:]}"
    done = subprocess.run(["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "true"], capture_output=True)
    return "" if done.returncode == 0 else f"namespaces are not allowed: {done.stderr.decode()[-200:]}"


class Cloud:
    """Attributes:
    instances: id -> (address, type, spot) of those that run as hosts now.
    seen: all that ever did.
    """

    def __init__(self, folder: Path, shared: list[Path]):
        """shared: folders that all hosts see, as they lie here."""
        self.folder, self.shared = folder, shared
        self.instances: dict[str, tuple[str, str, bool]] = {}
        self.seen: dict[str, tuple[str, str, bool]] = {}
        self._pids: dict[str, int] = {}
        self._stop = threading.Event()
        folder.mkdir(parents=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{GATE}/16", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        env = {**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
        words = [sys.executable, "-m", "moto.server", "-H", GATE, "-p", str(PORT)]
        with open(folder / "moto.log", "w") as log:
            self._moto = subprocess.Popen(words, env=env, stdout=log, stderr=log)
        for _ in range(120):
            with contextlib.suppress(Exception):
                self.client("ec2").describe_instances()
                break
            time.sleep(0.5)
        self._boots = threading.Thread(target=self._follow, daemon=True)
        self._boots.start()
        self.boot("laptop", LAPTOP)

    @property
    def key(self) -> Path:
        return self.folder / "key"

    def client(self, service: str) -> Any:
        return boto3.client(
            service, region_name="us-west-2", endpoint_url=CREDENTIALS["AWS_ENDPOINT_URL"], aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )  # fmt: skip

    def boot(self, name: str, address: str) -> None:
        home = self.folder / name
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        shutil.copy(f"{self.key}.pub", home / ".ssh/authorized_keys")
        path = f"export PATH={Path(sys.executable).parent}:$PATH\n"
        for profile in (".bash_profile", ".bashrc"):
            (home / profile).write_text(path)
        device = f"sf{name[-8:]}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", device, "master", BRIDGE, "up")
        run("ip", "-n", name, "addr", "add", f"{address}/16", "dev", "eth0")
        for link in ("eth0", "lo"):
            run("ip", "-n", name, "link", "set", link, "up")
        run("ip", "-n", name, "route", "add", "default", "dev", "eth0")
        (home / "boot.sh").write_text(BOOT.format(name=name, home=home, shared=" ".join(map(str, [*self.shared, self.folder]))))
        words = ["ip", "netns", "exec", name, "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc"]
        with open(home / "boot.log", "w") as log:
            process = subprocess.Popen([*words, "bash", str(home / "boot.sh")], stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 30
        while not (home / "ready").exists():
            if time.monotonic() > deadline:
                raise RuntimeError((home / "boot.log").read_text())
            time.sleep(0.1)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._pids[name] = int(child)

    def inside(self, name: str, *words: str, timeout: float = 400, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs words on a host."""
        enter = ["nsenter", "-t", str(self._pids[name]), "-n", "-m", "-p", "-u", "-i"]
        enter += ["env", "-i", "HOME=/root", f"PATH={Path(sys.executable).parent}:{PATH}"]
        whole = [*enter, *(f"{k}={v}" for k, v in env.items()), *words]
        return subprocess.run(whole, capture_output=True, text=True, timeout=timeout)

    def power_off(self, name: str) -> None:
        os.kill(self._pids.pop(name), signal.SIGKILL)  # the first process of its namespace: all in it end
        for words in (("ip", "link", "del", f"sf{name[-8:]}"), ("ip", "netns", "del", name)):
            subprocess.run(words, capture_output=True)

    def lose(self, instance: str) -> None:
        """As a cloud takes back a spot machine without a notice."""
        self.power_off(instance)
        self.client("ec2").terminate_instances(InstanceIds=[instance])

    def _follow(self) -> None:
        """Boots what moto says runs, and powers off what it says does not."""
        ec2 = self.client("ec2")
        while not self._stop.wait(0.5):
            found = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
            live = {i["InstanceId"]: i for i in found if i["State"]["Name"] in ("pending", "running")}
            for key, i in live.items():
                if key not in self.seen:
                    self.seen[key] = (i["PrivateIpAddress"], i["InstanceType"], i.get("InstanceLifecycle") == "spot")
                    self.boot(key, i["PrivateIpAddress"])
                    self.instances[key] = self.seen[key]
            for key in self.instances.keys() - live.keys():
                del self.instances[key]
                if key in self._pids:
                    self.power_off(key)

    def close(self) -> None:
        self._stop.set()
        self._boots.join(60)
        for name in list(self._pids):
            self.power_off(name)
        self._moto.terminate()
        self._moto.wait(30)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def cloud(folder: Path, shared: list[Path]) -> Iterator[Cloud]:
    made = Cloud(folder, shared)
    try:
        yield made
    finally:
        made.close()
