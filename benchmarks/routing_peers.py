"""The Ray Serve application of `benchmarks/routing.py`: the product's engines and ingress, several routers before them.

A request's `user` field names the router that places it, so that all are measured on the same engine processes.
Ray's `PrefixCacheAffinityRouter` and `KVAwareRouter` are Ray's own classes; what is added here brings requests and
event streams to them in the way that they expect, and writes down what they promise.  The latter needs Dynamo's
`ai-dynamo-runtime` on PYTHONPATH and is left out otherwise.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.mixins import CacheManagerIngressMixin
from ray.llm._internal.serve.routing_policies.kv_aware.constants import REQUEST_TOKEN_IDS_KWARG
from ray.llm._internal.serve.routing_policies.kv_aware.kv_aware_router import KVAwareRouter
from ray.llm._internal.serve.routing_policies.kv_aware.kv_token_tracker import KVTokenTracker
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter
from ray.serve._private.common import ReplicaID
from ray.serve.llm import build_llm_deployment
from ray.serve.llm.ingress import make_fastapi_ingress
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments import app, keys
from deployments.cache_router import KV_STREAM, CacheAwareRouter
from deployments.config import parse_serving
from deployments.engine import JengaServer
from deployments.ingress import ENDPOINTS, Ingress, build_fastapi
from deployments.router import PrefixAffinityRouter

OURS, AFFINITY, LEAST_LOADED = "cache-aware", "prefix-affinity", "least-loaded"
RAY_PREFIX, RAY_KV = "ray PrefixCacheAffinityRouter", "ray KVAwareRouter"
_TOKEN = re.compile(r"[A-Za-z][0-9]|[0-9]{2}|[;?!] |[\s\S]")
"""The demo models' tokens (`jenga.demo.tokenizer`): what a promise in characters is worth."""


def tokens_of(messages: list[dict[str, Any]], characters: int) -> int:
    """Tokens of a chat that its first `characters` characters of contents fix, template included."""
    tokens = 1
    for message in messages:
        text = message["content"]
        tokens += 1 + len(_TOKEN.findall(text[:characters]))
        if characters < len(text):
            break
        tokens += 1
        characters -= len(text)
    return tokens


class _Tree:
    """The prefix tree's actor, whose last answer is kept."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.prefix_match = self
        self.last: Any = None

    def remote(self, *arguments: Any) -> Any:
        self.last = self._actor.prefix_match.remote(*arguments)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)


class RayPrefix(PrefixCacheAffinityRouter):
    """Ray's router; its promise is the text that its tree says a replica was sent, in whole blocks."""

    def initialize_state(self, block_size: int = 32) -> None:  # type: ignore[override]
        super().initialize_state()
        self._block_size = block_size
        self._tree_actor = _Tree(self._tree_actor)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is not None and self._tree_actor.last is not None:
            text, holders = ray.get(self._tree_actor.last)
            self._tree_actor.last = None
            body = pending_request.args[0]
            prompt = len(keys.token_ids(body) or ())
            known = min(tokens_of(body.messages, len(text)), prompt - 1) // self._block_size * self._block_size
            keys.predict(
                body,
                {
                    replica.replica_id.unique_id: known if replica.replica_id.to_full_id_str() in (holders or ()) else 0
                    for replica in candidate_replicas
                },
            )
        return ranks


class _Tracker(KVTokenTracker):
    """Ray's tracker around Dynamo's index, which remembers its answers."""

    def __init__(self, **arguments: Any) -> None:
        self.chosen: dict[str, int] = {}
        super().__init__(**arguments)

    async def select_worker(self, request_id: str, *arguments: Any) -> Any:
        selection = await super().select_worker(request_id, *arguments)
        self.chosen[request_id] = selection["overlap_tokens"]
        return selection


class RayKV(KVAwareRouter):
    """Ray's router; its promise is Dynamo's overlap, less what has to be computed in any case."""

    def initialize_state(self, block_size: int = 32) -> None:  # type: ignore[override]
        self._kv_token_tracker = None
        self._block_size = block_size
        self._names: dict[str, str] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if self._kv_token_tracker is None:
            self._kv_token_tracker = _Tracker(serve_deployment_id=self._deployment_id)
        tracker = self._kv_token_tracker
        ids = keys.token_ids(pending_request.args[0]) if pending_request is not None else None
        if pending_request is None or ids is None or len(tracker._replica_id_by_worker) < len(candidate_replicas):
            return [candidate_replicas]
        asked = replace(pending_request, kwargs={**pending_request.kwargs, REQUEST_TOKEN_IDS_KWARG: ids})
        ranks = await super().choose_replicas(candidate_replicas, asked)
        name = pending_request.metadata.request_id
        self._names[pending_request.metadata.internal_request_id] = name
        overlap = tracker.chosen.pop(name)
        most = (len(ids) - 1) // self._block_size * self._block_size
        keys.predict(pending_request.args[0], {ranks[0][0].replica_id.unique_id: min(overlap, most)})
        return ranks

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        name = self._names.pop(internal_request_id, None)
        if name is not None and self._kv_token_tracker is not None:
            self._kv_token_tracker._schedule(self._kv_token_tracker.on_request_completed(name))


