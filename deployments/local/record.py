"""The record of a running local deployment: what `jenga stop` and `jenga status` go by."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from deployments.local.processes import ProcessId

NAME = "serve.json"

STATE_DIR = "JENGA_STATE_DIR"
"""Variable with the record's folder; every supervisor has it, so that others find its record."""
SUPERVISOR = "deployments.local.supervisor"
"""Module that a supervisor runs, which its command line names."""
API_KEY = "JENGA_API_KEY"
"""Variable with the key that our own commands present where a deployment asks for keys."""


@dataclass(frozen=True)
class Record:
    """One local deployment.

    supervisor: the process that everything else descends from.
    ray_dir: Ray's temporary folder, removed at the end.
    host, port, dashboard_port, metrics_port: where it listens on this machine.
    isolated: whether Ray has its own network and process namespace.
    started: seconds since the epoch.
    certificate: file with the REST interface's certificate, None without TLS.
    """

    supervisor: ProcessId
    ray_dir: str
    config: str
    application: str
    model: str
    host: str
    port: int
    dashboard_port: int
    metrics_port: int
    isolated: bool
    started: float
    log: str
    certificate: str | None = None

    @property
    def ports(self) -> dict[str, int]:
        """Ports by what listens there."""
        return {"REST": self.port, "dashboard": self.dashboard_port, "metrics": self.metrics_port}

    @property
    def url(self) -> str:
        """Base of the REST interface, as seen from this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"{'https' if self.certificate else 'http'}://{host}:{self.port}"

    @property
    def memory_url(self) -> str:
        """The memory map, if the configuration shows it."""
        return f"{self.url}/memory"

    @property
    def dashboard_url(self) -> str:
        """Base of Ray's dashboard and of Serve's REST API."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def metrics_url(self) -> str:
        """What Prometheus scrapes."""
        return f"http://127.0.0.1:{self.metrics_port}/metrics"


def default_folder() -> Path:
    """Where the record lies: ``$JENGA_STATE_DIR``, or var/run below the working directory."""
    return Path(os.environ.get(STATE_DIR) or "var/run").absolute()


def read(folder: Path) -> Record | None:
    """The record in ``folder``; None if there is none or it cannot be read."""
    try:
        data = json.loads((folder / NAME).read_text())
        return Record(**data | {"supervisor": ProcessId(**data["supervisor"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def elsewhere(folder: Path) -> dict[Path, Record]:
    """Deployments that run on this machine with their record in another folder, as far as this user may see."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if SUPERVISOR not in (process.info["cmdline"] or ()):
            continue
        with contextlib.suppress(psutil.Error, OSError, KeyError):
            other = Path(process.environ()[STATE_DIR])
            running = read(other)
            if other != folder and running is not None and running.supervisor == ProcessId.of(process.pid):
                found[other] = running
    return found


def write(folder: Path, record: Record) -> None:
    """Put the record there, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / (NAME + ".new")
    draft.write_text(json.dumps(asdict(record), indent=1))
    draft.replace(folder / NAME)


def clear(folder: Path, record: Record) -> None:
    """Remove what a stopped deployment leaves: the record and Ray's temporary folder."""
    shutil.rmtree(record.ray_dir, ignore_errors=True)
    (folder / NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; raises BlockingIOError when another `jenga serve` is starting there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "serve.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
