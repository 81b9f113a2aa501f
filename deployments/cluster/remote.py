"""What `jenga up` and `jenga status` ask of the head node, run there through `ray exec`.

python -m deployments.cluster.remote {deploy,update,watch,status} SERVING.yaml

`deploy` hands the configuration to Ray Serve; `update` first puts its model on every worker that runs already.

`watch` and `status` print one JSON object per line behind MARK; a terminal's noise may stand around them.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import httpx

from deployments import first_answer
from deployments.cluster import exposure, model
from deployments.config import ConfigError, ServeFile, load
from deployments.local.api import ServeApi, read_state

MARK = "jenga-cluster-report:"
DASHBOARD = "http://127.0.0.1:8265"
_POLL_S = 1.0
_DASHBOARD_S = 120.0
T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A machine as Ray knows it; resources are what Ray counts there."""

    address: str
    head: bool
    state: str
    resources: dict[str, float]


@dataclass(frozen=True)
class Replica:
    """A replica of a deployment, and the address of its node."""

    deployment: str
    id: str
    state: str
    node: str


@dataclass(frozen=True)
class Report:
    """The cluster at one moment.

    application: Serve's word, or UNREACHABLE.  summary: replicas by deployment.  failure: why it cannot start.
    exposed: listeners of Ray's on public addresses.  answer: the first answer, if it was asked for; ``keyed``
    says that the application answers, but wants an API key.
    """

    application: str
    summary: str = ""
    failure: str | None = None
    message: str = ""
    nodes: tuple[Node, ...] = ()
    replicas: tuple[Replica, ...] = ()
    exposed: tuple[str, ...] = ()
    rest_port: int = 8000
    scheme: str = "http"
    model: str = ""
    answer: str | None = None
    right: bool | None = None
    keyed: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    def to_line(self) -> str:
        """As one line of output."""
        return f"{MARK}{json.dumps(asdict(self))}"

    @classmethod
    def from_line(cls, line: str) -> "Report | None":
        """The report in a line of output, None if there is none."""
        _, mark, text = line.partition(MARK)
        if not mark:
            return None
        try:
            data = json.JSONDecoder().raw_decode(text)[0]
        except ValueError:
            return None
        nodes = tuple(Node(**item) for item in data.pop("nodes"))
        replicas = tuple(Replica(**item) for item in data.pop("replicas"))
        return cls(nodes=nodes, replicas=replicas, exposed=tuple(data.pop("exposed")), **data)


def read_nodes(summary: dict[str, Any]) -> tuple[Node, ...]:
    """The nodes in what `GET /nodes?view=summary` answered, the head first."""
    nodes = [
        Node(
            raylet.get("nodeManagerAddress") or item.get("ip", ""),
            bool(raylet.get("isHeadNode")),
            raylet.get("state", "UNKNOWN"),
            {
                key: value
                for key, value in (raylet.get("resourcesTotal") or {}).items()
                if key in ("CPU", "GPU") or key.startswith("accelerator_type:")
            },
        )
        for item in summary["data"]["summary"]
        for raylet in [item.get("raylet") or {}]
    ]
    return tuple(sorted(nodes, key=lambda node: (not node.head, node.state != "ALIVE", node.address)))


def read_replicas(details: dict[str, Any], application: str) -> tuple[Replica, ...]:
    """The replicas in what `GET /api/serve/applications/` answered."""
    app = (details.get("applications") or {}).get(application) or {}
    return tuple(
        Replica(name, item["replica_id"], item["state"], item.get("node_ip") or "")
        for name, deployment in (app.get("deployments") or {}).items()
        for item in deployment.get("replicas") or []
    )


def dashboard() -> ServeApi:
    """Ray's dashboard on this node, with the token that the cluster file put here."""
    token = Path("~/.ray/auth_token").expanduser()
    return ServeApi(DASHBOARD, token=token.read_text().strip() if token.is_file() else None)


def report(config: ServeFile) -> Report:
    """The cluster now, without what takes longer."""
    name = config.application.name
    http = config.http_options
    where: dict[str, Any] = {
        "rest_port": http.port,
        "scheme": "https" if http.ssl_certfile else "http",
        "model": config.application.args.model.id,
    }
    try:
        api = dashboard()
        nodes = read_nodes(api.get("/nodes?view=summary"))
        details = api.get("/api/serve/applications/")
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return Report("UNREACHABLE", message=f"Ray's dashboard: {error}", **where)
    state = read_state(details, name, hosts_may_die=True)
    return Report(
        application=state.status,
        summary=state.summary(),
        failure=state.failure,
        message=state.message,
        nodes=nodes,
        replicas=read_replicas(details, name),
        **where,
    )


