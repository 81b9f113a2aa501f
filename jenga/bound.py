"""How many requests exact bytes would allow: the bound that no memory manager can pass.

A request needs, for every layer type, the pages that its rules keep, each of exactly its own bytes: no padding, no
page that could be dropped, nothing reserved, nothing stranded.  Two granularities: *pages* of the smallest block that
kernels take (16 tokens, MLA 64), which is what a paged cache can reach, and *tokens*, which not even paging pays for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jenga.layers import LayerType


@dataclass(frozen=True)
class RequestSize:
    """A request's length, in tokens, at the moment whose memory is asked for."""

    tokens: int
    image_tokens: int = 0


@dataclass(frozen=True)
class Bound:
    """Requests of a workload that fit at once, on average, if memory were spent exactly."""

    requests: float
    """In pages of the smallest legal block."""
    requests_by_token: float
    """In single tokens."""
    mean_bytes: float
    """Mean bytes of a request, in such pages."""


def exact_bytes(types: Iterable[LayerType], size: RequestSize, by_token: bool = False) -> int:
    """Bytes that one request needs, in pages of the smallest legal block, or `by_token`."""
    return sum(
        kind.needed_bytes(
            kind.counts.length(size.tokens, size.image_tokens), None if by_token or kind.is_state else kind.block_tokens
        )
        for kind in types
    )


def residency_bound(types: Sequence[LayerType], sizes: Sequence[RequestSize], memory_bytes: int) -> Bound:
    """The bound for requests of `sizes`, each as likely to be resident as any other, in `memory_bytes` bytes.

    Give each request's lengths over its life to weigh it by time (half its output is a fair middle).

    Raises:
        ValueError: no sizes, or none of them needs memory.
    """
    if not sizes:
        raise ValueError("the bound needs at least one request size")
    mean = sum(exact_bytes(types, s) for s in sizes) / len(sizes)
    by_token = sum(exact_bytes(types, s, by_token=True) for s in sizes) / len(sizes)
    if not mean or not by_token:
        raise ValueError("none of these requests needs memory, so any number fits")
    return Bound(memory_bytes / mean, memory_bytes / by_token, mean)
