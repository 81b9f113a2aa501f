"""Ways to lay out unlike layers' KV memory, side by side behind one interface: `make_plan`."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from jenga.layers import LayerType
from jenga.strategies import gcd, jenga, maximum, paged, static, vllm
from jenga.strategies.base import Plan, PlanError, SequenceBytes, Share, Strategy, Workload
from jenga.strategies.pools import Pool

STRATEGIES: dict[str, Strategy] = {
    paged.NAME: paged.plan,
    maximum.NAME: maximum.plan,
    gcd.NAME: gcd.plan,
    static.NAME: static.plan,
    vllm.NAME: vllm.plan,
    jenga.NAME: jenga.plan,
}
"""By name, in the order in which tables show them."""


def require_strategy(name: str) -> None:
    """Refuse an unknown strategy.

    Raises:
        PlanError: names the known ones.
    """
    if name not in STRATEGIES:
        close = get_close_matches(name, STRATEGIES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise PlanError(f"unknown strategy {name!r}.{hint} Known: {', '.join(STRATEGIES)}")


def make_plan(
    strategy: str, model: str, types: Sequence[LayerType], memory_bytes: int, workload: Workload | None = None
) -> Plan:
    """Lay out `types`, the layers of `model`, in a buffer of `memory_bytes` bytes.

    Raises:
        PlanError: no such strategy, no layers, or too little memory; the message says what to do.
    """
    require_strategy(strategy)
    if not types:
        raise PlanError(f"{model} has no layers with KV memory")
    return STRATEGIES[strategy](model, types, memory_bytes, workload or Workload())


__all__ = [
    "STRATEGIES",
    "Plan",
    "PlanError",
    "Pool",
    "SequenceBytes",
    "Share",
    "Strategy",
    "Workload",
    "make_plan",
    "require_strategy",
]