def _with(old: Report, **changes: Any) -> Report:
    return Report(**{name: getattr(old, name) for name in Report.__dataclass_fields__} | changes)


def asked(config: ServeFile, old: Report) -> Report:
    """The same, with the answer to a first question."""
    try:
        answer = first_answer.ask(
            f"{old.scheme}://127.0.0.1:{old.rest_port}",
            config.application.args,
            key=os.environ.get("JENGA_API_KEY"),
            certificate=config.http_options.ssl_certfile,
        )
    except first_answer.NoAnswerError as error:
        if "status 401" in str(error) or "status 403" in str(error):
            return _with(old, keyed=True)
        return _with(old, failure=str(error))
    return _with(old, answer=answer.text, right=None if answer.right is None else answer.text.strip() == answer.right)


def on_nodes(work: Callable[[], T], *, workers_only: bool = False, seconds: float | None = None) -> list[T]:
    """What ``work`` returned on each living node that answered within ``seconds``; raises its exceptions."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", namespace="jenga-cluster")
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(work)
        questions = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in ray.nodes()
            if node["Alive"] and not (workers_only and "node:__internal_head__" in node["Resources"])
        ]
        ready, _ = ray.wait(questions, num_returns=len(questions), timeout=seconds) if questions else ([], [])
        answers: list[T] = ray.get(ready)
        return answers
    finally:
        ray.shutdown()


def provide_everywhere(config: ServeFile) -> None:
    """Put the model on this node (without its weights) and on every worker; raises ConfigError when that fails."""
    wanted = config.application.args.model

    def fetch() -> str:
        try:
            return f"{model.provide(wanted, weights=True)}"
        except ConfigError as error:
            return f"error: {error}"

    lines = [model.provide(wanted, weights=False), *on_nodes(fetch, workers_only=True)]
    for line in lines:
        if line.startswith("error: "):
            raise ConfigError(line.removeprefix("error: "))
        print(line, flush=True)


def examined(old: Report) -> Report:
    """The same, with versions and with every node's open ports: asks a Ray task on each."""
    port = old.rest_port

    def look() -> list[str]:
        return exposure.exposed(exposure.own_listeners(), exposure.own_addresses(), (port,))

    found = {line for answer in on_nodes(look, seconds=30) for line in answer}
    return _with(old, exposed=tuple(sorted(found)), versions={"ray": version("ray")})


def deploy(config: ServeFile) -> None:
    """Hand the configuration to Ray Serve; raises ConfigError when it is refused or nobody answers."""
    api = dashboard()
    end = time.monotonic() + _DASHBOARD_S
    while not api.ready():
        if time.monotonic() > end:
            raise ConfigError(f"Ray's dashboard at {DASHBOARD} does not answer after {_DASHBOARD_S:.0f} s")
        time.sleep(_POLL_S)
    try:
        api.deploy(config.to_ray())
    except httpx.HTTPError as error:
        raise ConfigError(f"Ray Serve refused the application: {' '.join(str(error).split())[:500]}") from None


def watch(config: ServeFile, seconds: float) -> int:
    """Print a report at each change until the application answers, fails, or ``seconds`` have passed."""
    end = time.monotonic() + seconds
    last = None
    while True:
        now = report(config)
        if now != last:
            print(now.to_line(), flush=True)
            last = now
        if now.application == "RUNNING":
            final = asked(config, now)
            print(final.to_line(), flush=True)
            return 1 if final.failure else 0
        if now.failure or time.monotonic() > end:
            return 1
        time.sleep(_POLL_S)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ask or tell Ray Serve on this head node.")
    parser.add_argument("action", choices=["deploy", "update", "watch", "status"])
    parser.add_argument("serving", type=Path)
    parser.add_argument("--seconds", type=float, default=1800, help="how long `watch` waits")
    options = parser.parse_args()
    try:
        config = load(options.serving)
        if options.action == "update":
            provide_everywhere(config)
            deploy(config)
        elif options.action == "deploy":
            deploy(config)
        elif options.action == "watch":
            return watch(config, options.seconds)
        else:
            now = report(config)
            print((now if now.application == "UNREACHABLE" else examined(now)).to_line(), flush=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
