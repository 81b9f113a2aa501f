"""Hits, preemptions and pages that move on leave every state and logit as stock vLLM computes it, to the last bit.

In bfloat16, where tokens cannot be compared: rounding depends on how prefills are cut.  So stock computes the same
tokens again from nothing, cut in the same places (`harness.audit`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jenga.demo import make
from tests.vllm_plugin.harness import audit, prompts

GENERATED = 24


AMPLE, PRESSED = 32.0, 2.2
"""Mebibytes of KV memory: all requests, and two or three of them."""


def spec(model: Path, mebibytes: float) -> dict[str, Any]:
    """Two rounds of prompts that share prefixes."""
    return {
        "model": str(model),
        "max_tokens": GENERATED,
        "rounds": 2,
        "check": True,
        "prompts": prompts(6, 200, shared=2),
        "engine": {
            "dtype": "bfloat16",
            "max_model_len": 256,
            "block_size": 32,
            "kv_cache_memory_bytes": int(mebibytes * 2**20),
            "enable_prefix_caching": True,
            "max_num_batched_tokens": 200,
            "max_num_seqs": 4,
        },
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gated DeltaNet and attention."""
    return make("qwen3-next", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("mebibytes", [AMPLE, PRESSED])
def test_states_and_logits_are_those_of_stock_cut_in_the_same_places(
    mebibytes: float, model: Path, tmp_path: Path
) -> None:
    done = audit(tmp_path, "run", spec(model, mebibytes), jenga=True)
    assert done.changed == 0, "pages were overwritten between one request and the next"
    assert done.unlike == 0
    assert done.compared > 2 * GENERATED
    if mebibytes == AMPLE:
        assert done.hits > done.mixed, "nothing compared after a hit"
    else:
        assert sum(done.result["evicted"]) > 20, "no pressure"


def test_a_state_that_was_not_copied_is_noticed(model: Path, tmp_path: Path) -> None:
    """The negative control: one layer's states are left behind at a page boundary or a hit."""
    done = audit(tmp_path, "mutant", {**spec(model, AMPLE), "leave_out_copies": True}, jenga=True)
    assert done.result["left_out"]
    assert done.unlike > GENERATED
