"""`jenga dashboards build`, `push` and `check`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from dashboards import build as building
from dashboards import check as checking
from dashboards import push as pushing
from dashboards import schema_check
from dashboards.source import Source

app = typer.Typer(help="Grafana dashboards and Prometheus rules.", no_args_is_help=True)

Standalone = Annotated[
    bool, typer.Option("--standalone", help="For engines started by `vllm serve`, whose names lack Ray's prefix.")
]
PROMETHEUS = "http://localhost:9090"


def _fail(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    return typer.Exit(1)


@app.command()
def build(
    output: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("var/dashboards"),
    prometheus: Annotated[str, typer.Option(help="Address of Prometheus, as Grafana sees it.")] = PROMETHEUS,
    standalone: Standalone = False,
    ray_session: Annotated[
        Path | None,
        typer.Option(help="Put the dashboards beside Ray's own in the folder of a running session instead."),
    ] = None,
    repository: Annotated[
        bool, typer.Option("--repository", help="Write what the repository keeps instead: after a change of the code.")
    ] = False,
) -> None:
    """Write dashboards (JSON), a Grafana provisioning folder and Prometheus' rules."""
    if ray_session and standalone:
        raise _fail("--ray-session and --standalone exclude each other: a Ray session has Ray's names")
    try:
        if repository:
            files = building.build_committed()
        elif ray_session:
            files = building.build_for_ray(ray_session)
        else:
            files = building.build(output, Source(ray=not standalone), prometheus)
    except building.BuildError as error:
        raise _fail(str(error)) from None
    for file in files:
        print(file)


@app.command()
def push(
    url: Annotated[str, typer.Option(envvar="GRAFANA_URL", help="Address of Grafana.")],
    token: Annotated[
        str, typer.Option(envvar="GRAFANA_TOKEN", help="Token of a service account; better in the environment.")
    ],
    prometheus: Annotated[str, typer.Option(help="Address of Prometheus, as Grafana sees it.")] = PROMETHEUS,
    datasource: Annotated[bool, typer.Option(help="Make or update the data source too.")] = True,
    standalone: Standalone = False,
) -> None:
    """Put folder, data source and dashboards into a running Grafana; doing it again changes nothing."""
    console = Console()
    try:
        grafana = pushing.Grafana(url, token)
        console.print(f"Grafana {grafana.check_version()} at {url}", highlight=False)
        steps: list[Callable[[], pushing.Pushed]] = [grafana.push_folder]
        if datasource:
            steps.append(partial(grafana.push_datasource, prometheus))
        pages = building.dashboards(Source(ray=not standalone)).values()
        steps += [partial(grafana.push_dashboard, text) for text in pages]
        for step in steps:
            done = step()
            console.print(f"{done.outcome:>9}  {done.what}", highlight=False)
    except pushing.PushError as error:
        raise _fail(str(error)) from None


@app.command()
def check(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Dashboards (JSON). [default: those for Ray Serve, made anew]")
    ] = None,
    standalone: Standalone = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Also against Grafana's own types; needs npm and its registry.")
    ] = False,
    prometheus: Annotated[
        str | None, typer.Option(help="Address of a Prometheus: also run every query there, and list empty panels.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="How far back queries look for data.")] = 15,
) -> None:
    """Check the dashboards: queries, metric names, Grafana's schema, and whether panels have data."""
    console = Console(soft_wrap=True)
    try:
        texts = (
            {path.stem: path.read_text() for path in files}
            if files
            else building.dashboards(Source(ray=not standalone))
        )
        queries = checking.read(texts)
        faults = _static_faults(texts, queries, schema, console)
        if prometheus and not faults:
            found = checking.coverage(track(queries, "asking Prometheus", console=console), prometheus, minutes)
            console.print(f"{len(found.with_data)} panels have data in the last {minutes:g} minutes", highlight=False)
            for place in found.empty_without_gpu:
                console.print(f"no data without a GPU: {place}", highlight=False, markup=False)
            faults = [f"no data: {place}" for place in found.empty]
    except OSError as error:
        raise _fail(f"cannot read {error.filename}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _fail(f"a file is not text: {error}") from None
    except checking.CheckError as error:
        raise _fail(str(error)) from None
    for fault in faults:
        console.print(fault, highlight=False, markup=False)
    if faults:
        raise typer.Exit(1)


def _static_faults(texts: dict[str, str], queries: list[checking.Query], schema: bool, console: Console) -> list[str]:
    faults = checking.grammar_faults(queries)
    done = [f"{len(texts)} dashboards, {len(queries)} queries: grammar and names"]
    program = checking.promtool()
    if program is None:
        done.append("promtool not asked (it comes with Prometheus: apt-get install prometheus)")
    elif said := checking.promtool_faults(queries, program):
        faults.append(said)
    else:
        done.append("promtool")
    if schema:
        faults += schema_check.faults(texts, schema_check.default_folder())
        done.append("Grafana's schema")
    else:
        done.append("Grafana's schema not asked (--schema)")
    console.print("; ".join(done), highlight=False)
    return faults


def add_commands(program: typer.Typer) -> None:
    """Register this package's commands."""
    program.add_typer(app, name="dashboards")
