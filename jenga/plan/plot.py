"""The comparison as a picture: a full buffer by cause, one bar per strategy, one panel per length."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from jenga.plan.report import PlanReport
from jenga.units import format_size

matplotlib.use("Agg")

CAUSES = {
    "needed": "#2b6cb0",
    "tail": "#90cdf4",
    "padding": "#ed8936",
    "droppable": "#e53e3e",
    "stranded": "#d69e2e",
    "reserved": "#718096",
    "free": "#e2e8f0",
}


def draw(report: PlanReport, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    planned = [s for s in report.strategies if s.error is None]
    lengths = len(planned[0].lengths) if planned else 0
    figure = Figure(figsize=(3.2 * max(1, lengths) + 1, 4), layout="constrained")
    figure.suptitle(f"{report.model}: {format_size(report.memory_bytes)} of KV memory, full")
    axes = figure.subplots(1, max(1, lengths), sharey=True, squeeze=False)[0]
    names = [s.strategy for s in planned]
    for column in range(lengths):
        axis = axes[column]
        bottom = [0.0] * len(planned)
        for cause, colour in CAUSES.items():
            shares = [100 * s.lengths[column].waste[cause] / report.memory_bytes for s in planned]
            axis.bar(names, shares, bottom=bottom, color=colour, label=cause)
            bottom = [b + x for b, x in zip(bottom, shares, strict=True)]
        for x, s in enumerate(planned):
            axis.text(x, 101.0, f"{s.lengths[column].sequences:,}", ha="center", va="bottom", fontsize=8)
        axis.set_title(f"{planned[0].lengths[column].tokens:,} tokens (sequences above)", fontsize=9)
        axis.set_ylim(0, 108)
        axis.tick_params(axis="x", rotation=45)
    axes[0].set_ylabel("share of the buffer, %")
    if planned:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(CAUSES), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
