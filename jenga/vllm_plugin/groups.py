"""From vLLM's KV cache specs to Jenga's layer groups, or the reason why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import gcd, lcm
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    HiddenStateCacheSpec,
    HiSparseHotSpec,
    HiSparseResidentSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    iter_layer_specs,
)

from jenga.layout import LayerGroup
from jenga.policies import (
    ChunkedLocal,
    CrossAttention,
    FullAttention,
    LatentAttention,
    LayerPolicy,
    RecurrentState,
    SlidingWindow,
)

STRIDE_ALIGNMENT = 16
"""Bytes; attention kernels load 16 bytes at once."""


PASSED_BACK: dict[type[KVCacheSpec], str] = {
    CircularBufferSpec: "a ring takes no part in prefix hits, for which Jenga asks every group",
    EncoderOnlyAttentionSpec: "encoder layers keep nothing from step to step",
    HiddenStateCacheSpec: "vLLM places extracted hidden states beside the groups, in a buffer of their own",
    HiSparseHotSpec: "HiSparse keeps pages on the host, in a pool of its own",
    HiSparseResidentSpec: "HiSparse keeps pages on the host, in a pool of its own",
    RSWASpec: "what it keeps depends on where a request's prompt ends, which layer policies do not know",
    SinkFullAttentionSpec: "its kernels expect the sinks in blocks 1 to n of a flat pool",
}
"""KV cache types that stay with vLLM's own manager, and why."""


def policy_of(spec: KVCacheSpec) -> LayerPolicy | None:
    """The layer policy that describes `spec`, None if Jenga does not manage it.

    Exact types only: a subclass may change the rules.
    """
    kind = type(spec)
    if kind is FullAttentionSpec:
        return FullAttention()
    if kind is MLAAttentionSpec:
        return LatentAttention()
    if isinstance(spec, SlidingWindowSpec) and kind in (SlidingWindowSpec, SlidingWindowMLASpec):
        return SlidingWindow(spec.sliding_window) if _window_obstacle(spec) is None else None
    if isinstance(spec, ChunkedLocalAttentionSpec) and kind is ChunkedLocalAttentionSpec:
        return ChunkedLocal(spec.attention_chunk_size)
    if kind is MambaSpec:
        return RecurrentState()
    if kind is CrossAttentionSpec:
        return CrossAttention()
    return None


def _window_obstacle(spec: SlidingWindowSpec) -> str | None:
    """Why a sliding window is not simply one."""
    if spec.extra_retained_tokens:
        return "it keeps more than its window, for multi-token prediction"
    if isinstance(spec, SlidingWindowMLASpec) and (spec.bounded_replay or spec.model_version or spec.alignment):
        return "DeepSeek-V4 packs, aligns and replays its windows in ways of its own"
    return None


def config_obstacle(config: VllmConfig) -> str | None:
    """Why this configuration stays with vLLM's own manager, None if nothing stands in the way.

    Asked before the layers' specs are known, and again when they are: both times the answer must be the same.
    """
    parallel, cache = config.parallel_config, config.cache_config
    checks: tuple[tuple[Any, str], ...] = (
        (config.kv_transfer_config, "a KV connector is configured, and connectors address one flat block table"),
        (config.scheduler_config.disable_hybrid_kv_cache_manager, "the hybrid KV cache manager is disabled"),
        (parallel.pipeline_parallel_size > 1, "pipeline_parallel_size > 1: stages may differ in geometry"),
        (parallel.decode_context_parallel_size > 1, "decode_context_parallel_size > 1"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "prefill_context_parallel_size > 1"),
        (
            config.model_config.is_encoder_decoder and cache.enable_prefix_caching,
            "prefix caching is on for an encoder-decoder, which vLLM does not cache",
        ),
        (config.speculative_config, "speculative decoding is configured"),
        (config.attention_config.hisparse_config, "HiSparse is configured"),
        (cache.prefix_match_unit, "prefix_match_unit is set; Jenga's prefix hits are at block granularity already"),
        (cache.kv_cache_dtype_skip_layers, "kv_cache_dtype_skip_layers is set"),
    )
    return next((reason for found, reason in checks if found), None)


