"""Block sizes of attention/state hybrids.

vLLM inflates attention blocks until one is as big as a recurrent state (16 tokens become hundreds or thousands)
and pads the state to match.  Jenga needs neither: attention keeps its natural block, the state its exact size,
and states are checkpointed at the same natural block boundaries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MambaSpec

from jenga.vllm_plugin.groups import config_obstacle, spec_obstacle

logger = init_logger("vllm.jenga")

MLA_BLOCK_MULTIPLE = 128
"""Tokens; some MLA decode kernels want blocks that are a multiple of this (vLLM `_align_hybrid_block_size`)."""

AlignFunction = Callable[[type[Platform], VllmConfig, type[Any]], None]
_vllm_align: AlignFunction | None = None


def install() -> None:
    """Replace `Platform._align_hybrid_block_size`."""
    global _vllm_align
    _vllm_align = vars(Platform)["_align_hybrid_block_size"].__func__
    setattr(Platform, "_align_hybrid_block_size", classmethod(align_hybrid_block_size))  # noqa: B010


def align_hybrid_block_size(cls: type[Platform], config: VllmConfig, backend: type[Any]) -> None:
    """Keep natural blocks where Jenga will manage the memory; vLLM's own alignment elsewhere."""
    assert _vllm_align is not None
    if config_obstacle(config) is not None or spec_obstacle(layer_specs(config)) is not None:
        _vllm_align(cls, config, backend)
        return
    cache = config.cache_config
    if config.model_config.use_mla and cache.block_size % MLA_BLOCK_MULTIPLE:
        cache.block_size += MLA_BLOCK_MULTIPLE - cache.block_size % MLA_BLOCK_MULTIPLE
    if cache.mamba_cache_mode == "align":
        cache.mamba_block_size = cache.block_size
    cache.mamba_page_size_padded = None
    logger.info("Jenga: attention blocks stay at %d tokens, recurrent states unpadded", cache.block_size)


def layer_specs(config: VllmConfig) -> dict[str, KVCacheSpec]:
    """What the layers of the loaded model keep, before block sizes are settled: only the types are final."""
    layers = get_layers_from_vllm_config(config, cast(type[Any], AttentionLayerBase))
    specs = {
        name: layer.get_kv_cache_spec(config)
        for name, layer in layers.items()
        if not getattr(layer, "kv_sharing_target_layer_name", None)  # such a layer uses another one's pages
    }
    return {name: spec for name, spec in specs.items() if spec is not None}


def attention_backend(config: VllmConfig, specs: dict[str, KVCacheSpec]) -> type[Any]:
    """The back end of the model's attention layers, also where workers in other processes have the layers."""
    for backend in current_platform._find_non_ssm_backends(config):
        return cast(type[Any], backend)
    attention = next(s for s in specs.values() if isinstance(s, AttentionSpec))
    model = config.model_config
    with set_current_vllm_config(config):
        return cast(
            type[Any],
            get_attn_backend(
                attention.head_size,
                cast(Any, model.dtype),  # resolved by now; the cache's may be another
                config.cache_config.cache_dtype,
                use_mla=model.use_mla,
            ),
        )


def as_stock(config: VllmConfig, specs: dict[str, KVCacheSpec]) -> tuple[VllmConfig, dict[str, KVCacheSpec]]:
    """Configuration and specs as vLLM's own alignment would have made them (for comparison in the log)."""
    stock = copy.copy(config)
    stock.cache_config = copy.copy(config.cache_config)
    if not any(isinstance(s, MambaSpec) for s in specs.values()):
        return stock, dict(specs)
    assert _vllm_align is not None
    _vllm_align(type(current_platform), stock, attention_backend(config, specs))
    cache = stock.cache_config
    converted: dict[str, KVCacheSpec] = {}
    for name, spec in specs.items():
        if isinstance(spec, MambaSpec):
            size = (cache.mamba_block_size if spec.mamba_cache_mode == "align" else None) or spec.block_size
            converted[name] = replace(spec, block_size=size, page_size_padded=cache.mamba_page_size_padded)
        elif isinstance(spec, AttentionSpec):
            converted[name] = spec.copy_with_new_block_size(cache.block_size)
        else:
            converted[name] = spec
    return stock, converted
