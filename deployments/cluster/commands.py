"""`jenga up`, `jenga down` and `jenga status CLUSTER.yaml`: Ray's own commands, checked before and watched after."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.cluster import exposure
from deployments.cluster.checks import REMOTE_PROJECT, ClusterError, ClusterFile, check, check_this_machine
from deployments.cluster.remote import Report
from deployments.local.launch import Progress

# By module: the script `ray` may carry another environment's interpreter line.
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_TAIL = 15


def _environment() -> dict[str, str]:
    return os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_UP_enable_autoscaler_v2": "1", "PYTHONUNBUFFERED": "1"}


def _lines(arguments: list[str]) -> Iterator[str]:
    """Output of a command of Ray's, line by line; raises ClusterError with its end when it fails."""
    process = subprocess.Popen(
        [*_RAY, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_environment(),
    )
    assert process.stdout is not None
    last: list[str] = []
    try:
        for line in process.stdout:
            last = [*last, line.rstrip()][-_TAIL:]
            yield line.rstrip()
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code:
        said = "\n  ".join(line for line in last if line)
        raise ClusterError(f"`ray {arguments[0]}` ended with {code}. Its last lines:\n  {said}")


def _log_folder(name: str) -> Path:
    folder = Path("var") / "log" / "clusters"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"


def _record(folder: Path, name: str) -> Path:
    return folder / "clusters" / f"{name}.json"


def head_address(cluster: ClusterFile) -> str | None:
    """The address of the head as this machine reaches it; None when there is no head."""
    result = subprocess.run(
        [*_RAY, "get-head-ip", str(cluster.path)], capture_output=True, text=True, check=False, env=_environment()
    )
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    return lines[-1] if result.returncode == 0 and lines else None


def head_exists(cluster: ClusterFile) -> bool:
    """Whether the provider has a running head node of this name, whoever started it."""
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            provider = _get_node_provider(cluster.prepared["provider"], cluster.name, use_cache=False)
            return bool(provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD}))
        except Exception as error:
            raise ClusterError(f"{cluster.provider} cannot be asked for its nodes: {error}") from None


def refuse_taken_name(cluster: ClusterFile, folder: Path, exists: Callable[[ClusterFile], bool] = head_exists) -> None:
    """Raise ClusterError when a running cluster has this name and was not started from this file.

    `ray up` would take it over and restart it.
    """
    try:
        owner = json.loads(_record(folder, cluster.name).read_text())
    except (OSError, ValueError):
        owner = {}
    mine = owner.get("file") == str(cluster.path.absolute()) and owner.get("provider") == cluster.raw["provider"]
    if not mine and exists(cluster):
        of = f" (from {owner['file']})" if owner.get("file") else ""
        raise ClusterError(
            f"cluster_name: a cluster {cluster.name!r} runs already with this provider{of}; choose another name, "
            "end it with `jenga down`, or take it over with --take-over"
        )


def up(path: Path, *, wait: float, take_over: bool, restart: bool, console: Console, folder: Path) -> Report:
    """Check, start or update the cluster, and wait until its application answers.

    Without ``restart`` Ray goes on, files are copied, and Serve changes the application replica by replica.

    Raises ClusterError; nodes that were started go on running then, and the message says how to end them.
    """
    progress = Progress(console)
    with progress.phase(f"check {path}"):
        cluster = check(path)
        check_this_machine(cluster)
        if not take_over:
            refuse_taken_name(cluster, folder)
    record = _record(folder, cluster.name)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"file": str(path.absolute()), "provider": cluster.raw["provider"]}))
    log = _log_folder(cluster.name)
    options = ["--no-config-cache", "--log-style=record", *([] if restart else ["--no-restart"])]
    try:
        with progress.phase("start the head: ray up") as phase, log.open("w") as file:
            for line in _lines(["up", str(path), "--yes", *options]):
                print(line, file=file, flush=True)
                if line.strip() and console.is_terminal:
                    phase.tell(line.strip()[-100:])
        if not restart:
            with progress.phase("put the model on every node, change the application"):
                list(_lines(["exec", str(path), _remote("update")]))
        with progress.phase("wait for workers and engines") as phase:
            report = _watch(cluster, wait, phase)
    except ClusterError as error:
        raise ClusterError(
            f"{error}\n  Ray's own words: {log}. The nodes that were started run on: `jenga status {path}` looks, "
            f"`jenga down {path}` ends them"
        ) from None
    _show_up(cluster, report, progress)
    return report


def _remote(action: str, *options: str) -> str:
    program = ".venv/bin/python -m deployments.cluster.remote"
    return f"cd {REMOTE_PROJECT} && {program} {action} serving.yaml {' '.join(options)}"


def _watch(cluster: ClusterFile, seconds: float, phase: Progress) -> Report:
    last: Report | None = None
    command = _remote("watch", f"--seconds {seconds:g}")
    with contextlib.suppress(ClusterError):  # the report says more than Ray's message about an exit code
        for line in _lines(["exec", str(cluster.path), command]):
            if found := Report.from_line(line):
                last = found
                alive = sum(node.state == "ALIVE" for node in last.nodes)
                phase.tell(f"{alive} node(s); {last.summary or last.application.lower()}")
    if last is None:
        raise ClusterError("the head does not say how the application is")
    if last.failure:
        raise ClusterError(f"the application does not start: {last.failure}")
    if last.answer is None and not last.keyed:
        raise ClusterError(
            f"no answer after {seconds:.0f} s: {last.summary or last.message or last.application}; --wait allows more"
        )
    return last


