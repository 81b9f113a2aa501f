"""vLLM's planner functions, for groups with pages of unlike sizes.

Each function here takes the place of the one of the same name in ``vllm.v1.core.kv_cache_utils`` and answers for
Jenga's groups; all others are passed to the original.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, KVCacheTensor, iter_layer_specs

from jenga.grouping import choose_grouping
from jenga.layout import LayoutError
from jenga.metrics.stock import StockPlan
from jenga.policies import LayerPolicy
from jenga.vllm_plugin import checkpoints, hybrid_blocks, report, states
from jenga.vllm_plugin.config import JengaGroupSpec, JengaKVCacheConfig
from jenga.vllm_plugin.groups import (
    bucket_layers,
    config_obstacle,
    cut,
    describe,
    divisible,
    layer_spec,
    policy_of,
    spec_obstacle,
)

logger = init_logger("vllm.jenga")

ASSUMED_MEMORY = 16 << 30
"""Bytes to choose a geometry for where vLLM plans before it knows the memory (profiling)."""


@dataclass(frozen=True)
class Originals:
    """vLLM's own planner functions."""

    get_kv_cache_groups: Callable[..., list[KVCacheGroupSpec]]
    get_kv_cache_configs: Callable[..., list[KVCacheConfig]]
    pool_bytes_per_block: Callable[..., int]
    max_memory_usage_bytes_from_groups: Callable[..., int]
    get_max_concurrency_for_kv_cache_config: Callable[..., float]
    get_kv_cache_config_from_groups: Callable[..., KVCacheConfig]
    check_enough_kv_cache_memory: Callable[..., None]


