"""A cloud on one Linux machine, for `ray up`: moto answers EC2 and IAM, and each of its instances is a host here, with its own
address, processes, /tmp, /dev/shm and home, by the kernel's namespaces. Run it by `unshared`: nothing of it is left outside."""

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

GATE, LAPTOP = "172.31.255.1", "172.31.254.1"  # within moto's default VPC
BRIDGE, PORT, REGION = "bridge", 5000, "us-west-2"
BIN = Path(sys.executable).parent
PATH = f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = {"ip": "iproute2", "rsync": "rsync", "sshd": "openssh-server", "ssh": "openssh-client"}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": REGION,
    "AWS_ENDPOINT_URL": f"http://{GATE}:{PORT}", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
# what all hosts find at its own place, though /tmp and /root are theirs
KEPT = [p for p in {str(BIN.parent), sys.base_prefix, str(Path(__file__).parents[2])} if p.startswith(("/tmp/", "/root/"))]
OWN = {
    # Ray must not begin a process a core that it is told of
    "RAY_prestart_worker_first_driver": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_maximum_startup_concurrency": "4",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
NEW = ["--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
BOOT = """set -e
hostname {name}
mount --make-rprivate /
for p in {kept}; do mkdir -p {disk}/$p; mount --rbind $p {disk}/$p; done
mount --rbind {disk}/tmp /tmp; mount --rbind {home} /root
for p in {kept}; do case $p in /root/*) mkdir -p $p; mount --rbind {disk}/$p $p;; esac; done
mount -t tmpfs -o size=1g shm /dev/shm; mount -t tmpfs -o size=1m run /run; mkdir -p /run/sshd
echo "127.0.0.1 localhost
{address} {name}" >/tmp/hosts; mount --bind /tmp/hosts /etc/hosts
ssh-keygen -q -t ed25519 -N "" -f /tmp/hostkey
/usr/sbin/sshd -h /tmp/hostkey -o PidFile=none -o UsePAM=no -o StrictModes=no -o PermitRootLogin=yes -o MaxStartups=100
touch {disk}/ready
while :; do sleep 3600 & wait $!; done
"""


def missing() -> str:
    """Why it cannot be set up here; nothing where it can. Installs Debian's packages that it takes."""
    if os.geteuid():
        return "it takes root"
    wanted = [package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)]
    if wanted:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        done = subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *wanted], capture_output=True, text=True
        )
        if done.returncode:
            return f"apt-get install {' '.join(wanted)}: {done.stderr[-200:]}"
    tried = subprocess.run([*unshared(), "ip", "link", "add", "x", "type", "bridge"], capture_output=True)
    return "" if tried.returncode == 0 else f"namespaces are not allowed: {tried.stderr.decode()[-200:]}"


def unshared() -> list[str]:
    """What a command has to begin with: namespaces of its own, all ended with it, and an empty /mnt."""
    made = 'mount --make-rprivate / && mount -t tmpfs mnt /mnt && mount -t tmpfs run /run && ip link set lo up && exec "$@"'
    return ["unshare", "--net", *NEW, "sh", "-c", made, "sh"]


