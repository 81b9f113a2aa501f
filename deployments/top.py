"""`jenga top`: what the memory map page knows of every replica, in the terminal."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deployments import tls
from deployments.local import record
from deployments.local.record import API_KEY
from jenga.metrics.map import DATA_VERSION
from jenga.metrics.memory import GROUP_CAUSES, POOL_CAUSES
from jenga.units import format_size

_DEFAULT = "http://127.0.0.1:8000"
_TIMEOUT_S = 15.0
_BAR = 32


class TopError(Exception):
    """Nothing to show; the message is for the user."""


def top(
    address: Annotated[
        str | None,
        typer.Option(
            help=f"Base of the REST interface. [default: what `jenga serve` runs here, or {_DEFAULT}]", metavar="URL"
        ),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and end.")] = False,
    state_dir: Annotated[
        Path | None,
        typer.Option("--state-dir", help="Folder of `jenga serve`'s record. [default: $JENGA_STATE_DIR, or var/run]"),
    ] = None,
) -> None:
    """Show each replica's memory by cause, its pages, hits and requests, until Ctrl-C."""
    console = Console()
    base, certificate = (address, None) if address else _served_here(state_dir)
    try:
        data = ask(base, certificate)
        if as_json:
            print(json.dumps(data))
        elif once:
            console.print(render(base, data))
        else:
            _watch(console, base, certificate, data, interval)
    except TopError as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None


def ask(base: str, certificate: str | None = None) -> dict[str, Any]:
    """What ``/memory/data`` below `base` answers to the key in ``$JENGA_API_KEY``, if there is one.

    `certificate` is the file of a certificate to trust as it stands.

    Raises:
        TopError: nothing of ours answers there; the message says what does, and the remedy.
    """
    url = base.rstrip("/").removesuffix("/memory").removesuffix("/v1") + "/memory/data"
    try:
        # A proxy of the environment is for the internet, and this is the user's own deployment.
        key = os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        context = tls.client_context(certificate)
        response = httpx.get(url, timeout=_TIMEOUT_S, trust_env=False, headers=headers, verify=context)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise TopError(f"--address {base}: this is no address; write one such as {_DEFAULT}") from None
    except httpx.TimeoutException:
        raise TopError(f"{url} did not answer within {_TIMEOUT_S:g} s") from None
    except httpx.HTTPError as error:
        raise TopError(
            f"nothing answers at {base} ({error}); start `jenga serve`, or name another deployment with --address"
        ) from None
    try:
        data = response.json()
    except ValueError:
        data = None
    if not isinstance(data, dict) or not response.is_success or "replicas" not in data:
        raise TopError(_why_not(base, response, data))
    if data.get("version") != DATA_VERSION:
        raise TopError(
            f"{base} tells of its memory in version {data.get('version')}, this program reads {DATA_VERSION}: "
            "install the same version of jenga-serve on both sides"
        )
    return data


def _why_not(base: str, response: httpx.Response, data: Any) -> str:
    error = data.get("error") if isinstance(data, dict) else None
    if isinstance(error, dict) and error.get("code") == "memory_map_off":
        return f"{base} keeps its memory to itself: {error.get('message')}"
    if response.status_code in (401, 403):
        code, said = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, None)
        why = (
            "" if code == "missing_api_key" or not said else f" ({said})"
        )  # how to send one is not the user's question
        return (
            f"{base} shows its memory to holders of admin keys only{why}; "
            f"put a key made with `jenga keys add --admin` into ${API_KEY}"
        )
    said = error.get("message") if isinstance(error, dict) else response.text.strip()[:100]
    return (
        f"{base} answers, but not as Jenga Serve does (status {response.status_code}: {said}); --address takes the "
        f"address of the REST interface, such as {_DEFAULT}"
    )


def _served_here(state_dir: Path | None) -> tuple[str, str | None]:
    running = record.read((state_dir or record.default_folder()).absolute())
    if running is None or not running.supervisor.alive():
        return _DEFAULT, None
    return running.url, running.certificate


def _watch(console: Console, base: str, certificate: str | None, data: dict[str, Any], interval: float) -> None:
    """Draw again and again; what fails meanwhile is told below the last picture, and tried again."""
    trouble: str | None = None
    try:
        with Live(render(base, data), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    data, trouble = ask(base, certificate), None
                except TopError as error:
                    trouble = str(error)
                live.update(render(base, data, trouble), refresh=True)
    except KeyboardInterrupt:
        return


def render(base: str, data: Mapping[str, Any], trouble: str | None = None) -> RenderableType:
    """The whole picture."""
    replicas = data["replicas"]
    when = time.strftime("%H:%M:%S", time.localtime(data["taken"]))
    head = Text.assemble((base, "bold"), f"  {len(replicas)} replica{'s' * (len(replicas) != 1)}  {when}")
    parts: list[RenderableType] = [head]
    if trouble:
        parts.append(Text(f"not up to date: {trouble}", style="yellow"))
    if silent := data["silent_replicas"]:
        parts.append(Text(f"{silent} replica{'s do' if silent > 1 else ' does'} not answer", style="yellow"))
    elif not replicas:
        parts.append(Text("no replica answers: the deployment may be starting", style="yellow"))
    for replica in replicas:
        parts += [Text(), *_replica(replica, data["stale_after_s"])]
    return Group(*parts)


def _replica(replica: Mapping[str, Any], stale_after_s: float) -> Iterator[RenderableType]:
    report = replica["report"]
    yield Text.assemble((f"replica {replica['replica']}", "bold"), f"  {replica['model']}")
    if report is None:
        yield Text("  no report: the engine is starting, or vLLM's own memory manager is in charge (JENGA=0)", "dim")
        return
    if replica["report_age_s"] > stale_after_s:
        yield Text(f"  this is {replica['report_age_s']:,.0f} s old: the engine did not report since", style="yellow")
    memory, hits, requests = report["memory"], report["hits"], report["requests"]
    rate = f" ({hits['hit_tokens'] / hits['lookup_tokens']:.1%})" if hits["lookup_tokens"] else ""
    yield Text(f"  requests: {requests['resident']:,} resident, {requests['waiting']:,} waiting")
    yield Text(
        f"  hits: {hits['hit_requests']:,} of {hits['requests']:,} requests, {hits['hit_tokens']:,} of "
        f"{hits['lookup_tokens']:,} tokens{rate}"
    )
    yield Padding(_by_cause(memory), (0, 0, 0, 2))
    yield Padding(_by_group(memory), (0, 0, 0, 2))
    yield Text(
        f"  large pages of {format_size(memory['large_page_bytes'])}: {memory['large_pages']:,}, of them "
        f"{memory['free_large_pages']:,} free, {memory['reserved_large_pages']:,} reserved"
    )


def _by_cause(memory: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify)
    whole = memory["buffer_bytes"]
    for cause in (*GROUP_CAUSES, *POOL_CAUSES):
        key = f"{cause}_bytes"
        size = memory[key] if key in memory else sum(group[key] for group in memory["groups"])
        if size:  # a terminal has few lines
            table.add_row(cause, Bar(whole, 0, size, width=_BAR), format_size(size), f"{size / whole:.1%}")
    return table


def _by_group(memory: Mapping[str, Any]) -> Table:
    table = Table("group", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in ("live pages", "cached pages", "empty slots", "large pages"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in memory["groups"]:
        counts = (group[name] for name in ("live_pages", "cached_pages", "stranded_pages", "large_pages"))
        table.add_row(group["name"], *(f"{count:,}" for count in counts))
    return table
