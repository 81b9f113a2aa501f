"""Into how many parts the pages of one layer type are cut.

Whole pages need the fewest block tables.  But the large page is at least as big as the biggest page, and 72 Mamba
states together (300 MB in Falcon-H1-34B) make it slow to come free and cost whole large pages at the buffer's edges.
Cut into several parts, each with some of the layers, the same states fit smaller large pages.  The parts of a page are
granted, cached and evicted together: one group for who keeps the books, one block table each for the kernels.
`choose_grouping` weighs that against the price of a block table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from jenga.layout import GroupLayout, LayerGroup, Layout, LayoutError, choose_layout

PART_MS = 0.1
"""What one more part, which is a block table more, costs a step: 0.014 to 0.019 ms of scheduling (64 requests,
Falcon-H1-34B in eight parts against one; docs/speed.md), and in the worker its indices: 7 more launches in a step of
decodes, some 19 in one with prompts, which takes several times as long (docs/benchmarks.md)."""

LAYER_MS = 0.3
"""What a layer takes in a step of decodes: on an H100, 12 of Gemma-3-27B and 24 of Falcon-H1-34B, whose attention
and states count by themselves, 4.5 to 6 ms with up to 32 requests."""

MAX_PARTS = 12
"""Groups that one type's layers are cut into, at most."""


@dataclass(frozen=True)
class Grouping:
    """A layout with one group for every type, its pages cut into parts."""

    layout: Layout
    overhead: float
    """Share of the buffer expected to be padding, stranded, reserved or left over."""

    @property
    def parts(self) -> tuple[int, ...]:
        """By type."""
        return self.layout.parts


def choose_grouping(types: Sequence[LayerGroup], memory_bytes: int, divisible: Sequence[int] | None = None) -> Grouping:
    """The grouping with the least overhead; `types` has one group for every layer type.

    ``divisible[i]`` must be divided by the number of groups that type ``i`` is cut into (default: its layers).

    Raises:
        jenga.layout.LayoutError: no types, a type without bytes, or too little memory for any grouping.
    """
    numbers = divisible or [t.layers for t in types]
    price = part_cost(types)
    best: Grouping | None = None
    refusal = LayoutError("a layout needs at least one layer group")
    for parts in sorted(product(*(_divisors(n) for n in numbers)), key=sum):
        # From here on the block tables alone cost more.
        if best is not None and price * sum(parts) >= _cost(best, price):
            break
        try:
            candidate = grouping(types, parts, memory_bytes)
        except LayoutError as error:  # a finer cut may fit
            refusal = error
            continue
        if best is None or _cost(candidate, price) < _cost(best, price):
            best = candidate
    if best is None:
        raise refusal
    return best


def grouping(types: Sequence[LayerGroup], parts: Sequence[int], memory_bytes: int) -> Grouping:
    """The best layout in which the pages of type ``i`` are cut into ``parts[i]``.

    Raises:
        ValueError: layers that cannot be divided so.
        jenga.layout.LayoutError: no types, a type without bytes, or too little memory.
    """
    layout = choose_layout([g for t, n in zip(types, parts, strict=True) for g in cut(t, n)], memory_bytes)
    places = iter(layout.groups)
    whole = []
    for kind, count in zip(types, parts, strict=True):
        first, *others = (next(places) for _ in range(count))
        assert all((p.ratio, p.stride) == (first.ratio, first.stride) for p in others), "equal parts, equal places"
        whole.append(GroupLayout(kind, first.ratio, first.stride * count, count))
    layout = replace(layout, groups=tuple(whole))
    return Grouping(layout, layout.expected_padding + layout.expected_stranded)


def cut(group: LayerGroup, parts: int) -> list[LayerGroup]:
    """`group` as `parts` equal groups.

    Raises:
        ValueError: its layers cannot be divided so.
    """
    if group.layers % parts:
        raise ValueError(f"group {group.name}: {group.layers} layers do not form {parts} equal groups")
    if parts == 1:
        return [group]
    return [
        replace(
            group,
            name=f"{group.name} {i + 1}/{parts}",
            layers=group.layers // parts,
            page_bytes=group.page_bytes // parts,
        )
        for i in range(parts)
    ]


def part_cost(types: Sequence[LayerGroup]) -> float:
    """What one more part may cost as a share of the buffer: its share of a step's time."""
    return PART_MS / (LAYER_MS * max(1, sum(t.layers for t in types)))


def _cost(grouping: Grouping, price: float) -> float:
    return grouping.overhead + price * sum(grouping.parts)


def _divisors(number: int) -> Iterator[int]:
    return (parts for parts in range(1, min(number, MAX_PARTS) + 1) if number % parts == 0)
