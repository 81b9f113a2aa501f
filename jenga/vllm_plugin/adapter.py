"""The one place that knows which vLLM this is, and where its seams are.

Every seam is checked before any is replaced: an unknown version or a changed signature refuses to start, instead of
running half of the plugin.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.jenga")

KNOWN_VERSIONS = ("0.32.0",)

_PLANNER_SEAMS: dict[str, tuple[str, ...]] = {
    "get_kv_cache_groups": ("vllm_config", "kv_cache_spec"),
    "get_kv_cache_configs": ("vllm_config", "kv_cache_specs", "available_memory"),
    "_pool_bytes_per_block": ("vllm_config", "kv_cache_groups"),
    "_max_memory_usage_bytes_from_groups": ("vllm_config", "kv_cache_groups"),
    "get_max_concurrency_for_kv_cache_config": ("vllm_config", "kv_cache_config"),
    "get_kv_cache_config_from_groups": ("vllm_config", "kv_cache_groups", "available_memory"),
    "_check_enough_kv_cache_memory": (
        "available_memory",
        "get_needed_memory",
        "max_model_len",
        "estimate_max_model_len",
    ),
}


def check_version(version: str) -> None:
    """Refuse a vLLM whose seams nobody has checked.

    Raises:
        RuntimeError: names the version found and those known.
    """
    plain = version.split("+")[0]
    if plain not in KNOWN_VERSIONS:
        raise RuntimeError(
            f"Jenga's vLLM plugin knows vLLM {', '.join(KNOWN_VERSIONS)}, but vLLM {version} is installed. Install a "
            "known version, or turn the plugin off with JENGA=0."
        )


def check_seam(function: Callable[..., Any], parameters: tuple[str, ...]) -> None:
    """Refuse a seam whose parameters are not the ones the replacement takes.

    Raises:
        RuntimeError: names the function and both signatures.
    """
    found = tuple(inspect.signature(function).parameters)[: len(parameters)]
    if found != parameters:
        raise RuntimeError(
            f"vLLM's {function.__module__}.{function.__qualname__} takes {found}, Jenga's plugin expects {parameters}. "
            "This vLLM was changed; turn the plugin off with JENGA=0."
        )


def install() -> None:
    """Check every seam, then replace them all.

    Raises:
        RuntimeError: unknown vLLM version or changed seam; nothing was replaced.
    """
    import vllm

    check_version(vllm.__version__)

    from vllm.platforms import current_platform
    from vllm.platforms.interface import Platform
    from vllm.v1.core import kv_cache_coordinator, kv_cache_manager, kv_cache_utils

    for name, parameters in _PLANNER_SEAMS.items():
        check_seam(getattr(kv_cache_utils, name), parameters)
    check_seam(
        kv_cache_coordinator.get_kv_cache_coordinator,
        (
            "kv_cache_config",
            "max_model_len",
            "max_in_flight_tokens",
            "use_eagle",
            "enable_caching",
            "enable_kv_cache_events",
        ),
    )
    check_seam(
        kv_cache_manager.KVCacheManager.allocate_slots,
        (
            "self",
            "request",
            "num_new_tokens",
            "num_new_computed_tokens",
            "new_computed_blocks",
            "num_lookahead_tokens",
        ),
    )
    check_seam(vars(Platform)["_align_hybrid_block_size"].__func__, ("cls", "vllm_config", "backend_cls"))

    from vllm.v1.core.sched.scheduler import Scheduler

    check_seam(Scheduler.reset_prefix_cache, ("self", "reset_running_requests", "reset_connector"))
    check_seam(kv_cache_coordinator.KVCacheCoordinator.emit_cached_block_events, ("self", "request", "computed_blocks"))
    check_seam(
        Scheduler._mamba_block_aligned_split,
        (
            "self",
            "request",
            "num_new_tokens",
            "num_new_local_computed_tokens",
            "num_external_computed_tokens",
        ),
    )

    from jenga.vllm_plugin import (
        checkpoints,
        coordinator,
        engine,
        events,
        hybrid_blocks,
        memory_map,
        parts,
        planning,
        states,
        steady,
        worker,
    )

    planner = planning.Planner(
        planning.Originals(**{name.lstrip("_"): getattr(kv_cache_utils, name) for name in _PLANNER_SEAMS})
    )
    for name in _PLANNER_SEAMS:
        _replace(kv_cache_utils, name, getattr(planner, name.lstrip("_")))
    _replace(
        kv_cache_coordinator,
        "get_kv_cache_coordinator",
        coordinator.replacement(kv_cache_coordinator.get_kv_cache_coordinator),
        also=(kv_cache_manager,),
    )
    hybrid_blocks.install()
    checkpoints.install()
    states.install()
    parts.install()
    steady.install()
    worker.install_scheduler_side()
    if current_platform.is_cpu():
        from jenga.vllm_plugin import cpu_fixes

        cpu_fixes.disable_mamba2_prefill_checkpoints()
        worker.install_cpu()
    elif current_platform.is_cuda_alike():
        worker.install_gpu()
    engine.install()
    memory_map.install()
    events.install()
    logger.debug("Jenga's memory manager is installed in vLLM %s", vllm.__version__)


def _replace(module: Any, name: str, function: Callable[..., Any], also: tuple[Any, ...] = ()) -> None:
    """Replace a module's function, and every `from ... import` copy of it made so far."""
    original = getattr(module, name)
    for other in (module, *also, *(m for n, m in list(sys.modules.items()) if n.startswith("vllm."))):
        if getattr(other, name, None) is original:
            setattr(other, name, function)
