"""Priorities, prompt log-probabilities, several samples, structured output, salts, aborts and resets, beside stock."""

from __future__ import annotations

from pathlib import Path

import pytest

from jenga.demo import make
from tests.vllm_plugin.harness import prompts, run

RUNNER = Path(__file__).with_name("features_run.py")


def test_features_beside_stock(tmp_path: Path) -> None:
    model = make("granite-hybrid", tmp_path / "models")
    spec = {
        "model": str(model),
        "prompts": prompts(6, 600),  # long enough for a state at the end to be worth a pass
        "engine": {
            "dtype": "float32",
            "max_model_len": 640,
            "block_size": 32,
            "kv_cache_memory_bytes": 24 << 20,
            "enable_prefix_caching": True,
            "max_num_batched_tokens": 200,
            "max_num_seqs": 4,
        },
    }
    jenga, stock = (run(tmp_path, name, spec, jenga=name == "jenga", runner=RUNNER) for name in ("jenga", "stock"))
    for feature in ("priority", "several", "choice"):
        assert jenga[feature] == stock[feature], feature
    for ours, theirs in zip(jenga["prompt_logprobs"], stock["prompt_logprobs"], strict=True):
        assert ours[0] is theirs[0] is None
        assert ours[1:] == pytest.approx(theirs[1:], abs=1e-3), "chunks are cut elsewhere, which rounds elsewhere"
    first, other, again = jenga["salted_hits"]
    assert first == other == 0, "no tenant hits what another one has cached"
    assert again > 0
    assert jenga["reset_while_running"] is stock["reset_while_running"] is False
    assert jenga["reset_when_idle"] is True
    assert jenga["hit_after_reset"] == 0
    assert jenga["live_after"] == 0, "aborted requests leave nothing behind"
