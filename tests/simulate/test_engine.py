"""The simulated engine."""

from __future__ import annotations

import dataclasses
import time

import pytest

from jenga.allocator import EVICTION_CAUSES
from jenga.layers import LayerType
from jenga.policies import FullAttention, RecurrentState, SlidingWindow
from jenga.simulate import (
    Limits,
    Simulation,
    SimulationResult,
    StepCost,
    exact_plan,
    plan_for,
    simulate,
)
from jenga.traces import TraceRequest, agents, chat

FULL = LayerType("full", FullAttention(), layers=4, cell_bytes=256)
WINDOW = LayerType("window", SlidingWindow(128), layers=12, cell_bytes=256)
STATE = LayerType("state", RecurrentState(), layers=12, state_bytes=20_000, block_tokens=1)
MODELS = {"full": [FULL], "window": [WINDOW, FULL], "state": [STATE, FULL], "all": [STATE, WINDOW, FULL]}
STRATEGIES = ("paged", "max", "gcd", "static", "vllm", "jenga", "exact")
MEMORY = 8 << 20


def run(types: list[LayerType], strategy: str, trace: list[TraceRequest], memory: int = MEMORY) -> SimulationResult:
    return simulate(plan_for(strategy, "model", types, memory, trace), types, trace)


def alone(tokens: int, output: int, serial: int = 0, arrival: float = 0.0) -> TraceRequest:
    blocks = tuple(range(serial << 20, (serial << 20) + -(-tokens // 16)))
    return TraceRequest(serial, arrival, tokens, output, blocks, 16, tokens)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", sorted(MODELS))
def test_serves_every_request_and_gives_all_memory_back(model: str, strategy: str) -> None:
    trace = list(agents(120, seed=3, concurrent=16))
    types = MODELS[model]
    plan = plan_for(strategy, model, types, 64 << 20, trace)
    simulation = Simulation(plan, types, trace, limits=Limits(batched_tokens=256))
    result = simulation.run()
    assert result.rejected == 0
    assert result.output_tokens == sum(r.output_tokens for r in trace)
    assert result.prompt_tokens == sum(r.prompt_tokens for r in trace)
    assert 0 < result.hit_tokens < result.prompt_tokens
    assert len(simulation.cache) == 0
    assert all(group.live == 0 for group in simulation.cache.pool.usage().groups)
    for sample in result.samples:
        assert sum(sample.bytes_by_cause.values()) == 64 << 20
        assert min(sample.bytes_by_cause.values()) >= 0


def test_one_request_takes_the_steps_it_should() -> None:
    cost = StepCost(overhead_s=1.0, weight_bytes=1e-9, active_parameters=1e-9)
    trace = [alone(1000, 10)]
    result = simulate(
        plan_for("jenga", "m", [FULL], MEMORY, trace), [FULL], trace, cost=cost, limits=Limits(batched_tokens=300)
    )
    # Four chunks, the last of which gives the first token, then nine more tokens.
    assert result.seconds == pytest.approx(13, abs=0.01)
    assert result.ttft_s.p50 == pytest.approx(4, abs=0.01)


def test_an_equal_prompt_hits_all_but_its_last_tokens() -> None:
    for types, granularity in ((MODELS["full"], 16), (MODELS["window"], 16), (MODELS["state"], 16)):
        first, second = alone(1000, 4), alone(1000, 4)
        second = dataclasses.replace(second, serial=1, arrival_s=1e6)
        result = run(types, "jenga", [first, second])
        assert result.hit_granularity == granularity
        assert result.hit_tokens == 992


def test_states_are_kept_where_prompts_part() -> None:
    """The second request cannot resume at the end of the shared prefix, but leaves a state there for the third."""
    shared = tuple(range(40))
    trace = [
        TraceRequest(i, i * 1e6, 1000, 4, (*shared, *range(1000 * (i + 1), 1000 * (i + 1) + 23)), 16, 1000)
        for i in range(3)
    ]
    assert run(MODELS["full"], "jenga", trace).hit_tokens == 2 * 640
    assert run(MODELS["state"], "jenga", trace).hit_tokens == 640
    assert run(MODELS["state"], "jenga", trace[:2]).hit_tokens == 0


def test_freeing_what_no_hit_can_reach_leaves_more_to_hit() -> None:
    trace = list(agents(400, seed=3, concurrent=24))
    types = MODELS["state"]
    plan = plan_for("jenga", "model", types, 24 << 20, trace)
    frees, keeps = (
        Simulation(dataclasses.replace(plan, free_unreachable=free), types, trace, sampling=False)
        for free in (True, False)
    )
    assert frees.run().hit_tokens > 1.1 * keeps.run().hit_tokens
    cause = EVICTION_CAUSES.index("forgotten")
    forgotten = [sum(group[cause] for group in s.cache.pool.counters().evicted_by_cause) for s in (frees, keeps)]
    assert forgotten[0] > 0 == forgotten[1]


def test_preempted_requests_finish_and_their_repeated_work_is_counted() -> None:
    trace = [alone(100, 400, serial) for serial in range(40)]
    result = run([FULL], "jenga", trace, memory=FULL.layers * FULL.cell_bytes * 2000)
    assert result.preemptions > 0
    assert result.output_tokens == 40 * 400
    assert result.recomputed_tokens + result.resumed_hit_tokens > 0
    assert result.rejected == 0


def test_a_request_that_can_never_fit_is_rejected_wherever_it_stands_in_the_queue() -> None:
    memory = FULL.layers * FULL.cell_bytes * 2000
    whole = alone(3000, 10, serial=1)
    late = alone(1900, 300, serial=3)  # its prompt fits, its answer does not
    result = run([FULL], "jenga", [alone(100, 10), whole, alone(100, 10, serial=2), late], memory)
    assert result.rejected == 2
    assert result.output_tokens == 20


def test_prefix_caching_can_be_off() -> None:
    trace = list(agents(60))
    plan = plan_for("jenga", "m", [FULL], MEMORY, trace)
    assert simulate(plan, [FULL], trace, limits=Limits(prefix_caching=False)).hit_tokens == 0


def test_arrivals_are_waited_for() -> None:
    result = run([FULL], "jenga", [alone(100, 10), alone(100, 10, serial=1, arrival=50.0)])
    assert 50 < result.seconds < 52
    assert result.ttft_s.p99 < 1
    assert result.resident_peak == 1


def test_nothing_is_better_than_the_bound() -> None:
    trace = list(chat(600))
    types = MODELS["all"]
    bound = run(types, "exact", trace)
    assert bound.saturated_share > 0.5
    for strategy in STRATEGIES[:-1]:
        assert run(types, strategy, trace).resident_mean <= bound.resident_mean * 1.01


def test_padding_and_droppable_memory_are_told_apart() -> None:
    trace = [alone(2000, 20, serial) for serial in range(30)]
    paged = run(MODELS["window"], "paged", trace).steady()
    jenga = run(MODELS["window"], "jenga", trace).steady()
    # 12 of 16 layers keep 2000 tokens and need 128.
    assert 0.5 < paged["droppable"] < 0.75
    assert jenga["droppable"] < 0.02


def test_image_tokens_take_memory_only_in_the_layers_that_read_them() -> None:
    from jenga.layers import Counts
    from jenga.policies import CrossAttention

    cross = LayerType("cross", CrossAttention(), layers=4, cell_bytes=256, counts=Counts.IMAGES)
    trace = list(chat(100, image_tokens=1600))
    results = {s: run([FULL, cross], s, trace) for s in ("paged", "jenga", "exact")}
    assert results["jenga"].hit_tokens == 0
    assert results["jenga"].resident_mean > 0.95 * results["exact"].resident_mean
    assert results["paged"].resident_mean < 0.8 * results["jenga"].resident_mean
    assert results["paged"].steady()["droppable"] > 0.3


def test_fast_enough() -> None:
    """A million simulated tokens take seconds; the limit leaves room for slow and busy machines."""
    trace = list(chat(3000))
    tokens = sum(r.tokens for r in trace)
    start = time.process_time()
    simulate(exact_plan("m", MODELS["window"], MEMORY), MODELS["window"], trace)
    assert (time.process_time() - start) / tokens * 1e6 < 20


def test_a_smaller_sample_of_memory_still_covers_the_run() -> None:
    result = run([FULL], "jenga", [alone(100, 400, serial) for serial in range(40)], 1 << 21)
    times = [s.time_s for s in result.samples]
    assert times == sorted(times)
    assert len(times) <= 257
    assert times[-1] > 0.9 * result.seconds


def test_the_host_adds_to_a_step_what_the_device_does_not_hide() -> None:
    cost = StepCost(
        overhead_s=1.0,
        prefill_s=5.0,
        request_s=0.5,
        weight_bytes=2.0,
        active_parameters=1.0,
        bytes_per_s=1.0,
        flops_per_s=2.0,
    )
    assert cost.step(4, 3.0, running=4) == 1.0 + 4 * 0.5 + 4.0 + 3.0  # 4 s of arithmetic, more than 2 s of weights
    assert cost.step(1, 0.0, running=1, prefills=True) == 1.0 + 0.5 + 5.0  # launches take longer than the device
    assert cost.step(8, 0.0, running=1, prefills=True) == 1.0 + 0.5 + 8.0


def test_constants_of_the_host_may_be_zero_and_no_others() -> None:
    assert StepCost.from_json('{"prefill_s": 0, "request_s": 0.001}') == StepCost(request_s=0.001)
    with pytest.raises(ValueError, match="overhead_s must be a positive number, not 0"):
        StepCost.from_json('{"overhead_s": 0}')
    for bad in ("NaN", "Infinity", "true"):
        with pytest.raises(ValueError, match="request_s must be a positive number or 0"):
            StepCost.from_json(f'{{"request_s": {bad}}}')
    with pytest.raises(ValueError, match="prefill_s must be a positive number or 0, not -1"):
        StepCost.from_json('{"prefill_s": -1}')
