"""Page geometry: how the small pages of unlike layer groups share one buffer.

A group's kernels find page ``s`` at ``s * stride``, so inside a large page of ``L`` bytes a group with ``ratio`` pages
has ``stride = L / ratio``, exactly.  The paper takes the least common multiple of the page sizes: no padding, but
a large page can hold hundreds of small ones (Falcon-H1: 130), which makes it slow to come free.  A few bytes of
padding buy a small ratio: 16:265 becomes 1:17 for 2.6 % of the state pages.  `choose_layout` weighs the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import lcm

from jenga.policies import LayerPolicy

TYPICAL_TOKENS = (512, 4096, 32768)
"""Sequence lengths for which waste is estimated, in tokens."""

STRANDING = 0.10
"""Free slots of a window that slides, as a share of its memory: its pages come free one by one, anywhere.  Simulated
on Mooncake's conversations: 7 to 12 % for ratios from 3 to 10 (Gemma-3-27B, MiMo-V2-Flash, a character-like 70B)."""

FILLING = 8
"""Large pages that each group with a ratio above 1 holds beyond what its live pages fill: those being filled, and those
that wait for the last live page beside cached ones.  Simulated: 5 to 13 (Granite-4, Nemotron-H, Falcon-H1)."""

MAX_PADDING = 0.10
"""Most that any group's page may be padded, as a share of the padded page."""

ROUNDING = (0.01, 0.03)
"""By how much a ratio may be lowered to make it rounder, as a share."""

MAX_LARGEST_RATIO = 64
"""How many of the biggest small pages a padded large page may hold."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one type that share a block table.

    `page_bytes` is one page of all its layers together; `alignment` (bytes) divides the distance between pages.
    """

    name: str
    policy: LayerPolicy
    layers: int
    page_tokens: int
    page_bytes: int
    alignment: int = 1


@dataclass(frozen=True)
class GroupLayout:
    """Where a group's small pages lie: page ``s`` starts at byte ``s * stride``, `ratio` of them in a large page.

    Pages too big for one large page are cut into `parts` with as many layers each, that lie in a large page each: a
    part with number ``s`` starts at byte ``s * part_stride``, and `stride` is what all parts of a page take.
    """

    group: LayerGroup
    ratio: int
    stride: int
    parts: int = 1

    @property
    def part_stride(self) -> int:
        """Bytes from one part of a page to the next in the same large page."""
        return self.stride // self.parts

    @property
    def padding(self) -> int:
        """Bytes of every small page that hold nothing."""
        return self.stride - self.group.page_bytes


