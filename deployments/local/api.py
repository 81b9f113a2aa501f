"""Ray Serve's REST API, as far as starting and watching one application needs it."""

from dataclasses import dataclass, field
from typing import Any

import httpx

from deployments.failures import root_cause


@dataclass(frozen=True)
class Replica:
    """One replica as Serve reports it."""

    id: str
    deployment: str
    state: str
    pid: int | None
    started: float | None


@dataclass(frozen=True)
class State:
    """An application at one moment.

    status: Serve's word (NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, ...).
    wanted: replicas that should run, by deployment.
    failure: why it cannot start, None while there is hope.
    """

    status: str
    replicas: tuple[Replica, ...] = ()
    wanted: dict[str, int] = field(default_factory=dict)
    failure: str | None = None
    message: str = ""

    @property
    def running(self) -> bool:
        """Whether requests are answered by every replica that should run."""
        return self.status == "RUNNING"

    def summary(self) -> str:
        """Replicas by deployment, such as `Ingress 1/1, Engine:tiny 0/2 starting`."""
        parts = []
        for name, wanted in self.wanted.items():
            states = [replica.state for replica in self.replicas if replica.deployment == name]
            ready = states.count("RUNNING")
            others = sorted({state.lower().replace("_", " ") for state in states if state != "RUNNING"})
            parts.append(f"{name} {ready}/{wanted}" + (f" ({', '.join(others)})" if others else ""))
        return ", ".join(parts)


def read_state(details: dict[str, Any], application: str, *, hosts_may_die: bool = False) -> State:
    """The application's state in what `GET /api/serve/applications/` answered.

    With `hosts_may_die`, what Serve repairs by itself is no failure: replicas that died with their host, or are
    unhealthy.
    """
    app = (details.get("applications") or {}).get(application)
    if app is None:
        return State("NOT_STARTED")
    deployments: dict[str, Any] = app.get("deployments") or {}
    replicas = tuple(
        Replica(item["replica_id"], name, item["state"], item.get("pid"), item.get("start_time_s"))
        for name, deployment in deployments.items()
        for item in deployment.get("replicas") or []
    )
    wanted = {name: deployment.get("target_num_replicas", 0) for name, deployment in deployments.items()}
    failure = None
    if app["status"] == "DEPLOY_FAILED" or (app["status"] == "UNHEALTHY" and not hosts_may_die):
        messages = [deployment.get("message", "") for deployment in deployments.values()]
        failure = _reason([*messages, app.get("message", "")])
    else:
        # Serve would try again and again; the first failure of a constructor says enough.
        failed = [
            message
            for deployment in deployments.values()
            if "failed to start" in (message := deployment.get("message") or "")
            and not (hosts_may_die and _DIED in message)
        ]
        failure = _reason(failed) if failed else None
    return State(app["status"], replicas, wanted, failure, app.get("message", ""))


# Ray's words where a process ended by no error of its own.
_DIED = "The actor died unexpectedly"


def _reason(messages: list[str]) -> str:
    """The first root cause in Serve's messages, else the first message itself."""
    causes = (root_cause(message.splitlines()) for message in messages)
    return next((cause for cause in causes if cause), next(filter(None, messages), "Serve gives no reason"))


class ServeApi:
    """Client of the dashboard's Serve API; every method raises httpx.HTTPError when it does not answer."""

    def __init__(self, base: str, timeout: float = 10.0, *, token: str | None = None) -> None:
        # Never through a proxy: the address is this machine's.
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=base, timeout=timeout, trust_env=False, headers=headers)

    def ready(self) -> bool:
        """Whether the dashboard answers."""
        try:
            return self._http.get("/api/version").is_success
        except httpx.HTTPError:
            return False

    def get(self, path: str) -> dict[str, Any]:
        """The JSON at a path of the dashboard."""
        answer: dict[str, Any] = self._http.get(path).raise_for_status().json()
        return answer

    def deploy(self, config: dict[str, Any]) -> None:
        """Hand over a Serve configuration; starts Serve if needed."""
        response = self._http.put("/api/serve/applications/", json=config, timeout=120)
        if not response.is_success:
            raise httpx.HTTPStatusError(response.text.strip(), request=response.request, response=response)

    def state(self, application: str) -> State:
        """The application now."""
        return read_state(self.get("/api/serve/applications/"), application)