def spec_obstacle(specs: Mapping[str, KVCacheSpec]) -> str | None:
    """Why these layers stay with vLLM's own manager, None if Jenga manages them all."""
    for name, spec in specs.items():
        if policy_of(spec) is None:
            reason = PASSED_BACK.get(type(spec), "which Jenga does not know")
            if isinstance(spec, SlidingWindowSpec):
                reason = _window_obstacle(spec) or reason
            return f"layer {name} has a KV cache of type {type(spec).__name__}: {reason}"
    return None


def bucket_layers(specs: Mapping[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """One vLLM group per layer type: layers that always need the same token slots share a block table."""
    buckets: list[dict[str, KVCacheSpec]] = []
    for name, spec in specs.items():
        for bucket in buckets:
            if UniformTypeKVCacheSpecs.is_uniform_type({**bucket, name: spec}):
                bucket[name] = spec
                break
        else:
            buckets.append({name: spec})
    # Full attention first: it bounds prefix hits tightest.
    buckets.sort(key=lambda b: not isinstance(next(iter(b.values())), FullAttentionSpec))
    groups = []
    for bucket in buckets:
        distinct = set(bucket.values())
        size = next(iter(distinct)).block_size
        spec = distinct.pop() if len(distinct) == 1 else UniformTypeKVCacheSpecs(size, kv_cache_specs=bucket)
        groups.append(KVCacheGroupSpec(list(bucket), spec))
    return groups


def divisible(group: KVCacheGroupSpec) -> int:
    """What the number of equal parts that a group can be cut into must divide: its layers, kind by kind."""
    return gcd(*Counter(layer_spec(group, name) for name in group.layer_names).values())


def cut(group: KVCacheGroupSpec, parts: int) -> list[KVCacheGroupSpec]:
    """`group` as `parts` groups with equally many layers of every kind; `parts` divides `divisible`."""
    if parts == 1:
        return [group]
    kinds: dict[KVCacheSpec, list[str]] = {}
    for name in group.layer_names:
        kinds.setdefault(layer_spec(group, name), []).append(name)
    made = []
    for part in range(parts):
        specs = {
            name: spec
            for spec, names in kinds.items()
            for name in names[part * len(names) // parts : (part + 1) * len(names) // parts]
        }
        common = group.kv_cache_spec
        if isinstance(common, UniformTypeKVCacheSpecs):
            common = UniformTypeKVCacheSpecs(common.block_size, kv_cache_specs=specs)
        made.append(KVCacheGroupSpec(list(specs), common))
    return made


def layer_spec(group: KVCacheGroupSpec, name: str) -> KVCacheSpec:
    """Spec of one layer of a group."""
    spec = group.kv_cache_spec
    return spec.kv_cache_specs[name] if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def describe(groups: Sequence[KVCacheGroupSpec]) -> list[LayerGroup]:
    """vLLM's groups as the layout chooser sees them."""
    described: list[LayerGroup] = []
    names: Counter[str] = Counter()
    for group in groups:
        first = next(iter(iter_layer_specs(group.kv_cache_spec)))
        names[group_name(first)] += 1
        nth = names[group_name(first)]
        policy = policy_of(first)
        assert policy is not None, "spec_obstacle was not asked"
        alignments = [layer_spec(group, n).get_block_stride_alignment() for n in group.layer_names]
        described.append(
            LayerGroup(
                name=group_name(first) + (f"_{nth}" if nth > 1 else ""),
                policy=policy,
                layers=len(group.layer_names),
                page_tokens=first.block_size,
                page_bytes=sum(layer_spec(group, n).page_size_bytes for n in group.layer_names),
                alignment=lcm(STRIDE_ALIGNMENT, *alignments),
            )
        )
    return described


def group_name(spec: KVCacheSpec) -> str:
    """Short, stable name of a group for tables and metric labels."""
    if isinstance(spec, SlidingWindowSpec):
        return f"sliding_window_{'mla_' if isinstance(spec, SlidingWindowMLASpec) else ''}{spec.sliding_window}"
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return f"chunked_local_{spec.attention_chunk_size}"
    if isinstance(spec, MambaSpec):
        return str(spec.mamba_type.name).lower()
    if isinstance(spec, CrossAttentionSpec):
        return "cross_attention"
    return "mla" if isinstance(spec, MLAAttentionSpec) else "full_attention"
