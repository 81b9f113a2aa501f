"""Prometheus and Grafana on the head node, on its loopback only; commands of cluster/*.yaml.

python -m deployments.cluster.monitoring install | start | stop

A cluster without them serves as well, so what cannot be had is said and is no error.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from dashboards import build
from dashboards.source import Source
from deployments.local.processes import ProcessId

HOME = Path.home() / "monitoring"
CONFIG = Path(__file__).resolve().parents[2] / "cluster" / "prometheus" / "prometheus.yml"
PROMETHEUS = "http://127.0.0.1:9090"
GRAFANA = "http://127.0.0.1:3000"
_CONNECT_S = 15.0


@dataclass(frozen=True)
class Program:
    """A program that comes as one archive: its folder below HOME, its place in there, where it answers."""

    name: str
    version: str
    url: str
    executable: str
    health: str

    def find(self) -> Path | None:
        """The program as installed here, or else as the system has it."""
        own = HOME / self.name / self.executable
        found = str(own) if own.is_file() else shutil.which(Path(self.executable).name)
        return Path(found) if found else None

    def answers(self) -> bool:
        """Whether it runs, by whomever it was started."""
        try:
            return httpx.get(self.health, timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            return False


def programs() -> tuple[Program, Program]:
    """Prometheus and Grafana, in the versions that the rules and the dashboards are for."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    prometheus, grafana = "2.53.4", "11.6.0"
    return (
        Program(
            "prometheus",
            prometheus,
            f"https://github.com/prometheus/prometheus/releases/download/v{prometheus}/"
            f"prometheus-{prometheus}.linux-{machine}.tar.gz",
            "prometheus",
            f"{PROMETHEUS}/-/ready",
        ),
        Program(
            "grafana",
            grafana,
            f"https://dl.grafana.com/oss/release/grafana-{grafana}.linux-{machine}.tar.gz",
            "bin/grafana",
            f"{GRAFANA}/api/health",
        ),
    )


def install(program: Program) -> str:
    """Fetch a program that is not here yet; says what was done, or why not."""
    if found := program.find():
        return f"{program.name}: {found}"
    folder = HOME / program.name
    draft = folder.with_suffix(".new")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with (
            urllib.request.urlopen(program.url, timeout=_CONNECT_S) as answer,
            tarfile.open(fileobj=answer, mode="r|gz") as archive,
        ):
            archive.extractall(draft, filter="data")
        (inner,) = draft.iterdir()
        inner.replace(folder)
        draft.rmdir()
    except (OSError, ValueError, tarfile.TarError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        return f"{program.name}: not installed, the cluster does without ({program.url}: {error})"
    return f"{program.name}: {program.version} in {folder}"


def command(program: Program, executable: Path) -> list[str]:
    """How the program is started; everything that listens is on the loopback."""
    data = HOME / "data" / program.name
    data.mkdir(parents=True, exist_ok=True)
    if program.name == "prometheus":
        options = [f"--config.file={CONFIG}", f"--storage.tsdb.path={data}", "--storage.tsdb.retention.time=15d"]
        return [str(executable), *options, "--web.listen-address=127.0.0.1:9090"]
    build.build(HOME / "dashboards", Source(ray=True), PROMETHEUS)
    home = executable.resolve().parents[1]
    settings = {
        "server.http_addr": "127.0.0.1",
        "paths.data": data,
        "paths.logs": data / "log",
        "paths.provisioning": HOME / "dashboards" / "provisioning",
        "analytics.reporting_enabled": "false",
        "analytics.check_for_updates": "false",
    }
    return [
        str(executable),
        "server",
        "--homepath",
        str(home),
        *(f"cfg:{key}={value}" for key, value in settings.items()),
    ]


def start(program: Program) -> str:
    """Start the program, unless it runs already; says what was done."""
    executable = program.find()
    if program.answers():
        return f"{program.name}: runs already"
    if executable is None:
        return f"{program.name}: not installed"
    arguments = command(program, executable)
    with (HOME / f"{program.name}.log").open("ab") as log:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=HOME
        )
    identity = ProcessId.of(process.pid)
    if identity is not None:
        _record(program).write_text(json.dumps(asdict(identity)))
    return f"{program.name}: started, log {HOME / program.name}.log"


def stop(program: Program) -> str:
    """End what `start` started, and only that."""
    try:
        identity = ProcessId(**json.loads(_record(program).read_text()))
    except (OSError, ValueError, TypeError):
        return f"{program.name}: not started from here"
    identity.signal(signal.SIGTERM)
    gone = identity.wait(15)
    _record(program).unlink(missing_ok=True)
    return f"{program.name}: " + ("stopped" if gone else f"process {identity.pid} does not end")


def _record(program: Program) -> Path:
    return HOME / f"{program.name}.process"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Prometheus and Grafana on this node.")
    parser.add_argument("action", choices=["install", "start", "stop"])
    action = {"install": install, "start": start, "stop": stop}[parser.parse_args().action]
    HOME.mkdir(exist_ok=True)
    os.chdir(HOME)
    for program in programs():
        print(action(program), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
