"""JENGA: large pages that any layer type may take and cut to its own size, with a geometry chosen for little waste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd, lcm

from jenga.grouping import Grouping, choose_grouping
from jenga.layers import LayerType
from jenga.layout import LayerGroup, LayoutError
from jenga.policies import FullAttention, LatentAttention, LatentIndexer
from jenga.strategies.base import Plan, PlanError, Share, Workload, group_of, require_pages
from jenga.strategies.pools import TwoLevel

NAME = "jenga"


def plan(model: str, types: Sequence[LayerType], memory_bytes: int, workload: Workload) -> Plan:
    """See `jenga.strategies.base.Strategy`."""
    merged = _merge(types)
    tokens = max((t.block_tokens for t in types if not t.is_state), default=1)
    whole = []
    for shares in merged:
        size = tokens if shares[0].type.is_state else lcm(*(s.type.block_tokens for s in shares))
        whole.append(group_of(" + ".join(s.type.name for s in shares), shares, size))
    try:
        grouping = choose_grouping(whole, memory_bytes, [gcd(*(s.layers for s in shares)) for shares in merged])
    except LayoutError as error:
        raise PlanError(f"{model}, strategy {NAME}: {error} (--tp)") from None
    layout = grouping.layout
    units = layout.large_pages(memory_bytes)
    require_pages(NAME, model, memory_bytes, layout.large_page_bytes, units, sum(layout.parts) + 1)
    return Plan(
        strategy=NAME,
        model=model,
        memory_bytes=memory_bytes,
        layout=layout,
        contents=tuple(merged),
        shape=TwoLevel(units, layout.ratios, widths=layout.parts),
        explanation=_explain(whole, grouping),
        # Pages of one group alone are as old as what stands behind them, or older: nothing is cut off.
        free_unreachable=len(merged) > 1,
        weighs_passes=True,
        refresh_waiting=True,
    )


def _merge(types: Sequence[LayerType]) -> list[tuple[Share, ...]]:
    """Types that keep pages for the same tokens by the same rules share a block table, whatever their bytes."""
    merged: dict[object, list[Share]] = {}
    for number, kind in enumerate(types):
        # Several states of one layer need not lie in one page.
        each = replace(kind, layers=kind.layers * kind.copies, copies=1)
        policy = FullAttention() if isinstance(kind.policy, LatentAttention | LatentIndexer) else kind.policy
        key = number if kind.is_state else (policy, kind.counts)
        merged.setdefault(key, []).append(Share(each, each.layers))
    return [tuple(shares) for shares in merged.values()]


def _explain(types: Sequence[LayerGroup], grouping: Grouping) -> str:
    layout = grouping.layout
    cuts = [f"{t.name} in {n} parts" for t, n in zip(types, grouping.parts, strict=True) if n > 1]
    ratios = ":".join(str(r) for r in dict.fromkeys(layout.ratios))
    return (
        f"large pages of {layout.large_page_bytes} bytes ({layout.reason}), pages in each {ratios}"
        + (f"; {', '.join(cuts)}, so that large pages stay small" if cuts else "")
        + f"; expected overhead {grouping.overhead:.2%} of the buffer: padding {layout.expected_padding:.2%}, "
        f"stranded slots, null page and remainder {layout.expected_stranded:.2%}"
    )
