"""Fixed splits of the buffer, sized for a workload's typical sequences."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from jenga.layers import Counts, pages_held
from jenga.layout import LayerGroup
from jenga.strategies.base import PlanError, Workload
from jenga.strategies.pools import Partitions


def split(
    strategy: str,
    model: str,
    groups: Sequence[LayerGroup],
    counts: Sequence[Counts],
    memory_bytes: int,
    workload: Workload,
) -> Partitions:
    """Give every group the share of the buffer that sequences of the typical lengths, mixed evenly, hold in it.

    Besides, windows get room for one long step: they slide only when it is done.

    ``counts[g]`` says which tokens group ``g`` stores something for.

    Raises:
        PlanError: not even one sequence of the shortest typical length fits.
    """
    strides = [-(-g.page_bytes // g.alignment) * g.alignment for g in groups]
    mean = [
        Fraction(
            sum(pages_held(g.policy, counted.length(n, workload.image_tokens), g.page_tokens) for n in workload.tokens),
            len(workload.tokens),
        )
        for g, counted in zip(groups, counts, strict=True)
    ]
    # A null page for every block table; states have none.
    nulls = tuple(int(g.policy.token_pages) for g in groups)
    longest = max(workload.tokens)
    steps = [
        max(0, -(-min(longest, workload.chunk_tokens) // g.page_tokens) - pages_held(g.policy, longest, g.page_tokens))
        if g.policy.token_pages and counted is not Counts.IMAGES
        else 0
        for g, counted in zip(groups, counts, strict=True)
    ]
    fixed = [null + step for null, step in zip(nulls, steps, strict=True)]
    usable = memory_bytes - sum(n * s for n, s in zip(fixed, strides, strict=True))
    per_sequence = sum(m * s for m, s in zip(mean, strides, strict=True))
    sequences = usable / per_sequence if per_sequence else Fraction(0)
    slots = tuple(n + max(1, int(sequences * m)) for n, m in zip(fixed, mean, strict=True))
    taken = sum(n * s for n, s in zip(slots, strides, strict=True))
    if sequences <= 0 or taken > memory_bytes:
        raise PlanError(
            f"{model}, strategy {strategy}: a fixed split of {memory_bytes} bytes leaves some layer type without a "
            f"page (one of each takes {sum(strides)} bytes); give more memory, a higher --tp, or shorter typical "
            "sequences"
        )
    return Partitions(slots, tuple(strides), nulls)
