"""`jenga metrics`."""

from __future__ import annotations

from typing import Annotated

import typer


def add_commands(app: typer.Typer) -> None:
    """Register this package's commands."""
    app.command("metrics")(metrics)


def metrics(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/metrics.md instead.")] = False,
) -> None:
    """List every metric: its unit, labels and meaning, and what may be summed."""
    from rich.table import Column, Table

    from jenga.metrics import page
    from jenga.metrics.definitions import METRICS, REGISTRY, VLLM_METRICS
    from jenga.terminal import table_console

    if markdown:
        print(page.markdown(), end="")
        return
    console = table_console()
    longest = max(
        len(name) for name in (*REGISTRY, *(m.name for m in VLLM_METRICS))
    )  # so that names are whole on narrow terminals
    for source, title in page.TITLES.items():
        table = Table(
            Column("metric", min_width=longest), "meaning", title=title, title_justify="left", show_lines=True
        )
        for m in METRICS:
            if m.source == source:
                labels = "".join(f"\n{x.name}: {', '.join(x.values) or x.meaning}" for x in m.labels)
                table.add_row(f"{m.name}\n[dim]{m.kind}, {m.unit}[/]", f"{m.meaning}[dim]{labels}\nsums: {m.sums}[/]")
        console.print(table)
    table = Table(Column("metric", min_width=longest), "meaning", title="From vLLM", title_justify="left")
    for one in VLLM_METRICS:
        table.add_row(f"{one.name}\n[dim]{one.kind}, {one.unit}[/]", one.meaning)
    console.print(table)
