"""`jenga serve`, `jenga stop`, `jenga status`, and `jenga top` from its own module."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments import key_cli
from deployments.cluster import cli as cluster_cli
from deployments.local import launch, record
from deployments.top import top

StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="Folder of the record. [default: $JENGA_STATE_DIR, or var/run]"),
]


def _fail(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    return typer.Exit(1)


def serve(
    config: Annotated[Path, typer.Argument(help="Serving configuration, such as configs/demo.yaml.")],
    host: Annotated[
        str | None, typer.Option(help="Address of the REST interface instead of the configuration's.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the REST interface instead of the configuration's.")] = None,
    dashboard_port: Annotated[int, typer.Option(help="Port of Ray's dashboard, on the loopback.")] = 8265,
    metrics_port: Annotated[int, typer.Option(help="Port for Prometheus, on the loopback.")] = 8080,
    isolate: Annotated[
        bool, typer.Option(help="Run Ray in its own network and process namespace where that is possible.")
    ] = True,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the first answer.")] = 600,
    state_dir: StateDir = None,
) -> None:
    """Serve a model on this machine: start a private Ray, deploy, wait, show one answer.

    Nothing listens beyond the loopback unless --host asks for it. The deployment goes on in the
    background until [bold]jenga stop[/].
    """
    console = Console()
    options = launch.Options(host, port, dashboard_port, metrics_port, isolate, timeout)
    try:
        launch.serve(config, options, console, _folder(state_dir))
    except (launch.ConfigError, launch.PortError, launch.ServeError) as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been stopped")
        raise typer.Exit(130) from None


def stop(state_dir: StateDir = None) -> None:
    """Stop what [bold]jenga serve[/] started, and only that."""
    console = Console()
    begin = time.monotonic()
    folder = _folder(state_dir)
    stopped = launch.stop(folder)
    if stopped is None:
        console.print(_nothing(folder, "stop"), soft_wrap=True, highlight=False, markup=False)
    else:
        console.print(f"stopped {escape(stopped.config)} [dim]({time.monotonic() - begin:.1f} s)[/]", highlight=False)


def status(
    cluster: Annotated[
        Path | None, typer.Argument(metavar="[CLUSTER.yaml]", help="A cluster instead of what runs on this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Show what is being served: replicas, health, addresses, uptime; of a cluster also nodes and open ports."""
    if cluster is not None:
        cluster_cli.status(cluster, as_json=as_json)
        return
    folder = _folder(state_dir)
    found = launch.status(folder)
    if found is None:
        others = {str(other): running.url for other, running in record.elsewhere(folder).items()}
        none = {"running": False, "state_dir": str(folder), "elsewhere": others}
        print(json.dumps(none) if as_json else _nothing(folder, "status"))
        raise typer.Exit(3)
    running, state = found
    uptime = time.time() - running.started
    if as_json:
        print(
            json.dumps(
                {
                    "running": True,
                    "status": state.status,
                    "message": state.message,
                    "config": running.config,
                    "model": running.model,
                    "url": running.url,
                    "metrics_url": running.metrics_url,
                    "dashboard_url": running.dashboard_url,
                    "isolated": running.isolated,
                    "uptime_s": round(uptime, 1),
                    "replicas": [replica.__dict__ for replica in state.replicas],
                }
            )
        )
        return
    table = Table("deployment", "replica", "state", "uptime")
    for replica in state.replicas:
        age = f"{time.time() - replica.started:.0f} s" if replica.started else ""
        table.add_row(replica.deployment, replica.id, replica.state, age)
    console = Console()
    console.print(
        f"{running.model} from {running.config}: [bold]{state.status}[/], up {uptime:.0f} s"
        + (f"\n{escape(state.message)}" if state.message else ""),
        highlight=False,
    )
    console.print(table)
    console.print(
        f"REST {running.url}/v1   metrics {running.metrics_url}   dashboard {running.dashboard_url}",
        highlight=False,
        soft_wrap=True,
    )


def _nothing(folder: Path, command: str) -> str:
    """That nothing runs by the record in a folder, and how to come at what others say."""
    others = [
        f"{running.config} is served at {running.url}: `jenga {command} --state-dir {other}`"
        for other, running in record.elsewhere(folder).items()
    ]
    return "\n".join([f"nothing is being served from here (no record in {folder})", *others])


def _folder(state_dir: Path | None) -> Path:
    return (state_dir or record.default_folder()).absolute()


def add_commands(app: typer.Typer) -> None:
    """Register this package's commands."""
    app.command()(serve)
    app.command()(stop)
    app.command()(status)
    app.command()(top)
    app.add_typer(key_cli.app)
