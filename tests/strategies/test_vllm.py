"""Strategy vllm against vLLM 0.32's own functions, for every model of the zoo."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.models import ModelRegistry
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    SparseCacheRole,
    iter_layer_specs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from jenga import models
from jenga.layers import LayerType
from jenga.models import known_models, load_model
from jenga.policies import ChunkedLocal, RecurrentState, Scratch, SlidingWindow
from jenga.strategies import Plan, PlanError, make_plan

GIB = 1 << 30
MEMORY = 40 * GIB
LONGEST = 8192


class Backend:
    """An attention backend that takes every multiple of `smallest` tokens."""

    smallest = 16

    @classmethod
    def get_supported_kernel_block_sizes(cls) -> list[Any]:
        return [MultipleOf(cls.smallest)]

    @staticmethod
    def customize_spec(spec: KVCacheSpec) -> KVCacheSpec:
        return spec


class SparseBackend(Backend):
    smallest = 64


def vllm_config(layers: tuple[Any, ...], types: tuple[LayerType, ...]) -> SimpleNamespace:
    """As much of a VllmConfig as the planner reads."""
    mla = any(isinstance(x, models.LatentLayers) for x in layers)
    packed = any(isinstance(x, models.IndexerLayers) for x in layers)
    layout = KVCacheLayout.BLHNC if packed else KVCacheLayout.LBNHC
    main = next((t for t in types if not t.is_state and not isinstance(t.policy, SlidingWindow)), types[0])
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False, max_num_encoder_input_tokens=6404),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        num_speculative_tokens=0,
        max_in_flight_tokens=0,
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            block_size=64 if mla else 16,
            mamba_cache_mode="none",
            mamba_page_size_padded=None,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
            get_resolved_kv_cache_layout=lambda: layout,
        ),
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            use_mla=mla,
            architecture="Any",
            max_model_len=LONGEST,
            get_num_kv_heads=lambda _: main.shape[0],
            # An MLA cell may be packed; what counts are its bytes.
            get_head_size=lambda: main.cell_bytes // 2 if mla else main.shape[1],
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
    )


def align(config: SimpleNamespace, state_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM grow its blocks for a state of so many bytes."""
    state = SimpleNamespace(
        get_mamba_state_shape_from_config=lambda _: ((state_bytes,),),
        get_mamba_state_dtype_from_config=lambda _: (torch.int8,),
    )
    backend = SparseBackend if config.model_config.use_mla else Backend
    monkeypatch.setattr(ModelRegistry, "resolve_model_cls", lambda *_, **__: (state, None))
    monkeypatch.setattr(Platform, "_find_non_ssm_backends", classmethod(lambda *_: [backend]), raising=False)
    monkeypatch.setattr("vllm.config.vllm.set_current_vllm_config", lambda *_: nullcontext())
    Platform._align_hybrid_block_size(config, backend)


def vllm_specs(
    layers: tuple[Any, ...], types: tuple[LayerType, ...], config: SimpleNamespace
) -> dict[str, KVCacheSpec]:
    """One spec per layer, as vLLM's modules make them."""
    block = config.cache_config.block_size
    by_name = {t.name: t for t in types}
    specs: dict[str, KVCacheSpec] = {}
    for number, layer in enumerate(layers):
        kind = by_name[layer.name or (layer.state.type if isinstance(layer, models.RecurrentLayers) else layer.kind)]
        spec: KVCacheSpec
        if isinstance(layer, models.RecurrentLayers):
            spec = MambaSpec(
                block_size=block,
                shapes=((kind.state_bytes,),),
                dtypes=(torch.int8,),
                page_size_padded=config.cache_config.mamba_page_size_padded,
                num_speculative_blocks=layer.draft_tokens,
            )
        elif isinstance(layer, models.ScratchLayers):
            spec = CircularBufferSpec(
                block_size=32, num_kv_heads=2, head_size=128, head_size_v=0, dtype=torch.bfloat16, dcp_sharded=False
            )
            assert spec.page_size_bytes == layer.state_bytes
        elif isinstance(layer, models.LatentLayers):
            spec = MLAAttentionSpec(
                block_size=block, num_kv_heads=1, head_size=kind.cell_bytes // 2, dtype=torch.bfloat16
            )
        elif isinstance(layer, models.IndexerLayers):
            spec = MLAAttentionSpec(
                block_size=block,
                num_kv_heads=1,
                head_size=layer.cell_bytes,
                dtype=torch.uint8,
                tokens_per_state=layer.cell_tokens,
                cache_role=SparseCacheRole.INDEXER,
            )
        else:
            heads, size, value_size = kind.shape
            common: dict[str, Any] = {
                "num_kv_heads": heads,
                "head_size": size,
                "head_size_v": value_size,
                "dtype": torch.bfloat16,
            }
            if isinstance(layer, models.SlidingWindowLayers):
                small = layer.max_block_tokens is not None and layer.max_block_tokens < block
                own = layer.max_block_tokens if small else block
                spec = SlidingWindowSpec(block_size=own, sliding_window=layer.window, **common)
            elif isinstance(layer, models.ChunkedLocalLayers):
                spec = ChunkedLocalAttentionSpec(block_size=block, attention_chunk_size=layer.chunk, **common)
            elif isinstance(layer, models.CrossAttentionLayers):
                spec = CrossAttentionSpec(block_size=block, **common)
            else:
                spec = FullAttentionSpec(block_size=block, **common)
        specs.update({f"{number}.{i}": spec for i in range(layer.layers)})
    return specs


