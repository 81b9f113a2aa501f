"""The comparison as immutable data, for tables, plots and JSON alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jenga.bound import RequestSize, residency_bound
from jenga.layers import LayerType
from jenga.strategies import Plan, PlanError, Workload, make_plan

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class GroupRow:
    """One layer group of a plan."""

    name: str
    kind: str
    layers: int
    page_tokens: int
    page_bytes: int
    """Contents of a page."""
    stride: int
    """Bytes that a page takes."""
    pages_per_large_page: int


@dataclass(frozen=True)
class LengthRow:
    """A buffer full of sequences of one length."""

    tokens: int
    image_tokens: int
    sequences: int
    bound: float
    """Sequences that exact bytes would allow, in pages of the smallest legal block."""
    bytes_per_sequence: int
    waste: dict[str, int]
    """Bytes of the buffer by cause; they sum to its size."""


@dataclass(frozen=True)
class StrategyReport:
    """One strategy's plan, or why it has none."""

    strategy: str
    error: str | None = None
    explanation: str = ""
    divided_into: str = ""
    """What the buffer is handed out in: large pages, fixed parts or chunks."""
    large_page_bytes: int = 0
    """Bytes of one of these; for fixed parts, the unit in which they are counted."""
    large_pages: int = 0
    hit_tokens: int = 0
    groups: tuple[GroupRow, ...] = ()
    lengths: tuple[LengthRow, ...] = ()


@dataclass(frozen=True)
class PlanReport:
    """All strategies for one model in one buffer."""

    schema_version: int
    model: str
    source: str
    tp: int
    memory_bytes: int
    strategies: tuple[StrategyReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def plan_report(
    model: str,
    source: str,
    types: Sequence[LayerType],
    memory_bytes: int,
    strategies: Sequence[str],
    lengths: Sequence[int],
    *,
    image_tokens: int = 0,
    tp: int = 1,
) -> PlanReport:
    """Plan with every one of `strategies`, and fill the buffer with sequences of each of `lengths` tokens.

    A strategy that cannot plan the model is reported with its reason.
    """
    workload = Workload(tuple(lengths), image_tokens)
    reports = []
    for name in strategies:
        try:
            plan = make_plan(name, model, types, memory_bytes, workload)
        except PlanError as error:
            reports.append(StrategyReport(name, error=str(error)))
            continue
        reports.append(
            StrategyReport(
                strategy=name,
                explanation=plan.explanation,
                divided_into=plan.shape.divided_into,
                large_page_bytes=plan.large_page_bytes,
                large_pages=plan.large_pages,
                hit_tokens=plan.hit_tokens,
                groups=tuple(
                    GroupRow(
                        name=p.group.name,
                        kind=p.group.policy.kind,
                        layers=p.group.layers,
                        page_tokens=p.group.page_tokens,
                        page_bytes=p.group.page_bytes,
                        stride=p.stride,
                        pages_per_large_page=p.ratio,
                    )
                    for p in plan.groups
                ),
                lengths=tuple(_fill(plan, types, n, image_tokens) for n in lengths),
            )
        )
    return PlanReport(SCHEMA_VERSION, model, source, tp, memory_bytes, tuple(reports))


def _fill(plan: Plan, types: Sequence[LayerType], tokens: int, image_tokens: int) -> LengthRow:
    count = plan.capacity(tokens, image_tokens)
    return LengthRow(
        tokens=tokens,
        image_tokens=image_tokens,
        sequences=count,
        bound=residency_bound(types, [RequestSize(tokens, image_tokens)], plan.memory_bytes).requests,
        bytes_per_sequence=plan.sequence(tokens, image_tokens).total,
        waste=plan.waste(count, tokens, image_tokens),
    )