@dataclass(frozen=True)
class Layout:
    """The geometry chosen, and what it is expected to cost."""

    large_page_bytes: int
    groups: tuple[GroupLayout, ...]
    expected_padding: float
    """Share of the memory in use that is padding, at the worst of `TYPICAL_TOKENS`."""
    expected_stranded: float
    """Share of the memory expected in partly used large pages, the null page and the remainder."""
    reason: str

    @property
    def ratios(self) -> tuple[int, ...]:
        """Small pages per large page, by group."""
        return tuple(g.ratio for g in self.groups)

    @property
    def parts(self) -> tuple[int, ...]:
        """Large pages that a small page lies in, by group."""
        return tuple(g.parts for g in self.groups)

    def large_pages(self, memory_bytes: int) -> int:
        """Large pages that fit in `memory_bytes`."""
        return memory_bytes // self.large_page_bytes

    def bytes_needed(self, tokens: int) -> int:
        """Bytes of whole large pages that one sequence of `tokens` tokens needs if it shares with nobody."""
        return self.large_page_bytes * sum(
            -(-g.group.policy.pages_needed(tokens, g.group.page_tokens) // g.ratio) * g.parts for g in self.groups
        )


class LayoutError(ValueError):
    """No geometry fits; the message names the group and the remedy."""


def exact_layout(groups: Sequence[LayerGroup], memory_bytes: int) -> Layout:
    """The paper's geometry: the large page is the least common multiple of the (aligned) small pages."""
    strides = [_round_up(g.page_bytes, g.alignment) for g in groups]
    large = lcm(*strides)
    ratios = [large // s for s in strides]
    return _assess(groups, _held(groups), large, ratios, memory_bytes, "exact least common multiple")


def padded_layouts(groups: Sequence[LayerGroup]) -> Iterable[tuple[int, list[int]]]:
    """Candidate (large page bytes, ratios) with every page padded by at most `MAX_PADDING`.

    A large page must be a multiple of every ratio, so unlike ratios inflate it: 375, 1,309 and 13,000 have a least
    common multiple of 51 million, 368, 1,280 and 12,800 one of 294,400.  So ratios are also tried a little rounder.
    """
    strides = [_round_up(g.page_bytes, g.alignment) for g in groups]
    biggest = max(strides)
    for count in range(1, MAX_LARGEST_RATIO + 1):
        # Rounded down the small pages are padded, rounded up the big ones.
        most = [count * biggest // s for s in strides]
        above = [-(-count * biggest // s) for s in strides]
        for ratios in (most, above, *([_rounder(r, share) for r in most] for share in ROUNDING)):
            unit = lcm(*(r * g.alignment for r, g in zip(ratios, groups, strict=True)))
            large = _round_up(max(r * s for r, s in zip(ratios, strides, strict=True)), unit)
            if all(1 - r * g.page_bytes / large <= MAX_PADDING for r, g in zip(ratios, groups, strict=True)):
                yield large, ratios


def _rounder(ratio: int, share: float) -> int:
    """The number from ``ratio * (1 - share)`` to `ratio` that the highest power of two divides; the largest such."""
    least = max(1, ratio - int(ratio * share))
    step = 1
    while ratio // (2 * step) * (2 * step) >= least:
        step *= 2
    return ratio // step * step


def choose_layout(groups: Sequence[LayerGroup], memory_bytes: int) -> Layout:
    """The candidate with the least expected waste (padding plus stranding) in `memory_bytes`.

    One that leaves every group a large page of its own beside the null page is preferred to all that do not.

    Raises:
        LayoutError: no groups, a group without bytes, tokens or alignment, or no large page fits into the memory.
    """
    if not groups:
        raise LayoutError("a layout needs at least one layer group")
    for group in groups:
        for quantity, value in (
            ("page_bytes", group.page_bytes),
            ("page_tokens", group.page_tokens),
            ("alignment", group.alignment),
        ):
            if value < 1:
                raise LayoutError(f"group {group.name}: {quantity} is {value}, it must be at least 1")
    held = _held(groups)
    padded = dict.fromkeys((large, tuple(ratios)) for large, ratios in padded_layouts(groups))
    candidates = [exact_layout(groups, memory_bytes)] + [
        _assess(groups, held, large, ratios, memory_bytes, "padded to a small ratio") for large, ratios in padded
    ]
    chosen = min(
        candidates,
        key=lambda c: (
            max(0, len(groups) + 1 - c.large_pages(memory_bytes)),
            c.expected_padding + c.expected_stranded,
            c.large_page_bytes,
        ),
    )
    if not chosen.large_pages(memory_bytes):
        least = min(c.large_page_bytes for c in candidates)
        raise LayoutError(
            f"{memory_bytes} bytes of KV memory do not hold one large page: the smallest for groups "
            f"{', '.join(g.name for g in groups)} takes {least} bytes; give at least {(len(groups) + 1) * least} "
            "bytes, or more tensor-parallel ranks"
        )
    return chosen


_Held = Sequence[Sequence[tuple[int, bool]]]
"""By `TYPICAL_TOKENS`, then by group: pages that a sequence holds, and whether it has dropped others meanwhile."""


def _held(groups: Sequence[LayerGroup]) -> _Held:
    return [
        [
            (
                g.policy.pages_needed(tokens, g.page_tokens),
                g.policy.token_pages and g.policy.resident_from(tokens, g.page_tokens) > 0,
            )
            for g in groups
        ]
        for tokens in TYPICAL_TOKENS
    ]


def _assess(
    groups: Sequence[LayerGroup], held: _Held, large: int, ratios: Sequence[int], memory_bytes: int, reason: str
) -> Layout:
    chosen = tuple(GroupLayout(g, r, large // r) for g, r in zip(groups, ratios, strict=True))
    padding = stranded = 0.0
    for lengths in held:
        total = padded = sliding = 0.0
        for place, (pages, slides) in zip(chosen, lengths, strict=True):
            total += pages * place.stride
            padded += pages * place.padding
            if slides:
                sliding += pages * place.stride * (1 - 1 / place.ratio)
        total = total or 1.0  # groups that hold nothing at this length waste nothing
        # The worst length counts for padding: a workload has one, and no other length makes up for it.
        padding = max(padding, padded / total)
        stranded += STRANDING * sliding / total / len(held)
    # The null page costs a whole large page, and the end of the buffer half of one on average.
    filling = (FILLING * sum(1 for r in ratios if r > 1) + 1.5) * large
    return Layout(
        large_page_bytes=large,
        groups=chosen,
        expected_padding=padding,
        expected_stranded=min(1.0, stranded + filling / max(1, memory_bytes)),
        reason=reason,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
