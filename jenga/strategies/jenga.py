"""JENGA: large pages that any layer type may take and cut to its own size, with a geometry chosen for little waste."""

from __future__ import annotations

from collections.abc import Sequence

from jenga.layers import LayerType
from jenga.layout import choose_layout
from jenga.strategies.base import Plan, Share, Workload, group_of, require_pages
from jenga.strategies.pools import TwoLevel

NAME = "jenga"


def plan(model: str, types: Sequence[LayerType], memory_bytes: int, workload: Workload) -> Plan:
    """See `jenga.strategies.base.Strategy`."""
    contents = tuple((Share(t, t.layers),) for t in types)
    tokens = max((t.block_tokens for t in types if not t.is_state), default=1)
    groups = [
        group_of(t.name, shares, tokens if t.is_state else t.block_tokens)
        for t, shares in zip(types, contents, strict=True)
    ]
    layout = choose_layout(groups, memory_bytes)
    units = memory_bytes // layout.large_page_bytes
    require_pages(NAME, model, memory_bytes, layout.large_page_bytes, units, len(groups) + 1)
    return Plan(
        strategy=NAME,
        model=model,
        memory_bytes=memory_bytes,
        layout=layout,
        contents=contents,
        shape=TwoLevel(units, tuple(g.ratio for g in layout.groups)),
        explanation=layout.reason,
    )
