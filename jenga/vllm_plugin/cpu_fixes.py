"""Faults of vLLM 0.32's CPU back end that keep hybrid models from running there at all."""

from __future__ import annotations

from dataclasses import replace

from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec


def disable_mamba2_prefill_checkpoints() -> None:
    """Have the scheduler split Mamba-2 prefills at checkpoints.

    The layer offers to export the state at a block boundary from inside one forward pass, but the CPU kernel returns
    only final states, and the engine dies with an IndexError (prefix caching on, any Mamba-2 model).
    """
    original = MambaMixer2.get_kv_cache_spec

    def get_kv_cache_spec(self: MambaMixer2, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = original(self, vllm_config)
        if not isinstance(spec, MambaSpec):
            return spec
        return replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)

    setattr(MambaMixer2, "get_kv_cache_spec", get_kv_cache_spec)  # noqa: B010
