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


_QUANTILES = (
    "910 953 1002 1050 1087 1122 1169 1216 1293 1401 1520 1644 1813 1948 2141 2359 2636 2890 3216 3552 3900 4179 "
    "4439 4664 4887 5118 5347 5647 5959 6241 6563 6901 7243 7664 8062 8469 8891 9299 9751 10251 10781 11343 11947 "
    "12450 13188 13859 14456 15188 15877 16610 17463 18353 19238 20425 21880 23709 25339 27319 29595 32534 37758 "
    "45839 61724 94133"
)
MOONCAKE_LENGTHS = [int(tokens) for tokens in _QUANTILES.split()]
"""64 quantiles of the lengths, half way through the answer, of Mooncake's conversation trace (FAST'25, Apache-2.0)."""


@pytest.mark.parametrize(
    ("name", "over", "gain"),
    [
        ("gemma-3-27b", "paged", 4.43),
        ("gemma-3-1b", "paged", 5.35),
        ("mimo-v2-flash", "paged", 8.85),
        ("gemma-2-27b", "paged", 1.60),
        ("gpt-oss-120b", "paged", 1.98),
        ("ministral-8b", "paged", 1.14),
        ("falcon-h1-34b", "vllm", 1.06),
        ("kimi-linear-48b", "vllm", 1.07),
        ("qwen3-next-80b", "vllm", 1.03),
        ("gemma-3-27b", "vllm", 1.04),
        ("gemma-3-1b", "vllm", 1.02),
        ("mimo-v2-flash", "vllm", 1.01),
        ("gpt-oss-120b", "vllm", 1.00),
    ],
)
def test_gain_at_mooncake_lengths(name: str, over: str, gain: float) -> None:
    """To 3 % of what was measured before, with other quantiles of the same trace."""
    sizes = [RequestSize(tokens) for tokens in MOONCAKE_LENGTHS]
    types = load_model(name).layer_types()
    plan = make_plan(over, name, types, MEMORY)
    stock = sum(plan.sequence(s.tokens).total for s in sizes) / len(sizes)
    assert stock / residency_bound(types, sizes, MEMORY).mean_bytes == pytest.approx(gain, rel=0.03)
