"""How the private Ray is started: its command and its environment."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from deployments import proxy

# Of each process of a Ray node; nothing of another Ray may leak in.
_FOREIGN = ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RUNTIME_ENV_HOOK")
_OBJECT_STORE_BYTES = 256 << 20


@dataclass(frozen=True)
class NodePorts:
    """Every port that Ray's head node would otherwise choose or default."""

    gcs: int
    dashboard: int
    metrics: int
    client: int
    agent_grpc: int
    agent_http: int
    runtime_env: int
    node_manager: int
    object_manager: int
    autoscaler_metrics: int
    dashboard_metrics: int


def command(ports: NodePorts, temp_dir: str, cpus: int) -> list[str]:
    """`ray start` in the foreground."""
    options = {
        "node-ip-address": "127.0.0.1",
        "port": ports.gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": ports.dashboard,
        "dashboard-agent-grpc-port": ports.agent_grpc,
        "dashboard-agent-listen-port": ports.agent_http,
        "metrics-export-port": ports.metrics,
        "ray-client-server-port": ports.client,
        "runtime-env-agent-port": ports.runtime_env,
        "node-manager-port": ports.node_manager,
        "object-manager-port": ports.object_manager,
        # Whatever is free: Ray's own range (10002 to 19999) would forbid our users' choices in it.
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": cpus,
        "object-store-memory": _OBJECT_STORE_BYTES,
        "temp-dir": temp_dir,
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    # By module: the script `ray` may carry another environment's interpreter line.
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    return [*ray, "start", "--head", "--block", "--disable-usage-stats", *flags]


def environment(outer: Mapping[str, str], ports: NodePorts, working_dir: str) -> dict[str, str]:
    """The environment of the node and, through it, of every replica."""
    inner = {key: value for key, value in outer.items() if key not in _FOREIGN}
    return inner | {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would demand a token of its clients as soon as one lies in the user's home, whoever put it there.
        "RAY_AUTH_MODE": "disabled",
        "DO_NOT_TRACK": "1",
        # Two ports that `ray start` has no option for.
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        **proxy.ENVIRONMENT,
        # Every connection comes by the forwarder, from the loopback: nobody's X-Forwarded-For is to be believed.
        "FORWARDED_ALLOW_IPS": outer.get("FORWARDED_ALLOW_IPS", ""),
        # Ray's own requests to the loopback must not go to a proxy.
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        # Serve imports `deployments.app` from where `jenga` imported `deployments`.
        "PYTHONPATH": os.pathsep.join(filter(None, [working_dir, outer.get("PYTHONPATH")])),
    }
