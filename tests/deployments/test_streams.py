"""Streams that fail: what a replica raises, and what its client gets of that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse, OpenAIHTTPException
from ray.serve.llm.ingress import OpenAiIngress
from starlette.responses import Response, StreamingResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from deployments import ingress
from deployments.ingress import Ingress
from deployments.streams import END, raise_failures

FIRST = 'data: {"choices": [{"text": "a"}]}\n\n'
SECOND = 'data: {"choices": [{"text": "b"}]}\n\n'


def vllms_stream(kind: type, error: Exception) -> list[str]:
    """What vLLM's own generator makes of an engine that fails, after `raise_failures`."""

    async def failing() -> AsyncIterator[Any]:
        raise error
        yield

    serving = object.__new__(kind)
    serving.enable_force_include_usage = False
    serving.parser_cls = None
    raise_failures(serving)
    common = {"request_id": "r", "model_name": "m", "tokenizer": None, "request_metadata": None}
    if kind is OpenAIServingCompletion:
        asked = CompletionRequest(model="m", prompt="x", stream=True)
        stream = serving.completion_stream_generator(asked, [], failing(), created_time=0, num_prompts=1, **common)
    else:
        chat = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}], stream=True)
        stream = serving.chat_completion_stream_generator(chat, failing(), conversation=[], **common)

    async def collect() -> list[str]:
        return [part async for part in stream]

    return asyncio.run(collect())


@pytest.mark.parametrize("kind", [OpenAIServingCompletion, OpenAIServingChat])
def test_vllms_streams_raise_what_they_failed_of(kind: type) -> None:
    for error in (EngineDeadError(), GenerationError("no")):
        with pytest.raises(type(error)) as raised:
            vllms_stream(kind, error)
        assert raised.value is error
    with pytest.raises(OpenAIHTTPException) as refused:
        vllms_stream(kind, VLLMValidationError("too odd"))
    assert (refused.value.status_code, refused.value.message) == (400, "too odd")


class Answers:
    """A handle whose replicas do in turn what is written down for each: parts, and what is raised."""

    def __init__(self, *replicas: list[Any]) -> None:
        self.left = list(replicas)
        self.completions = SimpleNamespace(remote=self._answer)

    def _answer(self, body: Any, client: Any) -> Any:
        parts = self.left.pop(0)

        class Parts:
            async def __anext__(self) -> Any:
                await asyncio.sleep(0)
                if not parts:
                    raise StopAsyncIteration
                part = parts.pop(0)
                if isinstance(part, Exception):
                    raise part
                return part

            def cancel(self) -> None:
                parts.clear()

        return Parts()


def ask(monkeypatch: pytest.MonkeyPatch, *replicas: list[Any]) -> tuple[Response, str]:
    """A streamed request to replicas that do these things, and all that is answered."""
    monkeypatch.setattr(ingress, "SECOND_TRY_S", 0.0)
    handle = Answers(*replicas)
    # Ray's own would look for the engines.
    monkeypatch.setattr(OpenAiIngress, "__init__", lambda self: None)
    door = Ingress()
    door._model_cards = {"m": None}
    monkeypatch.setattr(door, "_get_configured_serve_handle", lambda model: handle)

    async def answered() -> tuple[Response, str]:
        body = CompletionRequest(model="m", prompt="x", stream=True)
        got = await door._process_llm_request(body, "completions")
        if isinstance(got, StreamingResponse):
            return got, "".join([str(part) async for part in got.body_iterator])
        return got, bytes(got.body).decode()

    result = asyncio.run(answered())
    assert handle.left == [], "every replica was asked"
    return result


DEATHS = {"engine": EngineDeadError(), "replica": ActorDiedError(), "no word": None}


def died(how: str) -> list[Any]:
    return [] if DEATHS[how] is None else [DEATHS[how]]


def test_a_whole_stream_passes_with_one_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, [[FIRST], [SECOND, END]])[1] == FIRST + SECOND + END
    assert ask(monkeypatch, [[FIRST], [SECOND], [END]])[1] == FIRST + SECOND + END


@pytest.mark.parametrize("how", DEATHS)
def test_a_stream_that_has_not_begun_goes_to_another_replica(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    got, text = ask(monkeypatch, died(how), [[FIRST, END]])
    assert (got.status_code, text) == (200, FIRST + END)


@pytest.mark.parametrize("how", DEATHS)
def test_two_dead_replicas_are_an_honest_503(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    got, text = ask(monkeypatch, died(how), died(how))
    assert got.status_code == 503
    assert got.headers["retry-after"]
    assert json.loads(text)["error"]["code"] == "engine_unavailable"


@pytest.mark.parametrize(
    ("failure", "kind", "code"),
    [
        *(([error] if error else [], "server_error", "engine_error") for error in DEATHS.values()),
        ([GenerationError("no")], "server_error", "engine_error"),
        ([OpenAIHTTPException(400, "too odd", "BadRequestError")], "invalid_request_error", None),
    ],
)
def test_a_cut_stream_ends_with_our_error_and_no_done(
    monkeypatch: pytest.MonkeyPatch, failure: list[Any], kind: str, code: str | None
) -> None:
    _, text = ask(monkeypatch, [[FIRST], [SECOND], *failure])
    assert text.startswith(FIRST + SECOND)
    assert "[DONE]" not in text
    last = text.removeprefix(FIRST + SECOND)
    error = json.loads(last.removeprefix("data: "))["error"]
    assert last.endswith("\n\n")
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, code)


def test_a_refusal_is_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = ErrorResponse(error=ErrorInfo(message="too long", type="BadRequestError", code=400))
    with pytest.raises(OpenAIHTTPException) as raised:
        ask(monkeypatch, [[refusal]])
    assert (raised.value.status_code, raised.value.message) == (400, "too long")
