"""How many replicas there should be: by hand, in a loop with Ray's own delays, and the way to Ray's controller."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig

from deployments import engine
from deployments.app import autoscaling
from deployments.autoscaling import (
    ADMITTED,
    KV_IN_USE,
    RESIDENT,
    WAITING,
    KvMemoryPolicy,
    Load,
    Target,
    arrivals,
    replicas_for,
    wanted,
)
from deployments.config import KvMemory, OngoingRequests

TARGET = Target(kv_in_use=0.7, waiting=0.1, slack=0.2)


@pytest.mark.parametrize(
    ("load", "replicas"),
    [
        (Load(0.0, 0, 0), 0.0),
        (Load(0.35, 8, 0), 0.5),
        (Load(0.7, 8, 0), 1.0),
        (Load(0.98, 8, 0), 1.4),
        # More come than are taken in.
        (Load(0.98, 8, 4, 1.5), 1.5 / 0.7),
        # Little memory is held, but requests wait: the batch is full, or prompts take long to compute.
        (Load(0.07, 20, 2), 1.0),
        (Load(0.07, 20, 2, 1.5), 1.5),
        (Load(0.07, 20, 1), 0.5),
        (Load(0.07, 20, 40), 1 / 0.7),
        # A backlog says nothing of how many, nor do rates of a few.
        (Load(1.0, 4, 400), 1 / 0.7),
        (Load(1.0, 4, 400, 0.2), 1 / 0.7),
        (Load(1.0, 4, 400, 50.0), 4.0),
        (Load(0.0, 0, 3), 1 / 0.7),
    ],
)
def test_load_of_one_replica(load: Load, replicas: float) -> None:
    assert replicas_for(load, TARGET) == pytest.approx(replicas)


def test_rate_of_arrivals_over_admissions() -> None:
    assert arrivals([], []) == 1.0
    assert arrivals([5], [3]) == 0.0, "one report: nobody came"
    assert arrivals([10, 14, 20], [0, 3, 5]) == 1.5
    assert arrivals([10, 20], [8, 3]) == 0.5
    assert arrivals([10, 10], [0, 7]) == 7.0


def full(part: float) -> Load:
    return Load(0.7 * part, 10, 0)


@pytest.mark.parametrize(
    ("parts", "silent", "present", "then"),
    [
        ([], 2, 2, 2),  # nobody tells anything: nothing changes
        ([1.0], 0, 1, 1),
        ([1.01], 0, 1, 2),
        ([1.4, 0.2], 0, 2, 2),  # one prefix is hot: that is the router's business
        ([0.5, 0.4], 0, 2, 2),  # within the slack: 0.9 of one replica, which leaves less than a fifth
        ([0.4, 0.4], 0, 2, 1),
        ([0.0, 0.0, 0.0], 0, 3, 1),
        ([0.4, 0.3], 1, 3, 3),  # one is silent: it may be full
        ([0.1, 0.1], 1, 3, 2),
        ([1.4], 0, 2, 2),  # the second one starts
        ([0.5], 0, 4, 1),  # demand is gone before the others came
        ([1.5], 0, 4, 4),  # two would do, but do not run yet
    ],
)
def test_how_many(parts: list[float], silent: int, present: int, then: int) -> None:
    assert wanted([full(part) for part in parts], silent, present, TARGET) == then


def context(loads: list[Load], target: int, config: Any, state: dict[str, Any]) -> Any:
    names = [str(number) for number in range(len(loads))]

    def points(*values: float) -> list[Any]:
        return [SimpleNamespace(value=value) for value in values]

    counted = {
        ADMITTED: {n: points(0, 100) for n in names},
        WAITING: {n: points(0, 100 * (load.arrivals - 1)) for n, load in zip(names, loads, strict=True)},
    }
    told = {
        KV_IN_USE: {n: load.kv_in_use for n, load in zip(names, loads, strict=True)},
        RESIDENT: {n: load.resident for n, load in zip(names, loads, strict=True)},
        WAITING: {n: load.waiting for n, load in zip(names, loads, strict=True)},
    }
    return SimpleNamespace(
        aggregated_metrics=told,
        raw_metrics=counted,
        running_replicas=names,
        current_num_replicas=len(names),
        target_num_replicas=target,
        total_num_requests=0,
        config=config,
        policy_state=state,
    )


@settings(max_examples=40, deadline=None)
@given(
    demand=st.floats(0, 8),
    first=st.integers(1, 8),
    start_s=st.integers(1, 120),
    unevenness=st.floats(0, 0.3),
)
def test_under_steady_demand_the_number_comes_to_rest_at_what_holds_it(
    demand: float, first: int, start_s: int, unevenness: float
) -> None:
    """`demand` in replicas at the target; those that are to come start `start_s` later."""
    settled = KvMemory(min=1, max=10, upscale_delay_s=30, downscale_delay_s=60)
    config = AutoscalingConfig(**autoscaling(settled))
    policy = _apply_autoscaling_config(KvMemoryPolicy(**config.policy.policy_kwargs))
    running, target, coming, state = first, first, 0, {}
    history = []
    now = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.serve.autoscaling_policy.time", SimpleNamespace(time=lambda: now))
        for tick in range(240):
            now = 5.0 * tick
            if target > running and now >= coming:
                running = target
            running = min(running, target)
            loads = []
            for number in range(running):
                share = demand / running * (1 + (unevenness if number % 2 else -unevenness) * (running % 2 == 0))
                held = min(1.0, 0.7 * share)  # more does not fit, and waits
                waiting = 10.0 if 0.7 * share > 1 else 0.0
                loads.append(Load(held, 10 * held, waiting, 0.7 * share / held if held else 1.0))
            before = target
            target, state = policy(context(loads, target, config, state))
            target = max(1, min(10, target))
            if target > before:
                coming = now + start_s
            history.append(target)
    assert len(set(history[-60:])) == 1, "it flaps"
    assert history[-1] >= min(10, math.ceil(demand - 1e-6))
    assert history[-1] <= max(1, math.ceil(demand / (1 - 0.2) + 1e-6)), "more than the slack explains"
    rises = sum(b > a for a, b in pairwise(history))
    falls = sum(b < a for a, b in pairwise(history))
    assert not (rises and falls), "it went past what is needed"


def test_silent_replicas_change_nothing() -> None:
    policy = KvMemoryPolicy(kv_in_use=0.7, waiting=0.1, slack=0.2)
    asked = context([], 3, None, {})
    asked.running_replicas = ["a", "b"]
    assert policy(asked) == (3, {})
    asked.aggregated_metrics = asked.raw_metrics = None
    assert policy(asked) == (3, {})


def test_the_policy_reaches_a_controller_that_lacks_this_package(tmp_path: Path) -> None:
    config = AutoscalingConfig(**autoscaling(KvMemory(kv_target=0.5)))
    (tmp_path / "policy").write_bytes(config.policy.get_serialized_policy_def() or b"")
    (tmp_path / "kwargs").write_text(json.dumps(config.policy.policy_kwargs))
    code = """
