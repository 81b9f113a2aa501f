"""MAX: one page size, that of the largest page; the other layer types put more tokens into theirs.

What is left of a page when no further block of tokens fits is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

from jenga.layers import LayerType
from jenga.layout import GroupLayout, Layout
from jenga.strategies.base import Plan, Share, Workload, group_of, require_pages
from jenga.strategies.pools import TwoLevel

NAME = "max"


def plan(model: str, types: Sequence[LayerType], memory_bytes: int, workload: Workload) -> Plan:
    """See `jenga.strategies.base.Strategy`."""
    largest = max(t.page_bytes(t.block_tokens) * t.layers for t in types)
    unit = lcm(*(t.alignment for t in types))
    page = -(-largest // unit) * unit
    tokens = {
        t.name: t.block_tokens * max(1, page // (t.page_bytes(t.block_tokens) * t.layers))
        for t in types
        if not t.is_state
    }
    # A state is kept at the ends of the largest attention page, or of its own block if there is none.
    state_tokens = max(tokens.values(), default=0)
    contents = tuple((Share(t, t.layers),) for t in types)
    groups = [
        GroupLayout(group_of(t.name, shares, tokens.get(t.name, state_tokens or t.block_tokens)), 1, page)
        for t, shares in zip(types, contents, strict=True)
    ]
    units = memory_bytes // page
    require_pages(NAME, model, memory_bytes, page, units, len(groups) + 1)
    return Plan(
        strategy=NAME,
        model=model,
        memory_bytes=memory_bytes,
        layout=Layout(page, tuple(groups), 0.0, 0.0, "every page as large as the largest"),
        contents=contents,
        shape=TwoLevel(units, (1,) * len(groups)),
        explanation=f"every page takes {page} bytes, as the largest does; tokens per page: "
        + ", ".join(
            f"{g.group.name} {g.group.page_tokens if not s[0].type.is_state else 'one state'}"
            for g, s in zip(groups, contents, strict=True)
        ),
    )
