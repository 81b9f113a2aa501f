"""The one place that knows which vLLM this is, and where its seams are.

Every seam is checked before any is replaced: an unknown version or a changed signature refuses to start, instead of
running half of the plugin.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

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


_SEAMS: dict[str, tuple[str, ...]] = {
    **{f"vllm.v1.core.kv_cache_utils:{name}": parameters for name, parameters in _PLANNER_SEAMS.items()},
    "vllm.v1.core.kv_cache_coordinator:get_kv_cache_coordinator": (
        "kv_cache_config",
        "max_model_len",
        "max_in_flight_tokens",
        "use_eagle",
        "enable_caching",
        "enable_kv_cache_events",
    ),
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.emit_cached_block_events": (
        "self",
        "request",
        "computed_blocks",
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.__init__": ("self", "kv_cache_config"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": (
        "self",
        "request",
        "num_new_tokens",
        "num_new_computed_tokens",
        "new_computed_blocks",
        "num_lookahead_tokens",
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.take_new_block_ids": ("self",),
    "vllm.v1.core.sched.scheduler:Scheduler.__init__": ("self", "vllm_config", "kv_cache_config"),
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("self",),
    "vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache": (
        "self",
        "reset_running_requests",
        "reset_connector",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._mamba_block_aligned_split": (
        "self",
        "request",
        "num_new_tokens",
        "num_new_local_computed_tokens",
        "num_external_computed_tokens",
    ),
    "vllm.v1.engine.core:EngineCore.get_kv_cache_group_metadata": ("self",),
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register_role_manager": ("role", "manager_class"),
    "vllm.platforms.interface:Platform._align_hybrid_block_size": ("vllm_config", "backend_cls"),
}
"""Module and name of each function that is replaced or called, and its first parameters (of a class method, without
the class)."""

_CPU_SEAMS: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.layers.mamba.mamba_mixer2:MambaMixer2.get_kv_cache_spec": ("self", "vllm_config"),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._zero_block_ids": ("self", "block_ids"),
}

_GPU_SEAMS: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner._init_kv_zero_meta": ("self",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._init_kv_zero_meta": ("self",),
    "vllm.v1.worker.utils:KVBlockZeroer.__init__": (
        "self",
        "device",
        "attn_groups_iter",
        "kernel_block_sizes",
        "static_forward_context",
        "num_blocks",
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


def check_seam(function: Callable[..., Any], parameters: tuple[str, ...], name: str = "") -> None:
    """Refuse a seam whose parameters are not the ones the replacement takes; `name` is where it was found.

    Raises:
        RuntimeError: names the function and both signatures.
    """
    found = tuple(inspect.signature(function).parameters)[: len(parameters)]
    if found != parameters:
        where = name.replace(":", ".") or f"{function.__module__}.{function.__qualname__}"
        raise RuntimeError(
            f"vLLM's {where} takes {found}, Jenga's plugin expects {parameters}. "
            "This vLLM was changed; install it anew, or turn the plugin off with JENGA=0."
        )


def find_seam(name: str) -> Callable[..., Any]:
    """The function called ``module:name``.

    Raises:
        RuntimeError: there is none.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"vLLM's {module}.{path}, which Jenga's plugin needs, cannot be found ({error}). This vLLM was changed; "
            "install it anew, or turn the plugin off with JENGA=0."
        ) from error
    return cast(Callable[..., Any], found)


def install() -> None:
    """Check every seam, then replace them all.

    Raises:
        RuntimeError: unknown vLLM version or changed seam; nothing was replaced.
    """
    import vllm

    check_version(vllm.__version__)

    from vllm.platforms import current_platform
    from vllm.v1.core import kv_cache_coordinator, kv_cache_manager, kv_cache_utils

    of_platform = _CPU_SEAMS if current_platform.is_cpu() else _GPU_SEAMS if current_platform.is_cuda_alike() else {}
    for name, parameters in (_SEAMS | of_platform).items():
        check_seam(find_seam(name), parameters, name)

    from jenga.vllm_plugin import (
        arrivals,
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
    arrivals.install()
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
