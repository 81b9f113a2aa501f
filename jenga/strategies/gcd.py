"""GCD: the buffer in chunks of the greatest common divisor of the page sizes; a page takes adjacent chunks.

No padding and no stranded slots, but kernels need a page in one piece, so a freed gap serves only pages that are
not larger: with pages of 256 and 384 bytes, a free chunk of 128 between two live pages serves nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from jenga.layers import LayerType
from jenga.layout import GroupLayout, Layout
from jenga.strategies.base import Plan, Share, Workload, group_of, require_pages
from jenga.strategies.pools import Chunks

NAME = "gcd"


def plan(model: str, types: Sequence[LayerType], memory_bytes: int, workload: Workload) -> Plan:
    """See `jenga.strategies.base.Strategy`."""
    contents = tuple((Share(t, t.layers),) for t in types)
    tokens = max((t.block_tokens for t in types if not t.is_state), default=1)
    groups = [
        group_of(t.name, shares, tokens if t.is_state else t.block_tokens)
        for t, shares in zip(types, contents, strict=True)
    ]
    strides = [-(-g.page_bytes // g.alignment) * g.alignment for g in groups]
    chunk = gcd(*strides)
    spans = tuple(s // chunk for s in strides)
    units = memory_bytes // chunk
    null = max((s for s, t in zip(spans, types, strict=True) if not t.is_state), default=0)
    require_pages(NAME, model, memory_bytes, chunk, units, null + sum(spans))
    return Plan(
        strategy=NAME,
        model=model,
        memory_bytes=memory_bytes,
        layout=Layout(
            chunk,
            tuple(GroupLayout(g, 1, s) for g, s in zip(groups, strides, strict=True)),
            0.0,
            0.0,
            "adjacent chunks",
        ),
        contents=contents,
        shape=Chunks(units, spans, null),
        explanation=f"chunks of {chunk} bytes; adjacent chunks per page: "
        + ", ".join(f"{g.name} {s}" for g, s in zip(groups, spans, strict=True)),
    )
