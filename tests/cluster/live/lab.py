"""Hosts on one machine: each has its own network, mounts, names, processes, shared memory, and SSH server.

To be used inside a network, mount and process namespace of its own (`run.py` makes it): a bridge joins the hosts, the
namespace itself is the outside world, and all of it ends with the namespace's first process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]
NETWORK = "10.77.0"
OUTSIDE = f"{NETWORK}.1"
HEAD = f"{NETWORK}.10"
MODEL = "gemma3-recall"
_START_S = 90.0

# $1 disk, $2 address, $3 name, $4 Python, $5 settings of sshd.  /root is this machine's with changes of its own, which
# stay when the host is killed; pid 1 reaps orphans and ends with its standard input.
_BOOT = """
set -eu
mount --make-rprivate /
hostname "$3"
mkdir -p "$1/work"
first=; [ -d "$1/upper" ] || first=yes
mkdir -p "$1/upper"
mount -t overlay overlay -o lowerdir=/root,upperdir="$1/upper",workdir="$1/work" /root
[ -z "$first" ] || rm -rf /root/.ray
mkdir -p /tmp/ray "$1/ray"
chmod 1777 "$1/ray"
mount --bind "$1/ray" /tmp/ray
mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
printf '127.0.0.1 localhost\\n%s %s\\n' "$2" "$3" > "$1/hosts"
mount --bind "$1/hosts" /etc/hosts
while ! ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip addr add "$2/24" dev eth0
ip link set eth0 up
exec "$4" -m deployments.local.init /usr/sbin/sshd -D -e -f "$5"
"""


def run(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True, capture_output=True, text=True)


@dataclass
class Host:
    """One host: its name, address, and the process outside that everything in it descends from."""

    name: str
    address: str
    process: subprocess.Popen[bytes]

    @property
    def card(self) -> str:
        """Hardware address of its network card, the same after every boot."""
        return "02:00:" + ":".join(f"{int(part):02x}" for part in self.address.split("."))

    @property
    def cable(self) -> str:
        """The bridge's end of its cable."""
        return f"to-{self.name}"

    def processes(self, word: str = "") -> list[psutil.Process]:
        """What runs on it with `word` in its title, seen from outside."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if word in " ".join([process.name(), *process.cmdline()]):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self) -> None:
        """Take its power away."""
        self.process.kill()
        self.process.wait()


@dataclass
class Lab:
    """Some hosts and the key that opens them."""

    folder: Path
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def workers(self) -> list[str]:
        """Addresses of all hosts but the head."""
        return [host.address for host in self.hosts.values() if host.address != HEAD]

    @property
    def key(self) -> Path:
        """Private SSH key."""
        return self.folder / "key"

    def start(self, workers: int) -> None:
        """Build the network, start a head and some workers."""
        names = {"head": HEAD} | {f"worker-{n}": f"{NETWORK}.{10 + n}" for n in range(1, workers + 1)}
        disks = self.folder / "disks"
        disks.mkdir()
        run("mount", "-t", "tmpfs", "tmpfs", str(disks))
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "lan", "type", "bridge")
        run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "lan")
        run("ip", "link", "set", "lan", "up")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        for name, address in names.items():
            self.hosts[name] = self._start_host(name, address)
        for host in self.hosts.values():
            self._wait(host)

    def boot(self, name: str) -> None:
        """Give a host that was killed its power back: same name, address and disk."""
        subprocess.run(["ip", "link", "del", self.hosts[name].cable], capture_output=True, check=False)
        self.hosts[name] = self._start_host(name, self.hosts[name].address)
        self._wait(self.hosts[name])

    def cut(self, name: str) -> None:
        """Take a host off the network without a word: what is sent to it or from it vanishes."""
        # Otherwise nobody would answer who has the address, and senders would be told after three seconds.
        for host in self.hosts.values():
            for other in self.hosts.values():
                known = [other.address, "lladdr", other.card, "dev", "eth0", "nud", "permanent"]
                self._inside(host, "ip", "neigh", "replace", *known)
        run("ip", "link", "set", self.hosts[name].cable, "nomaster")

    def mend(self, name: str) -> None:
        """Put a host back on the network."""
        run("ip", "link", "set", self.hosts[name].cable, "master", "lan")

    def _inside(self, host: Host, *command: str) -> str:
        first = host.processes()[0].pid
        inside = ["nsenter", "-t", str(first), "--net", "--mount", *command]
        return subprocess.run(inside, check=True, capture_output=True, text=True).stdout

    def _start_host(self, name: str, address: str) -> Host:
        folder = self.folder / name
        disk = self.folder / "disks" / name
        for path in (folder, disk):
            path.mkdir(exist_ok=True)
        (folder / "hostkey").unlink(missing_ok=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "hostkey"))
        authorized = folder / "authorized_keys"
        authorized.write_text(self.key.with_suffix(".pub").read_text())
        authorized.chmod(0o600)
        settings = {
            "ListenAddress": f"{address}:22",
            "HostKey": folder / "hostkey",
            "AuthorizedKeysFile": authorized,
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "UsePAM": "no",
            "StrictModes": "no",
            "PidFile": "none",
            "MaxStartups": "50:30:100",
        }
        config = folder / "sshd_config"
        config.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        unshare = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        boot = ["sh", "-c", _BOOT, "sh", str(disk), address, name, sys.executable, str(config)]
        with (folder / "console.log").open("wb") as console:
            process = subprocess.Popen(
                [*unshare, *boot], stdin=subprocess.PIPE, stdout=console, stderr=subprocess.STDOUT, cwd=ROOT
            )
        host = Host(name, address, process)
        own = Path("/proc/self/ns/net").readlink()
        self._until(lambda: Path(f"/proc/{process.pid}/ns/net").readlink() != own, host, "has no network of its own")
        inner = ["name", "eth0", "address", host.card, "netns", str(process.pid)]
        run("ip", "link", "add", host.cable, "type", "veth", "peer", *inner)
        run("ip", "link", "set", host.cable, "master", "lan", "up")
        return host

    def _wait(self, host: Host) -> None:
        self._until(lambda: self.ssh(host.name, "true").returncode == 0, host, "does not answer by SSH")

    def _until(self, true: object, host: Host, complaint: str) -> None:
        end = time.monotonic() + _START_S
        while not true():  # type: ignore[operator]
            if time.monotonic() > end or host.process.poll() is not None:
                console = (self.folder / host.name / "console.log").read_text()
                raise RuntimeError(f"{host.name} {complaint}: {console[-2000:]}")
            time.sleep(0.1)

    def ssh(self, name: str, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=5", "BatchMode=yes"]
        flags = [part for option in options for part in ("-o", option)]
        target = f"root@{self.hosts[name].address}"
        return subprocess.run(
            ["ssh", "-q", "-i", str(self.key), *flags, target, command], capture_output=True, text=True, check=False
        )

    def stop(self) -> None:
        """End every host; the network ends with the namespace."""
        for host in self.hosts.values():
            host.kill()


def jenga(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program as a user runs it outside the hosts, with state and Ray's files of its own."""
    outside = lab.folder / "outside"
    outside.mkdir(exist_ok=True)
    own = {"JENGA_STATE_DIR": str(outside / "run"), "RAY_TMPDIR": str(outside), "TMPDIR": str(outside)}
    return subprocess.run(
        [str(Path(sys.executable).parent / "jenga"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        env=os.environ | own | {"COLUMNS": "160"},
        check=False,
    )
