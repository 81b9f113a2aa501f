"""What a real engine exports is what its own snapshot says, between any two steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jenga.demo.catalogue import make
from jenga.metrics.definitions import EVICTION_BUCKETS, METRICS, REGISTRY
from jenga.metrics.engine import EngineReport
from tests.vllm_plugin.harness import prompts

RUNNER = Path(__file__).with_name("report_run.py")
ENGINES = {
    # Sliding windows: enough memory for a few requests, so that they wait, preempt and evict.
    "gemma3-recall": {"kv_cache_memory_bytes": 3 << 20, "block_size": 32},
    "granite-hybrid": {"kv_cache_memory_bytes": 6 << 20, "block_size": 32, "enable_prefix_caching": True},
}


@pytest.fixture(scope="module", params=ENGINES)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One engine's run."""
    folder = tmp_path_factory.mktemp(request.param)
    spec = {
        "model": str(make(request.param, folder)),
        "engine": {
            "dtype": "bfloat16",
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
            **ENGINES[request.param],
        },
        "prompts": prompts(24, 320, shared=4),
        "max_tokens": 40,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(folder / "spec.json"), str(folder / "answer.json")],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "JENGA": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


@pytest.fixture
def total(ran: dict[str, Any]) -> Callable[..., float]:
    """Sum of the exported values of a name, over the labels not given."""

    def of(name: str, **labels: str) -> float:
        return sum(v for n, has, v in ran["exported"] if n == name and labels.items() <= has.items())

    return of


@pytest.mark.timeout(600)
def test_the_run_met_what_it_is_for(ran: dict[str, Any]) -> None:
    seen = ran["seen"]
    assert seen["reports"] > 50
    assert min(seen["shared"], seen["droppable"], seen["waiting"], seen["stock"]) > 0, seen


def test_values_are_the_snapshot_s(ran: dict[str, Any], total: Callable[..., float]) -> None:
    report = EngineReport.from_dict(ran["report"])
    assert total("jenga_memory_bytes") == total("jenga_buffer_bytes") == report.memory.buffer_bytes
    assert total("jenga_large_pages") == report.memory.large_pages
    for cause, value in report.memory.by_cause().items():
        assert total("jenga_memory_bytes", state=cause) == value
    for g, group in enumerate(report.memory.groups):
        assert total("jenga_pages", group=group.name, state="cached") == group.cached_pages
        owned = total("jenga_large_pages", group=group.name, state="owned") * report.memory.large_page_bytes
        stranded = total("jenga_memory_bytes", group=group.name, state="stranded")
        assert total("jenga_fragmentation_ratio", group=group.name) == (stranded / owned if owned else 0)
        evicted = report.counters.evicted_by_cause[g]
        assert total("jenga_evicted_pages_total", group=group.name) == sum(evicted)
        # All but what was told to be forgotten has an age; a large page has one for all of its pages.
        ages = [
            s for s in ran["exported"] if s[0] == "jenga_eviction_age_seconds_bucket" and s[1]["group"] == group.name
        ]
        assert [float(s[1]["le"]) for s in ages] == [*EVICTION_BUCKETS, float("inf")]
        events = total("jenga_eviction_age_seconds_count", group=group.name)
        assert evicted[1] + evicted[2] <= events <= sum(evicted[:3])
        assert events == ages[-1][2] == sum(report.ages[g].counts)
        assert total("jenga_eviction_age_seconds_sum", group=group.name) == pytest.approx(sum(report.ages[g].sums))
    assert total("jenga_evicted_large_pages_total") == report.counters.evicted_large_pages
    assert sum(map(sum, report.counters.evicted_by_cause)) > 0


def test_totals_are_vllm_s_own(ran: dict[str, Any], total: Callable[..., float]) -> None:
    vllm = ran["vllm"]
    assert total("jenga_preemptions_total") == vllm["vllm:num_preemptions"]
    assert total("jenga_admitted_requests_total") == 48 + vllm["vllm:num_preemptions"]
    assert 0 < total("jenga_admission_refusals_total") <= total("jenga_admitted_requests_total")
    # vLLM leaves out requests that come back after a preemption.
    assert total("jenga_lookup_tokens_total") >= vllm["vllm:prefix_cache_queries"]
    assert total("jenga_hit_tokens_total") >= vllm["vllm:prefix_cache_hits"] > 0
    assert total("jenga_requests", state="resident") == total("jenga_requests", state="waiting") == 0
    for group in ran["report"]["memory"]["groups"]:
        assert total("jenga_group_hit_tokens_total", group=group["name"]) > 0


def test_every_metric_of_the_table_is_exported_from_the_start(ran: dict[str, Any]) -> None:
    found = {name for name, _, _ in ran["exported"]}
    states = any(ran["report"]["checkpoints"])
    for metric in METRICS:
        if metric.source == "engine" and (states or "checkpoints" not in metric.name):
            assert metric.name in found or f"{metric.name}_count" in found, metric.name
    assert {
        n.removesuffix("_created").removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for n in found
    } <= {n for m in REGISTRY for n in (m, m.removesuffix("_total"))}


def test_checkpoints_and_a_reset(ran: dict[str, Any]) -> None:
    before, after = ran["report"], ran["after_reset"]
    for g, kept in enumerate(ran["kept_before_reset"]):
        if kept is not None:
            assert kept > 0
            assert after["checkpoints"][g]["kept"] == 0
            assert after["checkpoints"][g]["dropped"][3] == kept
            assert before["checkpoints"][g]["made"] == after["checkpoints"][g]["made"]
    forgotten = [
        new[3] - old[3] for new, old in zip(*(r["counters"]["evicted_by_cause"] for r in (after, before)), strict=True)
    ]
    assert forgotten == [group["cached_pages"] for group in before["memory"]["groups"]]