def ours(plan: Plan) -> Counter[tuple[int, int]]:
    """(layers, tokens per block) of every block table; draft tokens' states are more blocks in their layers' table."""
    return Counter(
        (p.group.layers, 0 if isinstance(p.group.policy, Scratch) else p.group.page_tokens)
        for p, shares in zip(plan.groups, plan.contents, strict=True)
        if not shares[0].type.name.endswith(" drafts")
    )


def compare(model: models.ModelSpec, types: tuple[LayerType, ...]) -> None:
    """Fail unless vLLM and we make the same plan, or both none."""
    config = vllm_config(model.layers, types)
    states = [t for t in types if isinstance(t.policy, RecurrentState)]
    if states:
        with pytest.MonkeyPatch.context() as monkeypatch:
            align(config, max(t.state_bytes for t in states), monkeypatch)
    try:
        groups = kv_cache_utils.get_kv_cache_groups(config, vllm_specs(model.layers, types, config))
    except NotImplementedError:
        with pytest.raises(PlanError, match="no plan"):
            make_plan("vllm", model.name, types, MEMORY)
        return
    layout = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, MEMORY)
    plan = make_plan("vllm", model.name, types, MEMORY)

    assert plan.large_pages == layout.num_blocks
    assert plan.large_page_bytes == kv_cache_utils._pool_bytes_per_block(config, groups)
    first = [(g, next(iter(iter_layer_specs(g.kv_cache_spec)))) for g in groups]
    theirs = Counter((len(g.layer_names), 0 if isinstance(s, CircularBufferSpec) else s.block_size) for g, s in first)
    assert ours(plan) == theirs
    # Memory of one request: the same blocks.  vLLM reserves for windows that begin anywhere in a block: up to two more.
    worst = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
    pages = plan.pages(LONGEST, 6404)
    windows = sum(isinstance(p.group.policy, SlidingWindow) for p in plan.groups)
    if not any(isinstance(p.group.policy, ChunkedLocal) for p in plan.groups):  # for which it reserves a whole chunk
        assert sum(pages) <= worst // plan.large_page_bytes <= sum(pages) + 2 * windows


@pytest.mark.parametrize("name", known_models())
def test_same_plan_as_vllm(name: str) -> None:
    model = load_model(name)
    for state_dtype in ("float32", "bfloat16"):
        for tp in (model.tp, 4):
            compare(model, model.layer_types(tp=tp, state_dtype=state_dtype))


sizes = st.fixed_dictionaries(
    {"kv_heads": st.sampled_from([1, 2, 3, 4, 8, 10]), "head_size": st.sampled_from([64, 96, 128, 256])}
)
layer_counts = st.integers(1, 40)


