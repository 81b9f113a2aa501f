"""What stock vLLM would have planned, where the layers are in workers' processes and not in this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.granitemoehybrid import GraniteMoeHybridForCausalLM as Granite
from vllm.platforms.interface import Platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from jenga.demo import make
from jenga.vllm_plugin import hybrid_blocks


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """vLLM's configuration writes to the environment, which other tests' engines would inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_stocks_block_is_known_without_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid_blocks, "_vllm_align", vars(Platform)["_align_hybrid_block_size"].__func__)
    config = EngineArgs(
        model=str(make("granite-hybrid", tmp_path)), block_size=32, max_model_len=320, enable_prefix_caching=True
    ).create_engine_config()
    assert not config.compilation_config.static_forward_context, "no layer is in this process"
    with set_current_vllm_config(config):
        state = MambaSpec(
            shapes=Granite.get_mamba_state_shape_from_config(config),
            dtypes=Granite.get_mamba_state_dtype_from_config(config),
            block_size=32,
            mamba_cache_mode="align",
        )
    stock, specs = hybrid_blocks.as_stock(
        config,
        {
            "attention": FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.bfloat16),
            "state": state,
        },
    )
    assert config.cache_config.block_size == 32
    assert stock.cache_config.block_size == 288
    assert specs["attention"].block_size == 288
    assert specs["attention"].page_size_bytes == specs["state"].page_size_bytes
