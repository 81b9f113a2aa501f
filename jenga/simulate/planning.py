"""Plans for a trace."""

from __future__ import annotations

from collections.abc import Sequence

from jenga.layers import LayerType
from jenga.simulate.exact import NAME as EXACT
from jenga.simulate.exact import exact_plan
from jenga.strategies import Plan, Workload, make_plan
from jenga.traces import TraceRequest

_SAMPLED = 64


def plan_for(
    strategy: str, model: str, types: Sequence[LayerType], memory_bytes: int, trace: Sequence[TraceRequest]
) -> Plan:
    """A plan tuned for `trace`, where the strategy can be tuned; `exact` is the bound.

    Raises:
        jenga.strategies.PlanError: no such strategy, or too little memory.
    """
    if strategy == EXACT:
        return exact_plan(model, types, memory_bytes)
    # Lengths half way through the answers, evenly over the trace's lengths.
    lengths = sorted(r.prompt_tokens + r.output_tokens // 2 for r in trace)
    tokens = tuple(lengths[:: max(1, len(lengths) // _SAMPLED)])
    images = sum(r.image_tokens for r in trace) // max(1, len(trace))
    return make_plan(strategy, model, types, memory_bytes, Workload(tokens, images) if tokens else None)
