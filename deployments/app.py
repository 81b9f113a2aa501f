"""The Ray Serve application: `deployments.app:build`, named by `import_path` in configs/*.yaml."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.ingress import make_fastapi_ingress

from deployments import tensor_parallel
from deployments.autoscaling import KvMemoryPolicy
from deployments.cache_router import CacheAwareRouter
from deployments.config import ENGINES, Autoscaling, ConfigError, KvMemory, OngoingRequests, Serving, parse_serving
from deployments.engine import JengaServer
from deployments.events import ENGINE_CONFIG
from deployments.ingress import ENDPOINTS, Ingress, build_fastapi
from deployments.router import PrefixAffinityRouter

# Ongoing requests of the ingress are bounded by the engines' queues, not by it.
_NO_LIMIT = 1_000_000
# vLLM's name of a scheduling policy.
_BY_PRIORITY = "priority"
# Ray's mark of a cluster's head node.
_ON_THE_HEAD = "node:__internal_head__"
# How often the controller asks a replica what routers should know.
_ROUTING_PERIOD_S = 2.0
# A replica that is to stop ends its answers first: the longest that a request may take, and time to send the end.
_LAST_WORDS_S = 30.0


def environment(config: Serving) -> dict[str, str]:
    """Variables of each replica; the file's own come last."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Block hashes must agree between replicas.
        "PYTHONHASHSEED": "0",
    }
    if config.resources.gpus == 0:
        # Without these two parallel CPU engines fight for the cores: 80 s instead of 3 s, measured.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        variables["OMP_NUM_THREADS"] = str(config.resources.omp_threads)
    return variables | config.environment


def engine_kwargs(config: Serving) -> dict[str, Any]:
    """Arguments of vLLM's engine and OpenAI front end."""
    engine = config.engine
    chosen = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "block_size": engine.block_size,
        "kv_cache_memory_bytes": int(engine.kv_memory) if engine.kv_memory is not None else None,
    }
    return {key: value for key, value in chosen.items() if value is not None} | {
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": engine.prefix_caching,
        "tensor_parallel_size": config.resources.tensor_parallel,
        # `usage` tells the cached tokens of each prompt.
        "enable_prompt_tokens_details": True,
        **({"kv_events_config": ENGINE_CONFIG} if cache_aware(config) else {}),
        # One tenant's many requests do not make another's wait in an engine: `deployments.order`.
        **({"scheduling_policy": _BY_PRIORITY} if config.auth is not None else {}),
        **engine.extra,
        **({"additional_config": _without_contents(engine.extra)} if cache_aware(config) else {}),
    }