@st.composite
def random_models(draw: st.DrawFn) -> models.ModelSpec:
    """Models of one to four layer types, in all combinations that vLLM knows."""
    layers: list[dict[str, Any]] = []
    if draw(st.booleans()):
        layers.append({"kind": "mla", "latent_size": draw(st.sampled_from([512, 576, 580]))})
        if draw(st.booleans()):
            layers.append({"kind": "mla_indexer", "cell_bytes": 132, "cell_tokens": draw(st.sampled_from([1, 4, 16]))})
    else:
        layers.append({"kind": "full_attention", **draw(sizes)})
    for _ in range(draw(st.integers(0, 2))):
        window = draw(st.sampled_from([128, 512, 1024]))
        layers.append({"kind": "sliding_window", "window": window, "name": f"sliding {len(layers)}", **draw(sizes)})
        if draw(st.booleans()):
            layers[-1]["max_block_tokens"] = 16 if layers[0]["kind"] == "full_attention" else 64
    if draw(st.booleans()):
        channels = draw(st.sampled_from([2048, 6144, 9000]))
        state = {"type": "mamba1", "channels": channels, "state_size": 16, "conv_kernel": 4}
        layers.append({"kind": "recurrent_state", "state": state, "draft_tokens": draw(st.integers(0, 2))})
    counts = [draw(layer_counts) for _ in layers]
    if layers[0]["kind"] == "mla" and len(layers) > 1 and layers[1]["kind"] == "mla_indexer":
        counts[1] = counts[0]
    described = [{**layer, "layers": n} for layer, n in zip(layers, counts, strict=True)]
    return models.ModelSpec.model_validate({"name": "random", "source": "test", "layers": described})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(random_models())
def test_same_plan_as_vllm_for_any_model(model: models.ModelSpec) -> None:
    compare(model, model.layer_types())


def test_issue_54458() -> None:
    """vLLM #54458: a 12-token prompt takes 32.9 % of the pool, 23 of 70 blocks of 7,808 tokens."""
    model = load_model("glm-5.3-flash")
    types = model.layer_types()
    block_bytes = make_plan("vllm", model.name, types, MEMORY).large_page_bytes
    memory = 71 * block_bytes  # the null block included
    stock = make_plan("vllm", model.name, types, memory)
    assert stock.hit_tokens == 7808
    pool = stock.pool()
    granted = stock.large_pages - 1
    for group, count in enumerate(stock.pages(12)):
        pool.allocate(group, count)
    assert round(1 - pool.available / granted, 3) == 0.329
    assert stock.capacity(12) == 3

    better = make_plan("jenga", model.name, types, memory)
    share = better.sequence(12).total / memory
    # What is left are the states themselves, one for the sequence and one for each draft token.
    assert better.sequence(12).needed / better.sequence(12).total > 0.98
    assert share < 0.22
    assert better.capacity(12) > stock.capacity(12)
    assert better.hit_tokens == 64


# DESIGN section 3: vLLM 0.32's bytes over bytes needed, at 64, 512, 2,048, 8,192 and 32,768 tokens.
TABLE = {
    "gemma-3-27b": (7, 16, (1.13, 1.13, 1.12, 1.07, 1.02)),
    "mimo-v2-flash": (6, 32, (1.14, 1.20, 1.10, 1.04, 1.01)),
    "qwen3-next-80b": (4, 1056, (1.32, 1.16, 1.02, 1.02, 1.03)),
    "nemotron-h-8b": (7, 1040, (1.16, 1.08, 1.00, 1.01, 1.01)),
    "falcon-h1-34b": (2, 2064, (1.94, 1.60, 1.00, 1.01, 1.01)),
    "kimi-linear-48b": (4, 1920, (1.41, 1.30, 1.29, 1.13, 1.06)),
}


@pytest.mark.parametrize("name", TABLE)
def test_waste_of_vllm_as_measured_before(name: str) -> None:
    """The table counted one block more per window than a sequence of exactly this length holds."""
    groups, block, ratios = TABLE[name]
    types = load_model(name).layer_types()
    plan = make_plan("vllm", name, types, MEMORY)
    assert len(plan.groups) == groups
    assert plan.hit_tokens == block
    windows = [i for i, p in enumerate(plan.groups) if isinstance(p.group.policy, SlidingWindow)]
    for tokens, expected in zip((64, 512, 2048, 8192, 32768), ratios, strict=True):
        pages = plan.pages(tokens)
        for i in windows:
            place = plan.groups[i].group
            whole = -(-tokens // place.page_tokens)
            assert isinstance(place.policy, SlidingWindow)
            pages[i] = min(whole, -(-(place.policy.window - 1) // place.page_tokens) + 1)
        needed = sum(t.needed_bytes(tokens) for t in types)
        assert sum(pages) * plan.large_page_bytes / needed == pytest.approx(expected, abs=0.011)
