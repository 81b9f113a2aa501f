"""The comparison on a terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jenga.plan.report import PlanReport, StrategyReport
from jenga.units import format_size

WASTE = ("tail", "padding", "droppable", "stranded", "reserved", "free")


def print_report(report: PlanReport, console: Console) -> None:
    """Geometry, sequences that fit, and what a full buffer is wasted on, as tables."""
    ranks = f", one of {report.tp} ranks" if report.tp > 1 else ""
    size = format_size(report.memory_bytes)
    console.print(f"[bold]{escape(report.model)}[/], {size} of KV memory{ranks}", soft_wrap=True, highlight=False)
    console.print(f"[dim]{escape(report.source)}[/]", soft_wrap=True, highlight=False)
    planned = [s for s in report.strategies if s.error is None]
    if planned:
        console.print(_geometry(planned))
        console.print(_pools(planned))
        console.print(_capacity(planned))
        console.print(_waste(planned, report.memory_bytes))
    for s in report.strategies:
        text = f"[red]no plan:[/] {escape(s.error)}" if s.error else escape(s.explanation)
        console.print(f"[bold]{s.strategy}[/] {text}", soft_wrap=True, highlight=False)


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column(first)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _geometry(planned: list[StrategyReport]) -> Table:
    table = _table("Layer groups", "strategy", "group", "layers", "tokens", "page", "takes", "per large page")
    table.columns[1].justify = "left"
    for s in planned:
        same: dict[tuple[object, ...], list[str]] = {}
        for g in s.groups:
            tokens = "a state" if g.kind in ("recurrent_state", "scratch") else str(g.page_tokens)
            sizes = (format_size(g.page_bytes), format_size(g.stride), str(g.pages_per_large_page))
            same.setdefault((str(g.layers), tokens, *sizes), []).append(g.name)
        for row, (columns, names) in enumerate(same.items()):
            name = names[0] if len(names) == 1 else f"{len(names)} like {names[0]}"
            last = row == len(same) - 1
            table.add_row(s.strategy if row == 0 else "", escape(name), *map(str, columns), end_section=last)
    return table


def _pools(planned: list[StrategyReport]) -> Table:
    table = _table("The buffer", "strategy", "in", "bytes", "size", "number", "prefix hits every")
    for s in planned:
        sizes = (f"{s.large_page_bytes:,}", format_size(s.large_page_bytes), f"{s.large_pages:,}")
        if s.divided_into == "fixed parts":
            sizes = ("-", "-", str(len(s.groups)))
        table.add_row(s.strategy, s.divided_into, *sizes, f"{s.hit_tokens:,} tokens")
    return table


def _capacity(planned: list[StrategyReport]) -> Table:
    table = _table("Sequences that fit (share of what exact bytes allow)", "strategy")
    for length in planned[0].lengths:
        images = f" + {length.image_tokens:,} of images" if length.image_tokens else ""
        table.add_column(f"{length.tokens:,} tokens{images}", justify="right")
    for s in planned:
        table.add_row(s.strategy, *(f"{x.sequences:,} ({x.sequences / x.bound:.0%})" for x in s.lengths))
    table.add_row("[dim]exact bytes[/]", *(f"[dim]{x.bound:,.1f}[/]" for x in planned[0].lengths))
    return table


def _waste(planned: list[StrategyReport], memory: int) -> Table:
    table = _table("A full buffer, by cause (shares of the buffer)", "strategy", "tokens", "needed", *WASTE)
    for s in planned:
        for row, x in enumerate(s.lengths):
            table.add_row(
                s.strategy if row == 0 else "",
                f"{x.tokens:,}",
                *(f"{x.waste[cause] / memory:.1%}" for cause in ("needed", *WASTE)),
                end_section=row == len(s.lengths) - 1,
            )
    return table
