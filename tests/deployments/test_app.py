"""Our settings in Ray's and vLLM's form."""

import asyncio
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.serve.llm.deployment import LLMServer
from vllm.v1.engine.exceptions import EngineDeadError

from deployments.app import build, engine_kwargs, environment, llm_config
from deployments.config import ConfigError, Serving, engine_deployment, parse_serving
from deployments.engine import JengaServer
from deployments.fairness import TellsTurns
from deployments.ingress import build_fastapi, refusal
from deployments.placement import Policy
from deployments.router import PrefixAffinityRouter


def serving(**changes: Any) -> Serving:
    return parse_serving({"model": {"id": "m", "path": "/models/m"}} | changes)


def test_only_what_is_set_reaches_vllm() -> None:
    plain = engine_kwargs(serving())
    assert "max_model_len" not in plain
    assert "kv_cache_memory_bytes" not in plain
    assert plain["enable_prompt_tokens_details"] is True
    told = engine_kwargs(serving(engine={"kv_memory": "1MiB", "max_model_len": 9, "extra": {"seed": 3}}))
    assert (told["kv_cache_memory_bytes"], told["max_model_len"], told["seed"]) == (2**20, 9, 3)


def test_cpu_engines_get_their_threads_and_the_file_has_the_last_word() -> None:
    cpu = environment(serving(resources={"omp_threads": 2}, environment={"HF_HUB_OFFLINE": 0}))
    assert (cpu["OMP_NUM_THREADS"], cpu["VLLM_CPU_OMP_THREADS_BIND"], cpu["HF_HUB_OFFLINE"]) == ("2", "nobind", "0")
    assert "OMP_NUM_THREADS" not in environment(serving(resources={"gpus": 1}))


def test_a_replica_takes_its_workers_bundles_and_is_routed_by_our_router() -> None:
    config = llm_config(
        serving(resources={"cpus": 2, "gpus": 1, "tensor_parallel": 2}, router={"policy": "least-loaded", "chunk": 7}),
        Path("/models/m"),
    )
    assert config.server_cls is JengaServer
    # Not through `get_deployment_options`, which starts a Ray to ask it for its runtime environment.
    assert config.get_engine_config().placement_bundles == [{"GPU": 1, "CPU": 2}, {"GPU": 1, "CPU": 2}]
    assert config.get_engine_config().placement_strategy == "STRICT_PACK"
    assert config.deployment_config["ray_actor_options"] == {"num_cpus": 0}
    routing = config.deployment_config["request_router_config"]
    assert routing["request_router_class"] is PrefixAffinityRouter
    kwargs = dict(routing["request_router_kwargs"])
    assert kwargs.pop("slow_start") == 30
    assert Policy(**kwargs) == Policy(chunk=7, affinity=False)


def test_build_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'modle'; did you mean 'model'"):
        build({"modle": {}})
    with pytest.raises(ConfigError, match=rf"{tmp_path}/absent does not exist; `jenga demo-model absent` makes it"):
        build({"model": {"id": "m", "path": str(tmp_path / "absent"), "demo": "absent"}})
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        build({"model": {"id": "m", "path": str(tmp_path)}})


@pytest.mark.parametrize(
    ("message", "status", "code", "param", "shown"),
    [
        ("The model 'x' does not exist", 404, b'"model_not_found"', b"null", b"does not exist"),
        ("maximum context length is 9 tokens", 400, b'"context_length_exceeded"', b"null", b"9 tokens"),
        ("n must be at least 1 (parameter=n, value=0)", 400, b"null", b'"n"', b'least 1"'),
    ],
)
def test_refusals_have_openais_form(message: str, status: int, code: bytes, param: bytes, shown: bytes) -> None:
    response = refusal(message, status)
    body = bytes(response.body)
    assert response.status_code == status
    assert b'"code":' + code in body
    assert b'"param":' + param in body
    assert shown in body


def test_a_replica_that_is_to_stop_may_end_its_longest_answer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    # Building unpickles the router's class over itself, in this process: a class that other tests do not look into.
    router = {"policy": "least-loaded"}
    args = {"model": {"id": "m", "path": str(tmp_path)}, "limits": {"request_s": 900}, "router": router}
    assert llm_config(parse_serving(args), tmp_path).deployment_config["graceful_shutdown_timeout_s"] > 900
    assert build(args)._bound_deployment._deployment_config.graceful_shutdown_timeout_s > 900


def test_engines_have_the_name_by_which_their_number_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    args = {"model": {"id": "org/model-1.5", "path": str(tmp_path)}, "router": {"policy": "least-loaded"}}
    engines = build(args)._bound_deployment.init_kwargs["llm_deployments"]["org/model-1.5"]
    assert engines._bound_deployment.name == engine_deployment("org/model-1.5")
    assert engines._bound_deployment._deployment_config.num_replicas == 1, "until told otherwise"


def test_each_ingress_has_turns_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    args = {"model": {"id": "m", "path": str(tmp_path)}, "ingresses": 3, "router": {"policy": "least-loaded"}}
    assert build(args)._bound_deployment._deployment_config.num_replicas == 3
    one, three = (build_fastapi(replicas=number).user_middleware[0] for number in (1, 3))
    assert one.cls is three.cls is TellsTurns
    assert three.kwargs["at_once"] == 3 * one.kwargs["at_once"]


def test_engines_serve_tenants_in_the_order_of_the_guard_where_there_are_keys(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    args: dict[str, Any] = {"model": {"id": "m", "path": str(tmp_path)}, "router": {"policy": "least-loaded"}}
    keys = {"auth": {"keys_variable": "KEYS"}}
    own = {"engine": {"extra": {"scheduling_policy": "fcfs"}}}
    for given, policy, ordered in (
        (args, None, False),
        (args | keys, "priority", True),
        (args | keys | own, "fcfs", False),
    ):
        assert engine_kwargs(parse_serving(given)).get("scheduling_policy") == policy
        assert build(given)._bound_deployment.init_kwargs["tenants_order"] is ordered


def test_prompts_are_counted_whatever_the_router_needs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    args: dict[str, Any] = {"model": {"id": "m", "path": str(tmp_path)}, "router": {"policy": "least-loaded"}}
    for limits, counted in (({}, False), ({"prompt_tokens": 5}, True)):
        bound = build(args | {"limits": limits})._bound_deployment.init_kwargs
        assert (bool(bound["tokenise"]), bound["tell_tokens"]) == (counted, False)


def test_a_dead_engine_is_told_in_words_that_any_process_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dead(self: LLMServer) -> None:
        raise EngineDeadError

    monkeypatch.setattr(LLMServer, "check_health", dead)
    with pytest.raises(RuntimeError, match="EngineDeadError") as told:
        asyncio.run(JengaServer.check_health(object.__new__(JengaServer)))
    needs = "import pickle, sys; pickle.load(sys.stdin.buffer); assert not {'vllm', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", needs], input=pickle.dumps(told.value), check=True)
