"""Greedy tokens of Jenga's memory manager against stock vLLM's, and the books after every step.

Engines run in float32: there the two differ in no token even where prefix hits and preemptions make them compute the
same thing in other chunks.  (In bfloat16 that alone flips tokens, in stock against stock too.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jenga.demo import make
from tests.vllm_plugin.harness import differing, melodies, prompts, recall_prompts, run

AMPLE = 48.0
PRESSED = {"gemma3-recall": 2.3, "gemma4": 2.3, "granite-hybrid": 5.0}
"""Mebibytes of KV memory: all requests at once, and about two of them."""
REQUESTS, LENGTH, GENERATED, ROUNDS = 12, 200, 100, 2
TABLES, PAIRS = 4, 40
CONCURRENT = 8
MODELS = tuple(PRESSED)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo models, made once."""
    folder = tmp_path_factory.mktemp("models")
    return {name: make(name, folder) for name in (*MODELS, "whisper")}


def spec(model: Path, mebibytes: float, *, caching: bool) -> dict[str, Any]:
    """An engine run of two rounds over prompts that share prefixes."""
    if model.name == "gemma3-recall":
        asked, _ = recall_prompts(model, TABLES, PAIRS, GENERATED)
    else:
        asked = prompts(REQUESTS, LENGTH)
    return {
        "model": str(model),
        "max_tokens": GENERATED,
        "rounds": ROUNDS,
        "check": True,
        "prompts": asked,
        "engine": {
            "dtype": "float32",
            "max_model_len": 320,
            "block_size": 32,
            "kv_cache_memory_bytes": int(mebibytes * 2**20),
            "enable_prefix_caching": caching,
            "max_num_batched_tokens": 200,
            "max_num_seqs": CONCURRENT,
        },
    }


@pytest.fixture(scope="session")
def stock(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Stock vLLM's tokens with ample memory: the reference."""
    folder = tmp_path_factory.mktemp("stock")
    return {name: run(folder, name, spec(models[name], AMPLE, caching=True), jenga=False) for name in MODELS}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("pressed", "caching"), [(False, True), (True, True), (True, False)])
def test_same_tokens_as_stock(
    model: str,
    pressed: bool,
    caching: bool,
    models: dict[str, Path],
    stock: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    ours = run(
        tmp_path, "jenga", spec(models[model], PRESSED[model] if pressed else AMPLE, caching=caching), jenga=True
    )
    assert differing(stock[model], ours) == 0
    assert len({t for round_ in ours["tokens"] for row in round_ for t in row}) > 30, "outputs too uniform to tell"
    assert ours["checks"] > 50
    assert ours["live_after"] == 0
    assert ours["reset"] is True
    assert ours["free_after_reset"] == ours["num_blocks"] - 1, "pages leaked"
    if model == "gemma3-recall":
        _, right = recall_prompts(models[model], TABLES, PAIRS, GENERATED)
        for answers in ours["tokens"]:
            assert answers == right, "wrong answers: wrong pages"
    if caching and not pressed:
        assert sum(ours["cached"][0]) > 0, "no prefix hit in the first round"
    if pressed:
        assert ours["preemptions"] or sum(ours["evicted"]) or ours["peak_running"] < CONCURRENT, "no pressure"


def test_an_encoder_decoder_is_managed_and_says_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    """Cross-attention: pages for the audio, all at once, and never shared."""
    asked, seeds = melodies(REQUESTS)
    wanted = spec(models["whisper"], AMPLE, caching=False) | {"prompts": asked, "melodies": seeds, "max_tokens": 40}
    wanted["engine"]["max_num_batched_tokens"] = 512  # vLLM does not cut an encoder-decoder's prefill
    ours = run(tmp_path, "jenga", wanted, jenga=True)
    assert ours["managed"] == ["FullAttentionSpec", "CrossAttentionSpec"]
    assert differing(run(tmp_path, "stock", wanted, jenga=False), ours) == 0
    assert len({tuple(row) for row in ours["tokens"][0]}) == REQUESTS, "the audio makes no difference"
    assert ours["live_after"] == 0
    assert ours["checks"] > 40


def test_a_layout_whose_groups_overlap_is_noticed(
    models: dict[str, Path], stock: dict[str, Any], tmp_path: Path
) -> None:
    """The negative control: if wrong pages did not change tokens, the tests above would prove nothing."""
    broken = spec(models["gemma3-recall"], AMPLE, caching=True) | {"overlap": True}
    assert differing(stock["gemma3-recall"], run(tmp_path, "overlap", broken, jenga=True)) > 0
