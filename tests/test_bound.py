"""The bound of exact bytes: by hand, and as it was measured before (DESIGN section 3)."""

from __future__ import annotations

import random

import pytest

from jenga.bound import RequestSize, exact_bytes, residency_bound
from jenga.layers import Counts, LayerType
from jenga.models import known_models, load_model
from jenga.policies import CrossAttention, FullAttention, RecurrentState
from jenga.strategies import STRATEGIES, Workload, make_plan

MEMORY = 40 << 30


def test_by_hand() -> None:
    types = [
        LayerType("full", FullAttention(), 3, cell_bytes=10),
        LayerType("state", RecurrentState(), 2, state_bytes=1000),
        LayerType("images", CrossAttention(), 1, cell_bytes=7, counts=Counts.IMAGES),
    ]
    size = RequestSize(17, image_tokens=5)
    assert exact_bytes(types, size) == 32 * 30 + 2000 + 16 * 7
    assert exact_bytes(types, size, by_token=True) == 17 * 30 + 2000 + 5 * 7
    bound = residency_bound(types, [size, RequestSize(1)], 100_000)
    assert bound.mean_bytes == (3072 + 480 + 2000) / 2
    assert bound.requests == 100_000 / bound.mean_bytes
    assert bound.requests_by_token > bound.requests


def test_bad_calls() -> None:
    types = [LayerType("images", CrossAttention(), 1, cell_bytes=7, counts=Counts.IMAGES)]
    with pytest.raises(ValueError, match="at least one request size"):
        residency_bound(types, [], 1)
    with pytest.raises(ValueError, match="any number fits"):
        residency_bound(types, [RequestSize(10)], 1)


@pytest.mark.parametrize("name", known_models())
def test_no_strategy_passes_it(name: str) -> None:
    types = load_model(name).layer_types()
    for tokens in (100, 5000):
        bound = residency_bound(types, [RequestSize(tokens)], MEMORY).requests
        for strategy in STRATEGIES:
            assert make_plan(strategy, name, types, MEMORY, Workload((tokens,))).capacity(tokens) <= bound


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("falcon-h1-34b", 1.72),
        ("kimi-linear-48b", 1.34),
        ("qwen3-next-80b", 1.21),
        ("gemma-3-27b", 1.13),
        ("gemma-3-1b", 1.08),
        ("mimo-v2-flash", 1.13),
        ("gemma-2-27b", 1.00),
        ("gpt-oss-120b", 1.00),
        ("ministral-8b", 1.00),
        ("llama-3.1-8b", 1.00),
    ],
)
def test_gain_over_vllm_on_short_chat(name: str, gain: float) -> None:
    """64 to 512 tokens in, up to 96 out, as measured with vLLM's own planner."""
    draw = random.Random(0)
    sizes = [RequestSize(draw.randint(64, 512) + draw.randint(0, 96)) for _ in range(1000)]
    types = load_model(name).layer_types()
    plan = make_plan("vllm", name, types, MEMORY)
    stock = sum(plan.sequence(s.tokens).total for s in sizes) / len(sizes)
    assert stock / residency_bound(types, sizes, MEMORY).mean_bytes == pytest.approx(gain, abs=0.015)