class Cloud:
    """Within `unshared`. Instances boot where moto has them, and lose power where it has not.

    Attributes:
        shared: a folder that all hosts see.
        instances: id -> (address, type, spot) of those that run now.
        seen: all that ever did.
    """

    def __init__(self) -> None:
        self.shared = Path("/mnt/shared")
        self.instances: dict[str, tuple[str, str, bool]] = {}
        self.seen: dict[str, tuple[str, str, bool]] = {}
        self._pids: dict[str, int] = {}
        self._stop = threading.Event()
        self.shared.mkdir()
        for words in (f"add {BRIDGE} type bridge", f"set {BRIDGE} up"):
            run("ip", "link", *words.split())
        run("ip", "addr", "add", f"{GATE}/16", "dev", BRIDGE)
        with open("/mnt/moto.log", "w") as log:
            words = [str(BIN / "moto_server"), "-H", GATE, "-p", str(PORT)]
            self._moto = subprocess.Popen(words, stdout=log, stderr=log)
        self.ec2 = self.client("ec2")
        for _ in range(120):
            with contextlib.suppress(Exception):
                self.ec2.describe_instances()
                break
            time.sleep(0.5)
        self.boot("laptop", LAPTOP, "")
        self._boots = threading.Thread(target=self._follow, daemon=True)
        self._boots.start()

    def client(self, service: str) -> Any:
        return boto3.client(
            service, region_name=REGION, endpoint_url=CREDENTIALS["AWS_ENDPOINT_URL"], aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )  # fmt: skip

    def boot(self, name: str, address: str, key: str) -> None:
        """key: public; who has the private one gets in."""
        disk = Path("/mnt") / name
        home = disk / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        (disk / "tmp").mkdir(mode=0o1777)
        (home / ".ssh/authorized_keys").write_text(key)
        profile = "".join(f"export {k}={v}\n" for k, v in {**CREDENTIALS, **OWN, "PATH": PATH}.items())
        for file in (".bash_profile", ".bashrc"):
            (home / file).write_text(profile)
        device = f"m{name[-8:]}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", device, "master", BRIDGE, "up")
        run("ip", "-n", name, "addr", "add", f"{address}/16", "dev", "eth0")
        for link in ("eth0", "lo"):
            run("ip", "-n", name, "link", "set", link, "up")
        run("ip", "-n", name, "route", "add", "default", "via", GATE)
        kept = " ".join(KEPT)
        (disk / "boot.sh").write_text(BOOT.format(name=name, address=address, home=home, disk=disk, kept=kept))
        with open(disk / "boot.log", "w") as log:
            words = ["ip", "netns", "exec", name, "unshare", *NEW, "bash", str(disk / "boot.sh")]
            process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (disk / "ready").exists():
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError((disk / "boot.log").read_text())
            time.sleep(0.1)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._pids[name] = int(child)

    def start(self, name: str, *words: str, **kwargs: Any) -> subprocess.Popen[str]:
        """Runs words on a host, in a shell as a person has it."""
        enter = ["nsenter", "-t", str(self._pids[name]), "-n", "-m", "-p", "-u", "-i", "env", "-i", "HOME=/root", "TERM=dumb"]
        return subprocess.Popen([*enter, "bash", "-lc", 'exec "$@"', "bash", *words], text=True, **kwargs)

    def inside(self, name: str, *words: str, timeout: float = 400, fails: bool = False) -> str:
        """What the words print on a host. Raises RuntimeError where they fail."""
        process = self.start(name, *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        out, _ = process.communicate(timeout=timeout)
        if process.returncode and not fails:
            raise RuntimeError(f"{name}: {' '.join(words)}: exit {process.returncode}\n{out[-6000:]}")
        return out

    def lose(self, instance: str) -> None:
        """As a cloud takes back a spot machine, without a notice."""
        self._power_off(instance)
        self.ec2.terminate_instances(InstanceIds=[instance])

    def _power_off(self, name: str) -> None:
        os.kill(self._pids.pop(name), signal.SIGKILL)  # the first process of its namespace: all in it end
        for words in (("ip", "link", "del", f"m{name[-8:]}"), ("ip", "netns", "del", name)):
            subprocess.run(words, capture_output=True)

    def _follow(self) -> None:
        while not self._stop.wait(0.5):
            found = [i for r in self.ec2.describe_instances()["Reservations"] for i in r["Instances"]]
            live = {i["InstanceId"]: i for i in found if i["State"]["Name"] in ("pending", "running")}
            for key, i in live.items():
                if key not in self.seen:
                    pairs = self.ec2.describe_key_pairs(KeyNames=[i["KeyName"]], IncludePublicKey=True)["KeyPairs"]
                    self.boot(key, i["PrivateIpAddress"], pairs[0]["PublicKey"])
                    self.seen[key] = (i["PrivateIpAddress"], i["InstanceType"], i.get("InstanceLifecycle") == "spot")
                    self.instances[key] = self.seen[key]
            for key in self.instances.keys() - live.keys():
                del self.instances[key]
                if key in self._pids:
                    self._power_off(key)

    def close(self) -> None:
        self._stop.set()
        self._boots.join(60)
        for name in list(self._pids):
            self._power_off(name)
        self._moto.terminate()
        self._moto.wait(30)


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    try:
        yield made
    finally:
        made.close()
