"""Hosts on one machine: each has its own network, mounts, names, processes, shared memory, and SSH server.

To be used inside a network, mount and process namespace of its own (`run.py` makes it): a bridge joins the hosts, the
namespace itself is the outside world, and all of it ends with the namespace's first process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NETWORK = "10.77.0"
OUTSIDE = f"{NETWORK}.1"
_START_S = 20.0

# $1 folder, $2 address, $3 name, $4 Python, $5 settings of sshd.  /root is this machine's with changes of its own;
# pid 1 reaps orphans and ends with its standard input.
_BOOT = """
set -eu
mount --make-rprivate /
hostname "$3"
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay overlay -o lowerdir=/root,upperdir="$1/upper",workdir="$1/work" /root
rm -rf /root/.ray
mkdir -p /tmp/ray
mount -t tmpfs -o mode=1777 tmpfs /tmp/ray
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
    def cable(self) -> str:
        """The bridge's end of its cable."""
        return f"to-{self.name}"

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
    def key(self) -> Path:
        """Private SSH key."""
        return self.folder / "key"

    def start(self, names: dict[str, int]) -> None:
        """Build the network and start hosts, by the last number of their addresses."""
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "lan", "type", "bridge")
        run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "lan")
        run("ip", "link", "set", "lan", "up")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        for name, number in names.items():
            self.hosts[name] = self._start_host(name, f"{NETWORK}.{number}")
        for host in self.hosts.values():
            self._wait(host)

    def _start_host(self, name: str, address: str) -> Host:
        folder = self.folder / name
        (folder / "private").mkdir(parents=True)
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
        boot = ["sh", "-c", _BOOT, "sh", str(folder / "private"), address, name, sys.executable, str(config)]
        with (folder / "console.log").open("wb") as console:
            process = subprocess.Popen(
                [*unshare, *boot], stdin=subprocess.PIPE, stdout=console, stderr=subprocess.STDOUT, cwd=ROOT
            )
        host = Host(name, address, process)
        own = Path("/proc/self/ns/net").readlink()
        self._until(lambda: Path(f"/proc/{process.pid}/ns/net").readlink() != own, host, "has no network of its own")
        run("ip", "link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
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
