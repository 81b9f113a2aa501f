"""Static: a fixed part of the buffer for every layer type, tuned for the workload's typical sequence lengths."""

from __future__ import annotations

from collections.abc import Sequence

from jenga.layers import LayerType
from jenga.strategies.base import Plan, Share, Workload, group_of, partitioned_layout
from jenga.strategies.tuning import split

NAME = "static"


def plan(model: str, types: Sequence[LayerType], memory_bytes: int, workload: Workload) -> Plan:
    """See `jenga.strategies.base.Strategy`."""
    contents = tuple((Share(t, t.layers),) for t in types)
    tokens = max((t.block_tokens for t in types if not t.is_state), default=1)
    groups = [
        group_of(t.name, shares, tokens if t.is_state else t.block_tokens)
        for t, shares in zip(types, contents, strict=True)
    ]
    parts = split(NAME, model, groups, [t.counts for t in types], memory_bytes, workload)
    shares_of_memory = [n * s / memory_bytes for n, s in zip(parts.slots, parts.strides, strict=True)]
    return Plan(
        strategy=NAME,
        model=model,
        memory_bytes=memory_bytes,
        layout=partitioned_layout(groups, parts, "a fixed part for every layer type"),
        contents=contents,
        shape=parts,
        explanation="fixed parts: "
        + ", ".join(f"{g.name} {share:.1%}" for g, share in zip(groups, shares_of_memory, strict=True)),
    )
