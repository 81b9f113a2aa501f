"""Tables and a picture of a run of `throughput`: medians of its repeats, with the lowest and the highest."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jenga.checkpoints import PASS_TOKENS

Run = dict[str, Any]
COLUMNS: tuple[tuple[str, Callable[[Run], float | None], str], ...] = (
    ("tokens/s", lambda run: run["said_per_s"], ",.0f"),
    ("resident", lambda run: run["resident_mean"], ".0f"),
    ("TTFT p50, ms", lambda run: 1e3 * run["ttft_s"]["p50"], ",.0f"),
    ("TTFT p99, ms", lambda run: 1e3 * run["ttft_s"]["p99"], ",.0f"),
    ("TPOT p50, ms", lambda run: 1e3 * run["tpot_s"]["p50"], ".1f"),
    ("hits, % of possible", lambda run: share(run["cached_tokens"], run["possible_tokens"]), ".0f"),
    ("preempted", lambda run: run["preemptions"], ".0f"),
)
COLOURS = {
    "jenga": "#2f7ed8",
    f"jenga, pass_tokens {PASS_TOKENS}": "#a5c8f0",
    "stock": "#999999",
    "stock, no caching": "#c9c9c9",
    "hybrid manager off": "#e0a030",
}


def share(part: float, whole: float) -> float | None:
    """In percent; None of nothing."""
    return 100 * part / whole if whole else None


def text(values: Iterable[float | None], form: str) -> str:
    """Median, and lowest and highest where they read differently; empty without a value."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle, low, high = (format(f(known), form) for f in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def grouped(rows: Sequence[Run]) -> dict[tuple[str, str], dict[str, list[Run]]]:
    """Runs by model and workload, then by contender."""
    made: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for row in rows:
        for run in row.get("runs", ()):
            made.setdefault((row["model"], run["workload"]), {}).setdefault(row["contender"], []).append(run)
    return made


def markdown(rows: Sequence[Run]) -> str:
    """One table: a line for each contender of each workload, with its rate over stock's."""
    head = ["model", "workload", "", "tokens/s over stock's", *(name for name, _, _ in COLUMNS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * 3 + "|---:" * (len(head) - 3) + "|"]
    for (model, workload), contenders in grouped(rows).items():
        stock = contenders.get("stock")
        for number, (who, runs) in enumerate(contenders.items()):
            rate = statistics.median(run["said_per_s"] for run in runs)
            over = f"{rate / statistics.median(r['said_per_s'] for r in stock):.2f}" if stock and who != "stock" else ""
            cells = [text(map(take, runs), form) for _, take, form in COLUMNS]
            lines.append(
                "| " + " | ".join(["" if number else model, "" if number else workload, who, over, *cells]) + " |"
            )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Run], path: Path) -> None:
    """Bars of tokens per second and of the time to the first token, a row of axes for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows if row.get("runs")))
    cells = grouped(rows)
    figure, axes = pyplot.subplots(len(models), 2, figsize=(13, 3.4 * len(models)), squeeze=False)
    for model, (rates, firsts) in zip(models, axes, strict=True):
        here = {workload: found for (name, workload), found in cells.items() if name == model}
        for axis, title, take in (
            (rates, f"{model}: tokens per second", lambda run: run["said_per_s"]),
            (firsts, f"{model}: time to first token, p50 (ms)", lambda run: 1e3 * run["ttft_s"]["p50"]),
        ):
            for number, contenders in enumerate(here.values()):
                width = 0.8 / len(contenders)
                for place, (who, runs) in enumerate(contenders.items()):
                    values = [take(run) for run in runs]
                    middle = statistics.median(values)
                    spread = [[middle - min(values)], [max(values) - middle]]
                    at = number - 0.4 + width * (place + 0.5)
                    axis.bar(at, middle, width, yerr=spread, color=COLOURS[who], label=who, capsize=2)
            axis.set_title(title, fontsize=10, loc="left")
            axis.set_yscale("log")
            axis.set_xticks(range(len(here)), [textwrap.fill(each, 13) for each in here], fontsize=7)
            named = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
            axis.legend(named.values(), named.keys(), fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
