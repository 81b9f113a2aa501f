"""PagedAttention: every attention layer is full attention, one block table, one page size.

A page holds `block_tokens` tokens of all attention layers together, so what a sliding window or a chunk lets go
stays, and image layers hold a place for every token of text and image alike.  Recurrent states do not fit that idea:
as in the engines that the JENGA paper measured, they lie in a region of their own, fixed at start; it is sized
here for the workload's typical length, which is kinder than a fixed number of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm

from jenga.layers import Counts, LayerType
from jenga.layout import GroupLayout, Layout
from jenga.policies import FullAttention
from jenga.strategies.base import Plan, Share, Workload, group_of, partitioned_layout, require_pages
from jenga.strategies.pools import TwoLevel
from jenga.strategies.tuning import split

NAME = "paged"


def plan(model: str, types: Sequence[LayerType], memory_bytes: int, workload: Workload) -> Plan:
    """See `jenga.strategies.base.Strategy`."""
    attention = [t for t in types if not t.is_state]
    states = [t for t in types if t.is_state]
    block = lcm(*(t.block_tokens for t in attention)) if attention else 1
    contents = []
    groups = []
    if attention:
        shares = tuple(Share(t, t.layers) for t in attention)
        contents.append(shares)
        groups.append(replace(group_of("attention", shares, block), policy=FullAttention()))
    for state in states:
        shares = (Share(state, state.layers),)
        contents.append(shares)
        groups.append(group_of(state.name, shares, block))
    if states:
        parts = split(NAME, model, groups, [Counts.ALL] * len(groups), memory_bytes, workload)
        return Plan(
            strategy=NAME,
            model=model,
            memory_bytes=memory_bytes,
            layout=partitioned_layout(groups, parts, "all attention layers in one page; states in a fixed region"),
            contents=tuple(contents),
            shape=parts,
            explanation=f"pages of {block} tokens for all attention layers as if full; recurrent states in a region "
            f"fixed at start, {parts.usable[-1]} of them, sized for {_lengths(workload)} tokens",
        )
    page = groups[0].page_bytes
    units = memory_bytes // page
    require_pages(NAME, model, memory_bytes, page, units, 2)
    return Plan(
        strategy=NAME,
        model=model,
        memory_bytes=memory_bytes,
        layout=Layout(page, (GroupLayout(groups[0], 1, page),), 0.0, 0.0, "one page size"),
        contents=tuple(contents),
        shape=TwoLevel(units, (1,)),
        explanation=f"pages of {block} tokens for all {groups[0].layers} layers, every layer as full attention",
    )


def _lengths(workload: Workload) -> str:
    return "/".join(str(n) for n in workload.tokens)
