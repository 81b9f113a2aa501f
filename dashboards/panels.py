"""Panels with what every panel must have: title, unit, what it shows, and what to do when it looks bad."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DynamicConfigValue,
    FieldColorModeId,
    Panel,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.source import Source

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "jenga"
REFRESH = "10s"
GOOD, BAD, LINE = "#009E73", "#D55E00", "#009E73"
"""Colours that colour-blind people tell apart (Okabe and Ito's palette, like CAUSE_COLOURS)."""
CAUSE_COLOURS = {
    "needed": "#0072B2",
    "cached": "#56B4E9",
    "tail": "#F0E442",
    "droppable": "#E69F00",
    "padding": "#CC79A7",
    "stranded": "#D55E00",
    "reserved": "#7F7F7F",
    "remainder": "#4D4D4D",
    "free": "#D9D9D9",
}


@dataclass(frozen=True)
class Text:
    """What a panel says of itself."""

    title: str
    unit: str
    """Grafana's name of it: bytes, s, percentunit, reqps, short, ..."""
    shows: str
    if_bad: str

    @property
    def description(self) -> str:
        """Shown by the panel's (i)."""
        return f"{self.shows}\n\n**When it looks bad:** {self.if_bad}"


@dataclass(frozen=True)
class Line:
    """One query and how its series are called; `{{label}}` stands for a label's value."""

    expr: str
    legend: str


# Panels' builders share these methods, but no type that has them: hence Any.
def series(
    text: Text,
    *lines: Line,
    stacked: bool = False,
    line: str = "",
    colours: Mapping[str, str] | None = None,
    maximum: float | None = None,
    legend_right: bool = False,
    width: int = 12,
    height: int = 8,
    repeat: str = "",
) -> Builder[Panel]:
    """Values over time; `line`: the series that is not stacked with the others; `colours` by series name.

    `repeat` makes one panel for each value of that variable.
    """
    panel: Any = timeseries.Panel()
    panel = _common(panel, text, lines, width, height).min(0).fill_opacity(70 if stacked else 10).line_width(1)
    panel = panel.show_points(common.VisibilityMode.NEVER)
    place = common.LegendPlacement.RIGHT if legend_right else common.LegendPlacement.BOTTOM
    legend = common_builders.VizLegendOptions().show_legend(True).display_mode(common.LegendDisplayMode.LIST)
    panel = panel.legend(legend.placement(place).calcs([]))
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.NONE)
    panel = panel.tooltip(tooltip)
    if maximum is not None:
        panel = panel.max(maximum)
    if stacked:
        panel = panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    for name, colour in (colours or {}).items():
        fixed = {"mode": FieldColorModeId.FIXED, "fixedColor": colour}
        panel = panel.override_by_name(name, [DynamicConfigValue(id_val="color", value=fixed)])
    if line:
        panel = panel.override_by_name(
            line,
            [
                DynamicConfigValue(id_val="custom.stacking", value={"mode": common.StackingMode.NONE, "group": "B"}),
                DynamicConfigValue(id_val="custom.fillOpacity", value=0),
                DynamicConfigValue(id_val="custom.lineWidth", value=2),
                DynamicConfigValue(id_val="color", value={"mode": FieldColorModeId.FIXED, "fixedColor": LINE}),
            ],
        )
    if repeat:
        panel = panel.repeat(repeat).repeat_direction("h").max_per_row(2)
    return cast(Builder[Panel], panel)


def number(
    text: Text, expr: str, *, bad_above: float | None = None, bad_below: float | None = None, width: int = 6
) -> Builder[Panel]:
    """One value with its recent course, coloured by at most one limit."""
    panel: Any = _common(stat.Panel(), text, [Line(expr, text.title)], width, 4)
    steps = [Threshold(value=None, color=GOOD)]
    if bad_above is not None:
        steps.append(Threshold(value=bad_above, color=BAD))
    elif bad_below is not None:
        steps = [Threshold(value=None, color=BAD), Threshold(value=bad_below, color=GOOD)]
    panel = panel.thresholds(grafana.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    panel = panel.color_scheme(grafana.FieldColor().mode(FieldColorModeId.THRESHOLDS))
    panel = panel.graph_mode(common.BigValueGraphMode.AREA).color_mode(common.BigValueColorMode.VALUE)
    panel = panel.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
    return cast(Builder[Panel], panel)


def heat(
    text: Text, line: Line, *, buckets: str = "", maximum: float | None = None, width: int = 12, height: int = 8
) -> Builder[Panel]:
    """Shades over time: one row per series, or per bucket of a histogram; `buckets` is its observations' unit."""
    panel: Any = _common(heatmap.Panel(), text, [line], width, height, buckets=bool(buckets)).calculate(False)
    colour = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Viridis").steps(64).min(0)
    if maximum is not None:
        colour = colour.max(maximum)
    panel = panel.color(colour).cell_gap(1).cell_values(heatmap.CellValues().unit(text.unit)).show_legend()
    panel = panel.y_axis(heatmap.YAxisConfig().axis_placement(common.AxisPlacement.LEFT).unit(buckets or "short"))
    return cast(Builder[Panel], panel)


def _common(panel: Any, text: Text, lines: Any, width: int, height: int, *, buckets: bool = False) -> Any:
    panel = panel.title(text.title).description(text.description).unit(text.unit)
    panel = panel.datasource(DATASOURCE).span(width).height(height)
    for letter, line in zip(string.ascii_uppercase[: len(lines)], lines, strict=True):
        query = prometheus.Dataquery().expr(line.expr).legend_format(line.legend).ref_id(letter).range()
        form = PromQueryFormat.HEATMAP if buckets else PromQueryFormat.TIME_SERIES
        panel = panel.with_target(query.format(form).datasource(DATASOURCE))
    return panel


def page(title: str, uid: str, about: str, source: Source, variables: tuple[str, ...] = ()) -> grafana.Dashboard:
    """An empty dashboard with its variables (all of the source's, if none is named), and links to the others."""
    board = grafana.Dashboard(title).uid(uid).description(about).tags([TAG]).readonly().refresh(REFRESH)
    board = board.time("now-30m", "now").timezone("browser").tooltip(DashboardCursorSync.CROSSHAIR)
    link = grafana.DashboardLink("Jenga").type(DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(True)
    board = board.link(link.keep_time(True).include_vars(True))
    board = board.with_variable(grafana.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    for name in variables or source.variables:
        board = board.with_variable(_variable(name, source.unfiltered))
    return board


def _variable(name: str, s: Source) -> grafana.QueryVariable:
    """A choice of values of a label."""
    before = s.variables[: s.variables.index(name)]
    selector = s.ours("jenga_buffer_bytes", *(f'{s.label_of(other)}=~"${other}"' for other in before))
    label = s.label_of(name)
    variable = grafana.QueryVariable(name).label(name.capitalize()).datasource(DATASOURCE)
    variable = variable.query({"query": f"label_values({selector}, {label})", "refId": f"variable-{name}"})
    variable = variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    everything = VariableOption(selected=True, text=["All"], value=["$__all"])
    return variable.multi(True).include_all(True).all_value(".*").current(everything)
