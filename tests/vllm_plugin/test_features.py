"""Priorities, log-probabilities, samples, structured output, salts, sleep, aborts, resets and LoRA, beside stock."""

from __future__ import annotations

from pathlib import Path

import pytest

from jenga.demo import make
from tests.vllm_plugin.adapters import make_adapter
from tests.vllm_plugin.harness import prompts, run

RUNNER = Path(__file__).with_name("features_run.py")
LORA_RUNNER = Path(__file__).with_name("lora_run.py")


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
    assert jenga["slept"] == stock["slept"]
    assert all(answers == jenga["slept"][0] for answers in jenga["slept"]), "a sleep changed an answer"
    assert jenga["reset_while_running"] is stock["reset_while_running"] is False
    assert jenga["reset_when_idle"] is True
    assert jenga["hit_after_reset"] == 0
    assert jenga["live_after"] == 0, "aborted requests leave nothing behind"


def test_adapters_share_no_cache(tmp_path: Path) -> None:
    model = make("granite-hybrid", tmp_path / "models")
    prompt, other = prompts(2, 600)
    spec = {
        "model": str(model),
        "adapters": [str(make_adapter(model, tmp_path / name, seed)) for seed, name in enumerate(("french", "legal"))],
        "prompts": [prompt, prompt[:-3] + other[-40:]],
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
    jenga, stock = (run(tmp_path, name, spec, jenga=name == "jenga", runner=LORA_RUNNER) for name in ("jenga", "stock"))
    assert jenga["tokens"] == stock["tokens"]
    first, again, longer = jenga["tokens"]
    assert first == again
    assert all(len({tuple(answer) for answer in answers}) == 3 for answers in (first, longer)), "adapters not heard"
    block = 32
    unseen, same, grown = jenga["cached"]
    assert unseen == [0, 0, 0], "an adapter hit what another one has cached"
    assert same == grown == [(len(prompt) - 1) // block * block] * 3