class Switch(RequestRouter):
    """All routers behind one handle; they share Ray's cache of queue lengths and see the same replicas."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._make: Callable[[type[RequestRouter]], RequestRouter] = lambda cls: cls(*arguments, **named)
        self._routers: dict[str, RequestRouter] = {}
        self._placed_by: dict[str, RequestRouter] = {}

    def initialize_state(self, ours: dict[str, Any], affinity: dict[str, Any], block_size: int, dynamo: bool) -> None:
        classes: dict[str, tuple[type[RequestRouter], dict[str, Any]]] = {
            OURS: (CacheAwareRouter, ours),
            AFFINITY: (PrefixAffinityRouter, affinity | {"affinity": True}),
            LEAST_LOADED: (PrefixAffinityRouter, affinity | {"affinity": False}),
            RAY_PREFIX: (RayPrefix, {"block_size": block_size}),
        }
        if dynamo:
            classes[RAY_KV] = (RayKV, {"block_size": block_size})
        for name, (cls, state) in classes.items():
            router = self._make(cls)
            router._replica_queue_len_cache = self._replica_queue_len_cache
            router.initialize_state(**state)
            self._routers[name] = router

    def _router(self, pending_request: PendingRequest | None) -> RequestRouter:
        body = pending_request.args[0] if pending_request is not None and pending_request.args else None
        return self._routers.get(getattr(body, "user", None) or "", self._routers[LEAST_LOADED])

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        for router in self._routers.values():
            router.update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        return await self._router(pending_request).choose_replicas(candidate_replicas, pending_request)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        router = self._router(pending_request)
        self._placed_by[pending_request.metadata.internal_request_id] = router
        if pending_request.args and getattr(pending_request.args[0], "messages", None):
            router.on_request_routed(pending_request, replica_id, result)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        router = self._placed_by.pop(internal_request_id, None)
        if router is not None:
            router.on_request_completed(replica_id, internal_request_id)


class Server(JengaServer):
    """The product's replica, which also tells its event stream in Ray's words."""

    async def record_routing_stats(self) -> dict[str, Any]:
        told = await super().record_routing_stats()
        stream = told.get(KV_STREAM)
        if stream:
            told["kv_event_metadata"] = {
                "endpoint": stream["events"],
                "replay_endpoint": stream["replay"],
                "block_size": self._llm_config.engine_kwargs["block_size"],
                "max_num_batched_tokens": 2048,
                "dp_rank": 0,
            }
        return told


class BenchIngress(CacheManagerIngressMixin, Ingress):
    """The product's ingress, and Ray's way to empty all prefix caches."""


def build(args: dict[str, Any]) -> serve.Application:
    """The application, from the `args` of a serving configuration."""
    config = parse_serving(args)
    ray_config = app.llm_config(config, app.model_folder(config))
    other = config.model_copy(update={"router": config.router.model_copy(update={"policy": "prefix-affinity"})})
    ray_config.server_cls = Server
    routing = ray_config.deployment_config["request_router_config"]
    routing["request_router_class"] = Switch
    routing["request_router_kwargs"] = {
        "ours": app.router_kwargs(config),
        "affinity": {key: value for key, value in app.router_kwargs(other).items() if key != "affinity"},
        "block_size": config.engine.block_size,
        "dynamo": importlib.util.find_spec("dynamo") is not None,
    }
    endpoints = ENDPOINTS | CacheManagerIngressMixin.ENDPOINTS
    ingress = make_fastapi_ingress(BenchIngress, endpoint_map=endpoints, app=build_fastapi())
    deployment = serve.deployment(
        ingress,
        name="Ingress",
        num_replicas=1,
        max_ongoing_requests=1_000_000,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": app.environment(config)}},
    )
    return deployment.bind(
        llm_deployments={config.model.id: build_llm_deployment(ray_config, name_prefix="Engine:")},
        model_cards={config.model.id: to_model_metadata(config.model.id, ray_config)},
        tokenise={config.model.id: ray_config},
    )