class Planner:
    """The replacements, with the originals to fall back to."""

    def __init__(self, originals: Originals) -> None:
        self._vllm = originals
        self._memory = ASSUMED_MEMORY

    # -- replacements ---------------------------------------------------------------------------------------

    def get_kv_cache_configs(
        self, vllm_config: VllmConfig, kv_cache_specs: list[dict[str, KVCacheSpec]], available_memory: list[int]
    ) -> list[KVCacheConfig]:
        """Plan for all workers; the geometry is chosen for the smallest worker's memory (bytes)."""
        with self._planning_for(min((m for m in available_memory if m > 0), default=ASSUMED_MEMORY)):
            planned = self._vllm.get_kv_cache_configs(vllm_config, kv_cache_specs, available_memory)
        if planned and isinstance(planned[0], JengaKVCacheConfig):
            stock = self._stock(vllm_config, kv_cache_specs, available_memory)
            for config in planned:
                if isinstance(config, JengaKVCacheConfig):
                    config.stock = None if isinstance(stock, str) else stock[1]
            report.announce(vllm_config, planned[0], stock if isinstance(stock, str) else stock[0])
        return planned

    def get_kv_cache_groups(
        self, vllm_config: VllmConfig, kv_cache_spec: dict[str, KVCacheSpec]
    ) -> list[KVCacheGroupSpec]:
        """The parts of every layer type with their exact places in large pages, or vLLM's own groups."""
        if not kv_cache_spec:
            return self._vllm.get_kv_cache_groups(vllm_config, kv_cache_spec)
        obstacle = config_obstacle(vllm_config) or spec_obstacle(kv_cache_spec)
        groups = [] if obstacle else bucket_layers(kv_cache_spec)
        if len(groups) < 2:
            logger.info_once(
                "Jenga: vLLM's own memory manager stays in charge: %s", obstacle or "all layers need the same memory"
            )
            return self._vllm.get_kv_cache_groups(vllm_config, kv_cache_spec)
        try:
            grouping = choose_grouping(describe(groups), self._memory, [divisible(g) for g in groups])
        except LayoutError as error:
            raise ValueError(f"{error}: raise kv_cache_memory_bytes (or gpu_memory_utilization)") from None
        made = [
            JengaGroupSpec(
                piece.layer_names,
                piece.kv_cache_spec,
                role=states.role_of(piece.kv_cache_spec),
                layout=grouping.layout,
                index=index,
                part=part,
            )
            for index, (group, parts) in enumerate(zip(groups, grouping.parts, strict=True))
            for part, piece in enumerate(cut(group, parts))
        ]
        made.sort(key=lambda g: g.part > 0)  # first parts first; the sort is stable
        return list(made)

    def pool_bytes_per_block(self, vllm_config: VllmConfig, kv_cache_groups: list[KVCacheGroupSpec]) -> int:
        """Bytes of the unit that `num_blocks` counts: the large page."""
        jenga = managed(kv_cache_groups)
        if not jenga:
            return self._vllm.pool_bytes_per_block(vllm_config, kv_cache_groups)
        return jenga[0].layout.large_page_bytes

    def max_memory_usage_bytes_from_groups(
        self, vllm_config: VllmConfig, kv_cache_groups: list[KVCacheGroupSpec]
    ) -> int:
        """Bytes that one request of the maximum length needs when it has the buffer to itself."""
        jenga = managed(kv_cache_groups)
        if not jenga:
            return self._vllm.max_memory_usage_bytes_from_groups(vllm_config, kv_cache_groups)
        return jenga[0].layout.large_page_bytes * sum(cdiv(max_pages(vllm_config, g), g.place.ratio) for g in jenga)

    def get_max_concurrency_for_kv_cache_config(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> float:
        """Requests of the maximum length that fit side by side (they share large pages)."""
        if not isinstance(kv_cache_config, JengaKVCacheConfig):
            return self._vllm.get_max_concurrency_for_kv_cache_config(vllm_config, kv_cache_config)
        return (kv_cache_config.num_blocks - 1) / sum(
            max_pages(vllm_config, g) / g.place.ratio for g in kv_cache_config.jenga_groups
        )

    def get_kv_cache_config_from_groups(
        self, vllm_config: VllmConfig, kv_cache_groups: list[KVCacheGroupSpec], available_memory: int
    ) -> KVCacheConfig:
        """Place every layer: page ``b`` of a group starts at ``b * stride``, its layers side by side in it."""
        jenga = managed(kv_cache_groups)
        if not jenga:
            return self._vllm.get_kv_cache_config_from_groups(vllm_config, kv_cache_groups, available_memory)
        layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
        if not layout.is_block_compact:
            raise ValueError(
                f"VLLM_KV_CACHE_LAYOUT={layout.name} spreads a page over the buffer, but Jenga's pages are compact. "
                "Unset it, set it to LBNHC or LBHNC, or turn Jenga off with JENGA=0."
            )
        large = jenga[0].layout.large_page_bytes
        override = vllm_config.cache_config.num_gpu_blocks_override
        num_blocks = kv_cache_utils.may_override_num_blocks(vllm_config, available_memory // large)
        if override is not None and available_memory == 0:
            # Profiling wants one page per sequence in every group, not one large page.
            num_blocks = 1 + cdiv(override, min(jenga[0].layout.ratios))
        tensors = []
        for group in jenga:
            by_spec: defaultdict[KVCacheSpec, list[str]] = defaultdict(list)
            for name in group.layer_names:
                by_spec[layer_spec(group, name)].append(name)
            offset = 0
            for spec, names in by_spec.items():
                tensors.append(
                    KVCacheTensor(
                        size=num_blocks * large,
                        layers=names,
                        layer_stride=spec.page_size_bytes,
                        block_stride=group.place.part_stride,
                        offset=offset,
                    )
                )
                offset += spec.page_size_bytes * len(names)
        return JengaKVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=tensors,
            kv_cache_groups=list(jenga),
            prefix_cache_retention_interval=vllm_config.cache_config.prefix_cache_retention_interval,
            checkpoints=checkpoints.options(vllm_config),
        )

    def check_enough_kv_cache_memory(
        self,
        available_memory: int,
        get_needed_memory: Callable[[], int],
        max_model_len: int,
        estimate_max_model_len: Callable[[int], int],
    ) -> None:
        """vLLM's check that one request fits, with sizes that can be read and acted upon.

        Raises:
            ValueError: names the memory, what is needed, and the settings to change.
        """
        bytes_needed = get_needed_memory() if available_memory > 0 else 0
        if available_memory > 0 and bytes_needed <= available_memory:
            return
        if available_memory <= 0:
            self._vllm.check_enough_kv_cache_memory(
                available_memory, get_needed_memory, max_model_len, estimate_max_model_len
            )
        fits = estimate_max_model_len(available_memory)
        shorter = f", or lower max_model_len to {fits:,} or less" if fits > 0 else ""
        raise ValueError(
            f"KV cache memory of {available_memory / 2**20:,.1f} MiB (null page deducted) does not hold one request of "
            f"the model's max seq len (max_model_len={max_model_len:,} tokens), which needs "
            f"{bytes_needed / 2**20:,.1f} MiB. Raise kv_cache_memory_bytes (or gpu_memory_utilization){shorter}."
        )

    # -- internals ------------------------------------------------------------------------------------------

    @contextmanager
    def _planning_for(self, memory: int) -> Iterator[None]:
        before, self._memory = self._memory, memory
        try:
            yield
        finally:
            self._memory = before

    def _stock(
        self, config: VllmConfig, specs: list[dict[str, KVCacheSpec]], memory: list[int]
    ) -> tuple[float, StockPlan] | str:
        """Requests of maximum length that vLLM's own plan would hold in the same bytes, and that plan, or why not."""
        try:
            logging.disable(logging.INFO)  # what stock would have done is not what is being done
            stock_config, stock_specs = hybrid_blocks.as_stock(config, specs[0])
            groups = self._vllm.get_kv_cache_groups(stock_config, stock_specs)
            unit = self._vllm.pool_bytes_per_block(stock_config, groups)
            planned = KVCacheConfig(num_blocks=min(memory) // unit - 1, kv_cache_tensors=[], kv_cache_groups=groups)
            concurrency = self._vllm.get_max_concurrency_for_kv_cache_config(stock_config, planned)
            return concurrency, StockPlan.of(unit, map(stock_group, groups))
        except Exception as error:  # a comparison for the log must not keep an engine from starting
            return f"{type(error).__name__}: {error}"
        finally:
            logging.disable(logging.NOTSET)


def managed(groups: list[KVCacheGroupSpec]) -> tuple[JengaGroupSpec, ...]:
    """The groups if Jenga manages them, else nothing."""
    jenga = tuple(g for g in groups if isinstance(g, JengaGroupSpec))
    return jenga if jenga and len(jenga) == len(groups) else ()


def stock_group(group: KVCacheGroupSpec) -> tuple[LayerPolicy, int]:
    """Policy and tokens per block of one of vLLM's own groups.

    Raises:
        ValueError: nobody here knows its layers.
    """
    spec = next(iter(iter_layer_specs(group.kv_cache_spec)))
    policy = policy_of(spec)
    if policy is None:
        raise ValueError(f"unknown layers of type {type(spec).__name__}")
    return policy, group.kv_cache_spec.block_size


def max_pages(config: VllmConfig, group: JengaGroupSpec) -> int:
    """Small pages of `group` that a request of the maximum length can hold at once (vLLM's own bound)."""
    specs: list[Any] = list(iter_layer_specs(group.kv_cache_spec))
    return max(cdiv(s.max_memory_usage_bytes(config), s.page_size_bytes) for s in specs)
