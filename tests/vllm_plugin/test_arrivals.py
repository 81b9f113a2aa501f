"""What a waiting request will find is evicted last, and its events are told when they happen."""

from __future__ import annotations

import pytest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from jenga.vllm_plugin import arrivals, events
from tests.vllm_plugin.test_steady_steps import MODELS, PAGE, installed, manager

__all__ = ["installed"]

PROMPT = 40
HASHER = get_request_block_hasher(PAGE, sha256)


def request(theme: int, name: str = "") -> Request:
    """One of many prompts that share nothing."""
    tokens = [theme * 1000 + i for i in range(PROMPT)]
    return Request(name or str(theme), tokens, SamplingParams(max_tokens=1), None, block_hasher=HASHER)


def serve(kv: KVCacheManager, theme: int) -> None:
    """Compute a prompt, page by page as states want it, and end."""
    asked = request(theme)
    blocks, hit, _ = kv.get_computed_blocks(asked)
    kv.new_step_starts()
    asked.num_computed_tokens = hit
    while asked.num_computed_tokens < PROMPT:
        count = min(PAGE, PROMPT - asked.num_computed_tokens)
        first = asked.num_computed_tokens == hit and hit
        granted = kv.allocate_slots(asked, count, hit, blocks) if first else kv.allocate_slots(asked, count)
        assert granted is not None
        asked.num_computed_tokens += count
    kv.free(asked)


def found(kv: KVCacheManager, theme: int) -> int:
    return kv.get_computed_blocks(request(theme))[1]


class Told:
    """As much of a scheduler as is asked for."""

    def __init__(self, kv: KVCacheManager) -> None:
        self.kv_cache_manager = kv
        self.kv_event_publisher = None
        self.arrived: list[str] = []
        self.requests: dict[str, Request] = {}

    def _enqueue_waiting_request(self, request: Request) -> None:
        self.arrived.append(request.request_id)

    connector = None
    log_stats = False
    spec_decode_metrics_level = "none"


@pytest.mark.parametrize("name", ["windows", "states"])
def test_what_a_waiting_request_will_find_is_evicted_last(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "add_request", Scheduler.add_request)  # restored afterwards
    arrivals.install()
    assert name in MODELS

    def left(waits: bool) -> list[int]:
        """Prompts that are still there when the caches have been too small for all."""
        kv = manager(name, monkeypatch, caching=True, sparse=True)
        served = 0
        while found(kv, 0) or not served:
            serve(kv, served)
            served += 1
        assert served > 2, "the caches hold several prompts"
        kv = manager(name, monkeypatch, caching=True, sparse=True)
        scheduler = Told(kv)
        for theme in range(served - 1):
            serve(kv, theme)
        before = found(kv, 0)
        assert before
        if waits:
            Scheduler.add_request(scheduler, request(0, "waits"))  # type: ignore[arg-type]
            assert scheduler.arrived == ["waits"]
        serve(kv, served)
        kv.coordinator.check()
        return [theme for theme in range(served - 1) if found(kv, theme) == before]

    assert 0 not in left(waits=False)
    assert 0 in left(waits=True)


def test_events_are_told_before_the_step_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def schedule(self: object) -> str:
        told.append("scheduled")
        return "the step"

    for owner, name in (
        (Scheduler, "__init__"),
        (Scheduler, "reset_prefix_cache"),
        (KVCacheCoordinator, "emit_cached_block_events"),
        (EngineCore, "jenga_event_stream"),
        (EngineCore, "jenga_cache_snapshot"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name, None), raising=False)  # restored afterwards
    monkeypatch.setattr(Scheduler, "schedule", schedule)
    monkeypatch.setattr(events, "flush", lambda scheduler: told.append("told"))
    events.install()
    assert Scheduler.schedule(object()) == "the step"  # type: ignore[arg-type]
    assert told == ["scheduled", "told"]
