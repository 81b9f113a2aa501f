"""`jenga up` and `jenga down`; `jenga status` is in deployments/cli.py and comes here with a cluster file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from deployments.local import record

ClusterArgument = Annotated[
    Path, typer.Argument(metavar="CLUSTER.yaml", help="Cluster file, such as cluster/aws.yaml.")
]


def _fail(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    return typer.Exit(1)


def up(
    cluster: ClusterArgument,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the first answer.")] = 1800,
    take_over: Annotated[bool, typer.Option("--take-over", help="Also a cluster that another file started.")] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart/--no-restart", help="Restart Ray, if it runs; without, only change what is served."),
    ] = True,
    check_only: Annotated[bool, typer.Option("--check", help="Check the file, start nothing.")] = False,
) -> None:
    """Start or update a Ray cluster and serve on it: [bold]ray up[/] with checks before and a wait after."""
    from deployments.cluster import checks, commands

    console = Console()
    try:
        if check_only:
            checks.check_this_machine(checks.check(cluster))
            console.print(f"{escape(str(cluster))} is all right", highlight=False)
            return
        commands.up(
            cluster, wait=wait, take_over=take_over, restart=restart, console=console, folder=record.default_folder()
        )
    except checks.ClusterError as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        console.print(f"interrupted; what was started runs on: `jenga down {cluster}` ends it", highlight=False)
        raise typer.Exit(130) from None


def down(cluster: ClusterArgument) -> None:
    """End a cluster: [bold]ray down[/], and on your own machines also what it leaves."""
    from deployments.cluster import checks, commands

    try:
        commands.down(cluster, console=Console(), folder=record.default_folder())
    except checks.ClusterError as error:
        raise _fail(str(error)) from None


def status(cluster: Path, *, as_json: bool) -> None:
    """Show a cluster; ends with 1 when its application does not run."""
    from deployments.cluster import checks, commands

    try:
        report = commands.status(cluster, console=Console(), as_json=as_json)
    except checks.ClusterError as error:
        raise _fail(str(error)) from None
    if report.application != "RUNNING":
        raise typer.Exit(1)


def add_commands(app: typer.Typer) -> None:
    """Register this package's commands."""
    app.command()(up)
    app.command()(down)
