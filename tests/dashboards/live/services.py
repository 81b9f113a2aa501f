"""The demo's replicas behind `jenga serve`, and a Prometheus in their network namespace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from dashboards.build import RULES
from deployments.local.ports import free_ports
from deployments.local.record import Record, read

ROOT = Path(__file__).resolve().parents[3]
JENGA = str(Path(sys.executable).parent / "jenga")
PROMETHEUS = "http://127.0.0.1:9090"
NEEDED = {"prometheus": "prometheus", "promtool": "prometheus", "npm": "npm", "chromium": "chromium"}


def require_programs() -> None:
    """Fails, with the packages' names, if something is not installed."""
    missing = sorted({package for program, package in NEEDED.items() if shutil.which(program) is None})
    assert not missing, f"make test-dashboards needs: apt-get install {' '.join(missing)}"


@dataclass(frozen=True)
class Serving:
    """A deployment of two replicas, in its own namespaces."""

    state: Path
    record: Record

    def inside(self, *command: str) -> list[str]:
        """A command that runs in the deployment's network."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self.record.supervisor.pid), "--net", *user, "--", *command]

    def check(self, minutes: float) -> subprocess.CompletedProcess[str]:
        """`jenga dashboards check --prometheus`, where Prometheus can be reached."""
        command = self.inside(JENGA, "dashboards", "check", "--prometheus", PROMETHEUS, "--minutes", str(minutes))
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})

    def ask(self, path: str, questions: list[dict[str, Any]]) -> list[Any]:
        """The series that Prometheus' API answers to each of the questions."""
        code = (
            "import sys, json, httpx; c = httpx.Client(trust_env=False, timeout=60);"
            f"print(json.dumps([c.get('{PROMETHEUS}/api/v1/{path}', params=q).json() for q in json.load(sys.stdin)]))"
        )
        command = self.inside(sys.executable, "-c", code)
        done = subprocess.run(command, input=json.dumps(questions), capture_output=True, text=True, check=True)
        answers = json.loads(done.stdout)
        assert all(answer["status"] == "success" for answer in answers), answers
        return [answer["data"]["result"] for answer in answers]

    def value(self, query: str) -> dict[str, float]:
        """An instant query's values by replica (or alert)."""
        (found,) = self.ask("query", [{"query": query}])
        return {s["metric"].get("replica", s["metric"].get("alertname", "")): float(s["value"][1]) for s in found}

    def engine_processes(self) -> list[psutil.Process]:
        """The replicas that hold engines."""
        family = psutil.Process(self.record.supervisor.pid).children(recursive=True)
        return [p for p in family if " ".join(p.cmdline()).startswith("ray::ServeReplica:jenga:Engine")]


@contextmanager
def serving(folder: Path) -> Iterator[Serving]:
    """`jenga serve` with the demo's configuration, and memory so small that requests press on it."""
    ports = free_ports(3)
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["http_options"]["port"] = ports[0]
    arguments = config["applications"][0]["args"]
    arguments["model"]["path"] = str(ROOT / "var" / "models" / "gemma3-recall")
    arguments["engine"]["kv_memory"] = "5MiB"
    file = folder / "serving.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = os.environ | {"JENGA_STATE_DIR": str(folder / "run")}
    options = ["--dashboard-port", str(ports[1]), "--metrics-port", str(ports[2])]
    try:
        done = subprocess.run(
            [JENGA, "serve", str(file), *options], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        record = read(folder / "run")
        assert record is not None
        yield Serving(folder / "run", record)
    finally:
        subprocess.run([JENGA, "stop"], env=environment, check=False)


@contextmanager
def prometheus(served: Serving, folder: Path) -> Iterator[None]:
    """Prometheus with the committed configuration; only the path of Ray's file and the intervals are the test's."""
    shutil.copytree(RULES, folder / "prometheus")
    file = folder / "prometheus" / "prometheus.yml"
    text = file.read_text()
    discovery = next(Path(served.record.ray_dir).glob("*/prom_metrics_service_discovery.json"))
    for old, new in (
        ("/tmp/ray/prom_metrics_service_discovery.json", str(discovery)),
        ("scrape_interval: 10s", "scrape_interval: 5s"),
    ):
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    options = [f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:9090"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(served.inside("prometheus", *options), stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def wait_for(what: str, condition: Any, seconds: float) -> float:
    """Seconds until `condition()` is true; fails after `seconds`."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"{what}: not within {seconds} s"
        time.sleep(1)
    return time.monotonic() - begin
