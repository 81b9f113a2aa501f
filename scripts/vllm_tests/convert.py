"""From the flat configurations that vLLM's tests build by hand to Jenga's geometry.

vLLM's tests make `KVCacheConfig`s themselves, past the planner, and the plugin rightly leaves such configurations to
vLLM's own manager: run as they are, the tests would prove nothing.  Here each becomes what Jenga's planner would have
made of the same groups, where the plugin would take them, and the reason why not is kept where it would not.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core import kv_cache_manager
from vllm.v1.core.kv_cache_utils import partial_hash_hits_enabled
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupRole, KVCacheGroupSpec, iter_layer_specs

from jenga.layout import LayerGroup, Layout, choose_layout
from jenga.vllm_plugin import coordinator, hybrid_blocks, planning, states
from jenga.vllm_plugin import groups as vllm_groups
from jenga.vllm_plugin.config import CheckpointOptions, JengaGroupSpec, JengaKVCacheConfig
from jenga.vllm_plugin.groups import describe, policy_of, spec_obstacle


@dataclass
class Seen:
    """What happened in one test."""

    coordinators: list[coordinator.JengaCoordinator] = field(default_factory=list)
    """Jenga's coordinators that were built."""
    left_to_vllm: set[str] = field(default_factory=set)
    """Why configurations stayed with vLLM's own manager."""


seen = Seen()
_scheduler_obstacle: ContextVar[str | None] = ContextVar("scheduler_obstacle", default=None)


def obstacle(config: KVCacheConfig, options: dict[str, Any]) -> str | None:
    """Why Jenga would leave this to vLLM's own manager, None if it would not."""
    hashes = options.get("hash_block_size")
    roles = {group.role for group in config.kv_cache_groups} - {KVCacheGroupRole.DEFAULT}
    specs = {
        f"layer{i}.{j}": spec
        for i, group in enumerate(config.kv_cache_groups)
        for j, spec in enumerate(iter_layer_specs(group.kv_cache_spec))
    }
    checks: tuple[tuple[Any, str], ...] = (
        (_scheduler_obstacle.get(), str(_scheduler_obstacle.get())),
        (not config.kv_cache_groups, "a model without KV cache"),
        (roles or config.hisparse_host_num_blocks is not None, "HiSparse is configured"),
        (options.get("use_eagle"), "speculative decoding is configured"),
        (any(g.is_eagle_group for g in config.kv_cache_groups), "speculative decoding is configured"),
        (
            options.get("enable_caching", True)
            and hashes
            and partial_hash_hits_enabled(config.kv_cache_groups, hashes),
            "prefix_match_unit is set",
        ),
        (options.get("dcp_world_size", 1) > 1, "decode_context_parallel_size > 1"),
        (options.get("pcp_world_size", 1) > 1, "prefill_context_parallel_size > 1"),
    )
    return next((reason for found, reason in checks if found), None) or spec_obstacle(specs)


def converted(config: KVCacheConfig) -> JengaKVCacheConfig:
    """The same groups in the same order, in as many bytes as the flat pool of the test has.

    Groups whose pages are of one size get one small page per large page, so that ids and counts are the flat pool's.
    """
    layout = layout_of(config)
    groups: list[KVCacheGroupSpec] = []
    for index, group in enumerate(config.kv_cache_groups):
        same = {f.name: getattr(group, f.name) for f in fields(group)}
        same["role"] = states.role_of(group.kv_cache_spec)
        groups.append(JengaGroupSpec(**same, layout=layout, index=index))
    same = {f.name: getattr(config, f.name) for f in fields(config)}
    memory = config.num_blocks * max(group.stride for group in layout.groups)
    blocks = config.num_blocks if set(layout.ratios) == {1} else max(2, memory // layout.large_page_bytes)
    # What is kept beyond vLLM's own choice would change what its tests count; Jenga's own tests cover it.
    same |= {"kv_cache_groups": groups, "num_blocks": blocks, "checkpoints": CheckpointOptions(answers=False)}
    return JengaKVCacheConfig(**same)


def layout_of(config: KVCacheConfig) -> Layout:
    """The planner's geometry for these groups; one small page per large page where their sizes are not real."""
    try:
        groups = describe(config.kv_cache_groups)
    except TypeError:  # states whose "shapes" are plain numbers: the test never allocates them
        groups = [
            LayerGroup(
                f"group_{i}",
                policy_of(next(iter(iter_layer_specs(g.kv_cache_spec)))),
                1,
                g.kv_cache_spec.block_size,
                16,
            )
            for i, g in enumerate(config.kv_cache_groups)
        ]
    return choose_layout(groups, config.num_blocks * max(group.page_bytes for group in groups))


def convert(config: KVCacheConfig, options: dict[str, Any]) -> KVCacheConfig:
    """`config` as the plugin would have planned it; itself, with the reason noted, if it would not."""
    if isinstance(config, JengaKVCacheConfig):
        return config
    reason = obstacle(config, options)
    if reason is not None:
        seen.left_to_vllm.add(reason)
        return config
    return converted(config)


def install() -> None:
    """Convert whatever a `Scheduler` or a `KVCacheManager` is made of, and note every Jenga coordinator."""
    config_obstacle = vllm_groups.config_obstacle

    def real_config_obstacle(config: Any) -> str | None:
        # Some tests hand the planner a stand-in that has only what vLLM's own planner reads.
        return config_obstacle(config) if isinstance(config, VllmConfig) else "the test's configuration is a stand-in"

    for module in (planning, hybrid_blocks, vllm_groups):
        module.config_obstacle = real_config_obstacle
    manager_init, scheduler_init = kv_cache_manager.KVCacheManager.__init__, Scheduler.__init__
    adopt = coordinator.JengaCoordinator.adopt

    @wraps(manager_init)
    def for_manager(self: Any, kv_cache_config: KVCacheConfig, *args: Any, **options: Any) -> None:
        manager_init(self, convert(kv_cache_config, options), *args, **options)

    @wraps(scheduler_init)
    def for_scheduler(self: Any, vllm_config: Any, kv_cache_config: KVCacheConfig, *args: Any, **options: Any) -> None:
        before = _scheduler_obstacle.set(real_config_obstacle(vllm_config))
        try:
            scheduler_init(self, vllm_config, convert(kv_cache_config, {}), *args, **options)
        finally:
            _scheduler_obstacle.reset(before)

    @wraps(adopt)
    def noted(self: coordinator.JengaCoordinator) -> None:
        adopt(self)
        seen.coordinators.append(self)

    kv_cache_manager.KVCacheManager.__init__ = for_manager
    Scheduler.__init__ = for_scheduler
    coordinator.JengaCoordinator.adopt = noted


def fresh() -> Seen:
    """Forget the last test."""
    global seen
    seen = Seen()
    return seen
