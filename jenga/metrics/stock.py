"""What vLLM's own plan would hold for the same requests: pages of one size for all groups, none shared between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from jenga.layers import pages_held
from jenga.policies import CrossAttention, LayerPolicy

STEP = 16
"""Tokens; lengths in one step count as its middle, so that few lengths have to be worked out."""

_KNOWN = 1 << 16


@dataclass(frozen=True)
class StockGroup:
    """Groups of that plan that always hold equally many blocks."""

    policy: LayerPolicy
    block_tokens: int
    groups: int


@dataclass(frozen=True)
class StockPlan:
    """vLLM's plan for one model."""

    block_bytes: int
    """Of every block, padding included; a block belongs to one group."""
    groups: tuple[StockGroup, ...]
    _known: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, block_bytes: int, groups: Iterable[tuple[LayerPolicy, int]]) -> StockPlan:
        """From the policy and the tokens per block of every group."""
        counts: dict[tuple[LayerPolicy, int], int] = {}
        for group in groups:
            counts[group] = counts.get(group, 0) + 1
        return cls(block_bytes, tuple(StockGroup(*group, count) for group, count in counts.items()))

    def blocks(self, tokens: int, encoder_tokens: int = 0) -> int:
        """Blocks that one request with `tokens` computed tokens holds."""
        return sum(
            group.groups
            * pages_held(
                group.policy, encoder_tokens if isinstance(group.policy, CrossAttention) else tokens, group.block_tokens
            )
            for group in self.groups
        )

    def held_bytes(self, lengths: Iterable[int], shared: Mapping[LayerPolicy, int], encoder_tokens: int = 0) -> int:
        """Bytes that requests of these lengths hold together, each length taken as the middle of its `STEP`.

        `shared[policy]` are the tokens that requests hold together, and that so count more than once in their lengths.
        `encoder_tokens` are those of all requests.
        """
        known, blocks = self._known, 0
        if len(known) > _KNOWN:
            known.clear()
        for length in lengths:
            step = length // STEP
            found = known.get(step)
            if found is None:
                found = known[step] = self.blocks(step * STEP + STEP // 2)
            blocks += found
        if encoder_tokens:
            blocks += self.blocks(0, encoder_tokens)
        for group in self.groups:
            blocks -= group.groups * (shared.get(group.policy, 0) // group.block_tokens)
        return max(0, blocks) * self.block_bytes