def _without_contents(extra: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's ``additional_config`` with events that tell no prompt and no salt: whoever reaches the node could read."""
    given = dict(extra.get("additional_config") or {})
    jenga = dict(given.get("jenga") or {})
    return given | {"jenga": jenga | {"events": {"contents": False} | dict(jenga.get("events") or {})}}


def model_folder(config: Serving) -> Path:
    """The model's folder; raises ConfigError when it is no model, or cannot be split as configured."""
    folder = Path(config.model.path).expanduser().absolute()
    if not (folder / "config.json").is_file():
        state = "has no config.json" if folder.is_dir() else "does not exist"
        remedy = f"; `jenga demo-model {config.model.demo}` makes it" if config.model.demo else ""
        raise ConfigError(f"model.path: the model folder {folder} {state}{remedy}")
    tensor_parallel.check(config, folder)
    return folder


def llm_config(config: Serving, source: Path) -> LLMConfig:
    """Our settings in Ray's form."""
    resources, replicas = config.resources, config.replicas
    deployment: dict[str, Any] = {
        # The workers' bundle carries what a replica takes; the actor beside them takes nothing more.
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": _NO_LIMIT,
        "graceful_shutdown_timeout_s": config.limits.request_s + _LAST_WORDS_S,
        # A dead engine fails requests fast, which makes it look idle: find it soon.  Slow is not dead.
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "request_router_config": {
            "request_router_class": CacheAwareRouter if cache_aware(config) else PrefixAffinityRouter,
            "request_router_kwargs": router_kwargs(config),
            "request_routing_stats_period_s": _ROUTING_PERIOD_S,
        },
    }
    if isinstance(replicas, Autoscaling):
        deployment["autoscaling_config"] = autoscaling(replicas)
    else:
        deployment["num_replicas"] = replicas
    bundle = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    return LLMConfig(
        model_loading_config={"model_id": config.model.id, "model_source": str(source)},
        engine_kwargs=engine_kwargs(config),
        # On one node: workers of one model talk all the time.
        placement_group_config={"bundle_per_worker": bundle, "strategy": "STRICT_PACK"},
        deployment_config=deployment,
        runtime_env={"env_vars": environment(config)},
        experimental_configs={"stream_batching_interval_ms": config.stream_batch_ms},
        log_engine_metrics=True,
        server_cls=JengaServer,
    )


def autoscaling(replicas: Autoscaling) -> dict[str, Any]:
    """Ray Serve's `autoscaling_config`."""
    common = {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "look_back_period_s": replicas.look_back_s,
        # Ray's own 10 s, unless that would be most of what a decision looks back on.
        "metrics_interval_s": min(10.0, replicas.look_back_s / 3),
        "upscale_delay_s": replicas.upscale_delay_s,
        "downscale_delay_s": replicas.downscale_delay_s,
    }
    if isinstance(replicas, OngoingRequests):
        return common | {"target_ongoing_requests": replicas.target_ongoing_requests}
    assert isinstance(replicas, KvMemory)
    target = {"kv_in_use": replicas.kv_target, "waiting": replicas.waiting_target, "slack": replicas.slack}
    name = f"{KvMemoryPolicy.__module__}:{KvMemoryPolicy.__name__}"
    return common | {"policy": {"policy_function": name, "policy_kwargs": target}}


def cache_aware(config: Serving) -> bool:
    """Whether routers follow the engines' KV events."""
    return config.router.policy == "cache-aware" and config.engine.prefix_caching


def router_kwargs(config: Serving) -> dict[str, Any]:
    """What the router class is initialised with."""
    router = config.router
    if cache_aware(config):
        return {
            "hash_algorithm": config.engine.extra.get("prefix_caching_hash_algo", "sha256"),
            "request": router.request_price,
            "compute": router.compute_price,
            "behind": router.behind_price,
            "store": router.store_price,
            "pressure": router.pressure_price,
            "slack": router.slack,
            "slow_start": router.slow_start_s,
        }
    fields = {"chunk", "max_chunks", "max_entries", "load_factor", "load_slack"}
    return router.model_dump(include=fields) | {
        "affinity": router.policy != "least-loaded",
        "slow_start": router.slow_start_s,
    }


def build(args: dict[str, Any]) -> serve.Application:
    """Builder of the application from `args` of the configuration file.

    Raises ConfigError, which Ray Serve reports as the reason of a failed deployment.
    """
    config = parse_serving(args)
    auth = config.auth
    if auth is not None and auth.keys_file is not None:
        # Relative to this process's folder, as the model's is.
        auth = auth.model_copy(update={"keys_file": str(Path(auth.keys_file).expanduser().absolute())})
    ray_config = llm_config(config, model_folder(config))
    # `serve.ingress` pickles the FastAPI application, so it is made here, once per build.
    fastapi = build_fastapi(auth, config.limits, context=config.engine.max_model_len, replicas=config.ingresses)
    ingress = make_fastapi_ingress(Ingress, endpoint_map=ENDPOINTS, app=fastapi)
    deployment = serve.deployment(
        ingress,
        name="Ingress",
        num_replicas=config.ingresses,
        max_ongoing_requests=_NO_LIMIT,
        graceful_shutdown_timeout_s=config.limits.request_s + _LAST_WORDS_S,
        # Another one is up before this one ends.
        max_surge_percent=100,
        ray_actor_options={
            "num_cpus": 0,
            # Beside the door that requests come in by: the loss of a worker is none of the ingress.
            "resources": {_ON_THE_HEAD: 0.001},
            "runtime_env": {"env_vars": environment(config)},
        },
    )
    return deployment.bind(
        llm_deployments={config.model.id: build_llm_deployment(ray_config, name_prefix=ENGINES)},
        model_cards={config.model.id: to_model_metadata(config.model.id, ray_config)},
        tokenise={config.model.id: ray_config} if cache_aware(config) or config.limits.prompt_tokens else {},
        tell_tokens=cache_aware(config),
        tenants_order=auth is not None and ray_config.engine_kwargs["scheduling_policy"] == _BY_PRIORITY,
        show_memory=config.memory_map,
        limits=config.limits,
    )