import json, sys
from types import SimpleNamespace
import cloudpickle
policy = cloudpickle.load(open("policy", "rb"))(**json.load(open("kwargs")))
told = {"jenga_kv_in_use": {"a": 1.0}, "jenga_resident": {"a": 4}, "jenga_waiting": {"a": 0}}
asked = SimpleNamespace(aggregated_metrics=told, raw_metrics={}, running_replicas=["a"], target_num_replicas=1)
print(policy(asked)[0])
assert not {"deployments", "ray"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2", done.stderr


def test_settings_in_rays_form() -> None:
    ours = AutoscalingConfig(**autoscaling(KvMemory(min=2, max=5, look_back_s=12, upscale_delay_s=1)))
    assert not ours.policy.is_default_policy_function()
    assert (ours.min_replicas, ours.max_replicas, ours.look_back_period_s, ours.metrics_interval_s) == (2, 5, 12, 4)
    rays = AutoscalingConfig(**autoscaling(OngoingRequests(signal="requests", target_ongoing_requests=9)))
    assert rays.policy.is_default_policy_function()
    assert (rays.target_ongoing_requests, rays.metrics_interval_s, rays.downscale_delay_s) == (9, 10, 600)


def test_a_replica_reports_what_the_policy_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(
        memory=SimpleNamespace(
            by_cause=lambda: {"needed": 50, "tail": 20, "droppable": 10, "cached": 100, "free": 20}, buffer_bytes=200
        ),
        requests=SimpleNamespace(resident=4, waiting=1),
        hits=SimpleNamespace(requests=9),
    )
    monkeypatch.setattr(engine, "EngineReport", SimpleNamespace(from_dict=lambda _: told))
    monkeypatch.setattr(engine, "report_samples", lambda _: ())
    server: Any = SimpleNamespace(_load=None)
    assert asyncio.run(engine.JengaServer.record_autoscaling_stats(server)) == {}
    assert not list(engine.JengaServer._samples(server, {}))
    stats = asyncio.run(engine.JengaServer.record_autoscaling_stats(server))
    assert stats == {KV_IN_USE: 0.4, RESIDENT: 4, WAITING: 1, ADMITTED: 9}, "what is only cached is not in use"
