"""The GPU benchmark's calibration: constants found again in steps made from them, clients who wait for answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import calibrate
from benchmarks.gpu.workloads import agents, conversations
from jenga.simulate import Limits, StepCost
from jenga.strategies import make_plan

MODEL = "falcon-h1-34b"


def test_constants_are_found_again_in_the_steps_made_from_them(tmp_path: Path) -> None:
    types = calibrate.layer_types(MODEL, tmp_path)
    rates = {"weight_bytes": 1e10, "active_parameters": 5e9, "flops_per_s": 6e14}
    cost = StepCost(overhead_s=0.002, prefill_s=0.02, request_s=1e-4, **rates)
    rng = np.random.default_rng(1)
    rows = []
    for most, longest in ((20, 4000), (60, 200), (150, 1000), (100, 8000)):
        steps, now = [(0.0, 1, 0, 0, 1)], 0.0
        for _ in range(400):
            running = int(rng.integers(1, most))
            prompts = int(rng.integers(1, longest)) if rng.random() < 0.4 else 0
            cache = running * sum(kind.needed_bytes(300) for kind in types)
            now += cost.step(prompts + running, cache, running=running, prefills=prompts > 0)
            steps.append((now, running, 0, prompts, running))
        rows.append({"runs": [{"requests": 1, "prompt_tokens": 250, "said_tokens": 100, "step_times": steps}]})
    found, error = calibrate.fit(rows, types, 1e10)
    assert error < 0.01
    assert found.prefill_s == pytest.approx(cost.prefill_s, rel=0.05)
    assert found.request_s == pytest.approx(cost.request_s, rel=0.1)
    assert found.overhead_s == pytest.approx(cost.overhead_s, rel=0.2)
    assert found.flops_per_s == pytest.approx(cost.flops_per_s, rel=0.1)


def test_clients_ask_again_when_they_are_answered_and_resume_what_they_said(tmp_path: Path) -> None:
    types = calibrate.layer_types(MODEL, tmp_path)
    plan = make_plan("jenga", MODEL, types, 4 << 30)
    asked = replace(conversations(3, 4, turns=3), at_a_time=2)
    result = calibrate.served(asked, plan, types, StepCost(), Limits())
    assert (result.requests, result.resident_peak) == (12, 2)
    assert result.output_tokens == sum(answer for client in asked.clients for _, answer in client.turns)
    shared = calibrate.served(agents(3, 24, shared=1), plan, types, StepCost(), Limits())
    assert shared.resident_peak == 16
    assert shared.hit_tokens >= 5 * 480  # those who ask when the first sixteen are answered
