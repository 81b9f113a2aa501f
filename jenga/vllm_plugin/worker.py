"""Workers: zeroing new pages by group.

vLLM hands workers one flat list of block ids to zero, which in its own geometry are the same bytes for every group.
Jenga's list carries group-raised ids (`JengaCoordinator.take_new_block_ids`); here they are split again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, iter_layer_specs

from jenga.vllm_plugin.config import JengaKVCacheConfig


def split_by_group(config: JengaKVCacheConfig, ids: Iterable[int]) -> list[list[int]]:
    """Group-raised ids as one list of plain page ids per group."""
    pages: list[list[int]] = [[] for _ in config.ratios]
    offsets = config.id_offsets
    for raised in ids:
        group = bisect_right(offsets, raised) - 1
        pages[group].append(raised - offsets[group])
    return pages


def install_scheduler_side() -> None:
    """Let KVCacheManager collect group-raised ids."""
    original = KVCacheManager.take_new_block_ids

    def take_new_block_ids(self: KVCacheManager) -> list[int]:
        if isinstance(self.kv_cache_config, JengaKVCacheConfig):
            coordinator: Any = self.coordinator
            return list(coordinator.take_new_block_ids())
        plain: list[int] = original(self)
        return plain

    setattr(KVCacheManager, "take_new_block_ids", take_new_block_ids)  # noqa: B010


def install_cpu() -> None:
    """Zero by group on the CPU back end."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner._zero_block_ids

    def _zero_block_ids(self: Any, block_ids: list[int]) -> None:
        config = self.kv_cache_config
        if not isinstance(config, JengaKVCacheConfig):
            original(self, block_ids)
            return
        for group, ratio, pages in zip(
            config.kv_cache_groups, config.ratios, split_by_group(config, block_ids), strict=True
        ):
            specs = iter_layer_specs(group.kv_cache_spec)
            if not pages or not all(isinstance(s, AttentionSpec) for s in specs):
                continue
            for name in group.layer_names:
                cache = self.compilation_config.static_forward_context[name].kv_cache
                # Dimension 0 counts kernel blocks, of which a page may hold several.
                per_page = cache.shape[0] // (config.num_blocks * ratio)
                for page in pages:
                    cache[page * per_page : (page + 1) * per_page].zero_()

    setattr(CPUModelRunner, "_zero_block_ids", _zero_block_ids)  # noqa: B010


class GroupedZeroer:
    """Zeroes pages by group on a GPU, with one of vLLM's own zeroers per group."""

    def __init__(self, config: JengaKVCacheConfig, make: Callable[[int, int], Any]) -> None:
        """`make(group, blocks)` builds vLLM's zeroer for that group's layers and number of pages."""
        self._config = config
        self._zeroers = [make(g, config.num_blocks * ratio) for g, ratio in enumerate(config.ratios)]

    def zero_block_ids(self, block_ids: list[int]) -> None:
        """Zero group-raised ids."""
        for zeroer, pages in zip(self._zeroers, split_by_group(self._config, block_ids), strict=True):
            zeroer.zero_block_ids(pages)

    def warmup(self, num_kv_blocks: int) -> None:
        """Compile the kernels before the first request (page 0 of every group is the null page)."""
        for zeroer in self._zeroers:
            zeroer.warmup(num_kv_blocks)


def install_gpu() -> None:
    """Zero by group in both GPU model runners."""
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.utils import KVBlockZeroer

    def wrap(runner: Any, attribute: str, groups_of: Callable[[Any], Iterable[Any]], sizes: str) -> None:
        original = runner._init_kv_zero_meta

        def _init_kv_zero_meta(self: Any) -> None:
            config = self.kv_cache_config
            if not isinstance(config, JengaKVCacheConfig):
                original(self)
                return
            extra = (
                {"runner_only_attn_layers": self.runner_only_attn_layers}
                if hasattr(self, "runner_only_attn_layers")
                else {}
            )

            def make(group: int, blocks: int) -> Any:
                return KVBlockZeroer(
                    self.device,
                    attn_groups_iter=[g for g in groups_of(self) if g.kv_cache_group_id == group],
                    kernel_block_sizes=getattr(self, sizes),
                    static_forward_context=self.compilation_config.static_forward_context,
                    num_blocks=blocks,
                    **extra,
                )

            setattr(self, attribute, GroupedZeroer(config, make))

        runner._init_kv_zero_meta = _init_kv_zero_meta

    wrap(
        gpu_model_runner.GPUModelRunner,
        "_kv_block_zeroer",
        lambda runner: runner._kv_cache_spec_attn_group_iterator(),
        "_kernel_block_sizes",
    )
    wrap(
        model_runner.GPUModelRunner,
        "kv_block_zeroer",
        lambda runner: (g for groups in runner.attn_groups for g in groups),
        "kernel_block_sizes",
    )
