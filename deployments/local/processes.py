"""Processes named so that a recycled process id is never mistaken for them."""

import contextlib
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class ProcessId:
    """A process id with its start time (clock ticks since boot) and the boot it belongs to."""

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> "ProcessId | None":
        """The identity of the process that has ``pid`` now, None if there is none."""
        try:
            # Field 22; the command name in field 2 may hold spaces and brackets.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]), boot_id())

    def alive(self) -> bool:
        """Whether this very process runs still."""
        return ProcessId.of(self.pid) == self

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if this very process runs still."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                psutil.Process(self.pid).send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Whether the process is gone within ``seconds``."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        return True


def boot_id() -> str:
    """Changes at every boot, so that start times of different boots are never compared."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def open_listeners(pid: int) -> list[str]:
    """`address:port (process)` of each TCP socket of a process's descendants that listens beyond the loopback."""
    found = set()
    for member in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            for socket in member.net_connections("tcp"):
                address = socket.laddr.ip.removeprefix("::ffff:")
                if socket.status == psutil.CONN_LISTEN and not (address.startswith("127.") or address == "::1"):
                    found.add(f"{address}:{socket.laddr.port} ({member.name()})")
    return sorted(found)