def _show_up(cluster: ClusterFile, report: Report, progress: Progress) -> None:
    console = progress.console
    head = head_address(cluster) or "HEAD"
    port = report.rest_port
    console.print(f"\n[bold green]serving[/] {report.model} after {progress.elapsed:.0f} s")
    if report.keyed:
        console.print("it answers, but asks for an API key (JENGA_API_KEY of the head's shell was not one)")
    elif report.right is not None:
        console.print(f"the first answer {report.answer!r} is " + ("right" if report.right else "[red]wrong[/]"))
    console.print(_nodes(report))
    auth = cluster.raw.get("auth") or {}
    key = f"-i {auth['ssh_private_key']} " if auth.get("ssh_private_key") else ""
    forward = " ".join(f"-L {local}:127.0.0.1:{local}" for local in (port, 8265, 3000))
    console.print(
        f"\nREST       {report.scheme}://{head}:{port}/v1, where the network lets you; else through the tunnel below"
        f"\ntunnel     ssh {key}{forward} {auth.get('ssh_user', 'ubuntu')}@{head}"
        f"\n           then {report.scheme}://127.0.0.1:{port}/v1, Ray's dashboard http://127.0.0.1:8265, Grafana http://127.0.0.1:3000"
        f"\nstatus     jenga status {cluster.path}"
        f"\nstop       jenga down {cluster.path}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _nodes(report: Report) -> Table:
    table = Table("node", "role", "state", "resources", "replicas")
    for node in report.nodes:
        here = [replica for replica in report.replicas if replica.node == node.address]
        names = ", ".join(f"{item.deployment} {item.state.lower()}" for item in here)
        resources = ", ".join(
            f"{key.removeprefix('accelerator_type:')} {value:g}" for key, value in node.resources.items()
        )
        table.add_row(
            node.address,
            "head" if node.head else "worker",
            node.state,
            resources,
            names if node.state == "ALIVE" else "",
        )
    return table


def down(path: Path, *, console: Console, folder: Path) -> None:
    """End the cluster: all nodes of a cloud; of `local`, Ray on the head and every worker.

    Raises ClusterError when Ray's command fails.
    """
    progress = Progress(console)
    cluster = check(path)
    if cluster.provider == "local":
        # These machines stay: end what the start commands left on them.
        with progress.phase("stop Prometheus and Grafana on the head"), contextlib.suppress(ClusterError):
            command = f"cd {REMOTE_PROJECT} && .venv/bin/python -m deployments.cluster.monitoring stop"
            list(_lines(["exec", str(path), command]))
    with progress.phase("ray down") as phase:
        for line in _lines(["down", str(path), "--yes"]):
            if line.strip() and console.is_terminal:
                phase.tell(line.strip()[-100:])
    if cluster.provider == "local":
        with progress.phase("stop what is left of Ray on every machine"):
            provider = cluster.raw["provider"]
            for address in [*provider["worker_ips"], provider["head_ip"]]:
                _stop_node(cluster, address, console)
    _record(folder, cluster.name).unlink(missing_ok=True)
    console.print(f"{escape(cluster.name)} is down", highlight=False)


def _stop_node(cluster: ClusterFile, address: str, console: Console) -> None:
    """Ray's own `down` leaves workers of `local` running, and does not say so when it could not stop the head."""
    auth = cluster.raw["auth"]
    options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=10"]
    key = ["-i", str(Path(auth["ssh_private_key"]).expanduser()), "-o", "IdentitiesOnly=yes"]
    command = ["ssh", "-q", *options, *key, f"{auth.get('ssh_user', 'ubuntu')}@{address}"]
    result = subprocess.run(
        [*command, f"{REMOTE_PROJECT}/.venv/bin/ray stop --grace-period 10"],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        console.print(
            f"[yellow]warning:[/] Ray on {address} was not stopped: {escape(result.stderr.strip()[-200:])}",
            soft_wrap=True,
        )


def status(path: Path, *, console: Console, as_json: bool) -> Report:
    """Show nodes, replicas, health, and ports that are open to the world.

    Raises ClusterError when the head does not answer.
    """
    cluster = check(path)
    head = head_address(cluster)
    if head is None:
        raise ClusterError(f"no cluster {cluster.name!r} runs; `jenga up {path}` starts it")
    begin = time.monotonic()
    found = [item for line in _lines(["exec", str(path), _remote("status")]) if (item := Report.from_line(line))]
    if not found:
        raise ClusterError(f"the head {head} does not answer after {time.monotonic() - begin:.0f} s")
    report = found[-1]
    outside = exposure.reachable(head, (report.rest_port,))
    warnings = [f"{place} listens on a public address" for place in report.exposed]
    warnings += [f"{place} answers from here, so the network lets anybody in" for place in outside]
    if as_json:
        line = json.loads(report.to_line().partition(":")[2])
        print(json.dumps(line | {"head": head, "warnings": warnings}))
        return report
    console.print(
        f"{escape(cluster.name)} ({cluster.provider}): {report.model} [bold]{report.application}[/] "
        + escape(report.summary),
        highlight=False,
    )
    for text in (report.failure, report.message):
        if text:
            console.print(escape(text), highlight=False)
    console.print(_nodes(report))
    for warning in warnings:
        console.print(
            f"[yellow]warning:[/] {escape(warning)}: close it (docs/cluster.md)",
            highlight=False,
            soft_wrap=True,
        )
    return report
