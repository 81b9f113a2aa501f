"""OpenAI ingress: Ray's, with OpenAI's error form for every kind of failure."""

import asyncio
import json
import logging
import re
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    ErrorResponse,
    OpenAIHTTPException,
)
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, init
from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.serve.llm import LLMConfig
from ray.serve.llm.ingress import OpenAiIngress
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.exceptions import GenerationError, VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from deployments import memory_map
from deployments.bodies import too_long
from deployments.config import Auth, Limits
from deployments.errors import RETRY_AFTER_S, SECOND_TRY_S, error_body, error_response
from deployments.fairness import AT_ONCE, TellsTurns
from deployments.guard import TIME_IS_UP, Admitted, Guard, time_is_up
from deployments.keys import attach
from deployments.placement import prompt_of
from deployments.renderer import PromptRenderer
from deployments.streams import is_whole

logger = logging.getLogger("ray.serve")

# What this product serves of Ray's endpoints; embeddings, scores and audio need other models.
ENDPOINTS = {name: DEFAULT_ENDPOINTS[name] for name in ("completions", "chat")} | {
    "health": lambda app: app.get("/health", include_in_schema=False),
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    **memory_map.ENDPOINTS,
}

# Key of Ray's model card: tokens of prompt and answer together, None if the configuration does not say.
_LENGTH = "max_request_context_length"


class _NoEndError(Exception):
    """A stream ended without its last event."""


# What a replica that died leaves.
_DEATH = (EngineDeadError, RayActorError, _NoEndError)


def validation_response(error: RequestValidationError) -> JSONResponse:
    """What the request's body has wrong, first fault first, without echoing the body."""
    faults = error.errors()
    fault = faults[0] if faults else {"type": "", "msg": "invalid request", "loc": ()}
    where = [part for part in fault["loc"] if part not in ("body", "query")]
    if fault["type"] == "json_invalid":
        reason = fault.get("ctx", {}).get("error", "cannot be parsed")
        return error_response(
            f"The request body is not valid JSON: {reason} at character {where[-1] if where else 0}.",
            400,
            code="invalid_json",
        )
    if not where:
        return error_response(
            "The request body must be a JSON object, sent with Content-Type: application/json.",
            400,
            code="invalid_json",
        )
    path, within_union = _field_path(where)
    message = fault["msg"].removeprefix("Value error, ")
    if within_union:
        message = "This is none of the forms that are accepted here."
    elif fault["type"] == "missing":
        message = "This field is required."
    return error_response(f"{path}: {message}", 400, param=path, code="invalid_value")


def _field_path(where: list[str | int]) -> tuple[str, bool]:
    """A field's path in the body, and whether the fault lies in a union.

    Behind a union's field pydantic names the member that it tried, which is no part of the body.
    """
    path = [str(where[0])]
    for part in where[1:]:
        if not isinstance(part, int):
            return ".".join(path), True
        path.append(str(part))
    return ".".join(path), False


# vLLM ends its messages with what Ray does not pass on separately: `(parameter=n, value=0)`.
_PARAMETER = re.compile(r" \(parameter=(?P<name>\w+)(?:, value=.*)?\)$", re.DOTALL)


def refusal(message: str, status: int) -> JSONResponse:
    """A refused request in OpenAI's terms, from the text that Ray or vLLM gave."""
    code = None
    if status == 404 and "model" in message:
        code = "model_not_found"
    elif status == 400 and "maximum context length" in message:
        code = "context_length_exceeded"
    parameter = _PARAMETER.search(message)
    if parameter:
        message = message[: parameter.start()]
    return error_response(message, status, param=parameter["name"] if parameter else None, code=code)


class BodyRoute(APIRoute):
    """A route that tells faults of the body from faults of the server.

    vLLM's request classes trip over some bodies (`messages: 3`) with whatever Python raises.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, which reads the body and calls the endpoint."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except (HTTPException, OpenAIHTTPException, RequestValidationError, VLLMClientError):
                raise
            except Exception as error:
                if request.method == "POST" and not getattr(request.state, "body_was_read", False):
                    return error_response(
                        f"The request body has not the form that {request.url.path} expects: {error}.",
                        400,
                        code="invalid_value",
                    )
                # Not the error's own text, which may quote the prompt.
                where = "".join(traceback.format_tb(error.__traceback__))
                logger.error("a request failed: %s\n%s", type(error).__name__, where)
                logger.debug("it failed because: %s", error)
                return error_response(
                    "The server failed on this request; its log tells why.", 500, code="internal_error"
                )

        return guarded


def build_fastapi(
    auth: Auth | None = None, limits: Limits | None = None, *, context: int | None = None, replicas: int = 1
) -> FastAPI:
    """Ray's FastAPI application (request ids, metrics, CORS) with our guard and error handlers.

    `context`: tokens that the model can have, if that is known; `replicas`: ingresses that run it.
    """
    app = init()
    # Innermost, so that refusals have CORS headers and are counted.
    app.user_middleware.append(Middleware(Guard, auth=auth, limits=limits or Limits(), context=context))
    # Outermost, since what it sends is for the proxy alone.
    app.add_middleware(TellsTurns, at_once=AT_ONCE * replicas)
    app.router.route_class = BodyRoute

    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_response(error)

    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code in (404, 405) and message in ("Not Found", "Method Not Allowed"):
            message = f"There is no {request.method} {request.url.path} here."
        return refusal(message, error.status_code)

    async def on_openai_error(request: Request, error: OpenAIHTTPException) -> JSONResponse:
        return refusal(error.message, error.status_code)

    async def on_client_error(request: Request, error: VLLMClientError) -> JSONResponse:
        return refusal(str(error), 400)

    handlers: dict[type[Exception], Any] = {
        RequestValidationError: on_validation_error,
        HTTPException: on_http_error,
        OpenAIHTTPException: on_openai_error,
        # Raised by vLLM's request classes while the body is read.
        VLLMClientError: on_client_error,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    return app


class _TimeIsUpError(Exception):
    """A request's deadline passed before its answer began.  No TimeoutError, which Ray would take for its own."""


def make_renderer(config: LLMConfig) -> PromptRenderer | None:
    """The renderer of prompts for a model, None (and a line in the log) if it cannot be had in this process."""
    try:
        return PromptRenderer(config)
    except Exception:
        logger.exception("prompts of %s are not tokenised before routing: requests go by load alone", config.model_id)
        return None


class Ingress(memory_map.MemoryRoutes, OpenAiIngress):
    """Ray's ingress, with OpenAI's own words for an unknown model and no traceback in any answer."""

    def __init__(
        self,
        *args: Any,
        tokenise: Mapping[str, LLMConfig] | None = None,
        show_memory: bool = True,
        limits: Limits | None = None,
        tell_tokens: bool = True,
        tenants_order: bool = False,
        **kwargs: Any,
    ) -> None:
        """`tokenise` are the models whose prompts are tokenised here, once.

        `tell_tokens`: the router and the engine get the tokens; otherwise they are only counted, for `limits`.
        `tenants_order`: engines take waiting requests in the guard's order, not in their clients'.

        Raises RuntimeError where prompts cannot be counted although `limits` bounds them.
        """
        super().__init__(*args, **kwargs)
        self._memory_map_on = show_memory
        self._limits = limits or Limits()
        self._tell_tokens = tell_tokens
        self._tenants_order = tenants_order
        self._created = int(time.time())
        self._renderers = {model: make_renderer(config) for model, config in (tokenise or {}).items()}
        if self._limits.prompt_tokens is not None and None in self._renderers.values():
            raise RuntimeError("limits.prompt_tokens: this model's prompts cannot be tokenised in the ingress")

    def _memory_handles(self) -> dict[str, Any]:
        # The handles that requests go through: another one would bring a router of its own.
        return {model: self._get_configured_serve_handle(model) for model in self._model_cards}

    async def health(self) -> Response:
        """That this ingress answers; needs no key."""
        return Response(status_code=200)

    async def models(self) -> dict[str, Any]:
        """The served models."""
        return {"object": "list", "data": [self._card(model) for model in self._model_cards]}

    async def model_data(self, model: str) -> dict[str, Any]:
        """One served model."""
        return self._card(await self._get_model_id(model))

    def _card(self, model: str) -> dict[str, Any]:
        card = self._model_cards[model]
        return {
            "id": model,
            "object": "model",
            "created": self._created,
            "owned_by": "jenga",
            "root": model,
            "max_model_len": card.metadata[_LENGTH],
        }

    async def _get_model_id(self, model: str | None) -> str:
        if model is None and len(self._model_cards) == 1:
            return next(iter(self._model_cards))
        if model not in self._model_cards:
            served = ", ".join(sorted(self._model_cards))
            raise HTTPException(404, f"The model '{model}' does not exist; served here: {served}.")
        return model

    async def _token_ids(self, body: Any, raw_request: Request | None) -> list[int] | None:
        """The prompt's tokens, None if only the engine can tell them."""
        renderer = self._renderers.get(body.model or next(iter(self._model_cards)))
        if renderer is None or raw_request is None:
            return None
        try:
            # Not from `body`, whose one-shot iterators the engine wants to read.
            return await renderer.token_ids(await raw_request.json())
        except Exception as error:
            # Whatever is wrong with the request, the engine's own words for it are the ones clients know.
            logger.debug("a prompt was not tokenised before routing: %s", type(error).__name__)
            return None

    async def _too_long(self, body: Any, raw_request: Request | None, ids: list[int] | None) -> Response | None:
        """The refusal of a prompt beyond `limits.prompt_tokens`."""
        most = self._limits.prompt_tokens
        renderer = self._renderers.get(body.model or next(iter(self._model_cards)))
        if most is None or renderer is None or raw_request is None:
            return None
        lengths = [len(ids)] if ids is not None else []
        if ids is None:
            try:
                lengths = await renderer.lengths(await raw_request.json())
            except Exception as error:
                logger.debug("a prompt's length is not known: %s", type(error).__name__)
        longest = max(lengths, default=0)
        if longest <= most:
            return None
        found = too_long(longest, most)
        return error_response(found.message, 400, code=found.code)

    async def _get_response(
        self, *, body: Any, call_method: str, raw_request: Request | None = None
    ) -> AsyncGenerator[Any, None]:
        """A replica's answer in parts; a failure inside a stream becomes its last event, and nothing follows that.

        Not Ray's own method, which keeps to itself by what an answer can be cancelled.

        Raises what the replica raised, or left behind, before the first part.
        """
        handle = self._get_configured_serve_handle(await self._get_model_id(body.model))
        client = None if raw_request is None else RawRequestInfo.from_starlette_request(raw_request)
        parts = getattr(handle, call_method).remote(body, client)
        deadline = _admitted(raw_request).deadline
        started = ended = False
        try:
            while True:
                async with asyncio.timeout_at(deadline) as timer:
                    try:
                        part = await anext(parts)
                    except StopAsyncIteration:
                        ended = True
                        if body.stream and not (started and is_whole(part)):
                            raise _NoEndError from None
                        return
                started = True
                yield part
        except Exception as error:
            ended = not timer.expired()
            if not started:
                raise (_TimeIsUpError() if timer.expired() else error) from None
            if timer.expired():
                message = TIME_IS_UP.format(seconds=self._limits.request_s)
                told = error_body(message, 408, code="request_timeout")
            elif isinstance(error, GenerationError) and _asks_for_form(body):
                told = error_body(_NO_FORM, 400, code="invalid_form")
            elif isinstance(error, OpenAIHTTPException):
                told = error_body(error.message, error.status_code)
            else:
                logger.exception("the engine failed during a stream")
                why = "the replica died" if isinstance(error, _DEATH) else "the engine failed"
                told = error_body(f"This answer is cut: {why}; ask again.", 500, code="engine_error")
            yield f"data: {json.dumps(told)}\n\n"
        finally:
            if not ended:
                # The engine aborts it; a handle left alone would let it run on.
                parts.cancel()

    async def _answer(self, body: Any, call_method: str, raw_request: Request | None) -> Response:
        """A replica's answer, once it has begun.

        Not Ray's own way, which ends every stream as if it were whole.
        """
        parts = self._get_response(body=body, call_method=call_method, raw_request=raw_request)
        first = await anext(parts)
        begun = first[0] if isinstance(first, list) else first
        if isinstance(begun, ErrorResponse):
            raise OpenAIHTTPException(begun.error.code, begun.error.message, begun.error.type)
        if isinstance(begun, BaseModel):
            return JSONResponse(begun.model_dump())

        async def events() -> AsyncGenerator[str, None]:
            yield "".join(first)
            async for part in parts:
                yield "".join(part)

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _process_llm_request(self, body: Any, call_method: str, raw_request: Request | None = None) -> Response:
        """An answer to a request; what a replica raises becomes one that says whose fault it was."""
        if raw_request is not None:
            raw_request.state.body_was_read = True
        if isinstance(body, ChatCompletionRequest):
            try:
                # Reads iterators that cannot travel, and so finds what is wrong in them.
                body = _sanitize_chat_completion_request(body)
            except ValueError:
                return error_response(
                    "messages: This is none of the forms that are accepted here.",
                    400,
                    param="messages",
                    code="invalid_value",
                )
        if (asked := _sequences(body)) > self._limits.sequences:
            return error_response(
                f"The request asks for {asked} answers, prompts times n; at most {self._limits.sequences} are allowed "
                "here (limits.sequences).",
                400,
                code="too_many_sequences",
            )
        body.cache_salt = _admitted(raw_request).cache_salt(body.cache_salt)
        if self._tenants_order and raw_request is not None:
            body.priority = raw_request.state.priority
        ids = await self._token_ids(body, raw_request)
        if refused := await self._too_long(body, raw_request, ids):
            return refused
        ids = ids if self._tell_tokens else None
        if raw_request is not None and (end_turn := getattr(raw_request.state, "end_turn", None)) is not None:
            await end_turn()
        try:
            attach(body, ids)
            try:
                return await self._answer(body, call_method, raw_request)
            except _DEATH as error:
                logger.warning("a replica died under a request, which goes to another one: %s", type(error).__name__)
                await asyncio.sleep(SECOND_TRY_S)
            attach(body, ids)
            return await self._answer(body, call_method, raw_request)
        except OpenAIHTTPException as error:
            # vLLM's words for a prompt that fills the whole context, whatever max_tokens was asked for.
            if error.message.startswith("max_tokens must be at least 1, got 0") and _asked_tokens(body) != 0:
                length = self._model_cards[await self._get_model_id(body.model)].metadata[_LENGTH]
                error.message = (
                    f"This model's maximum context length is {length} tokens. However, your prompt alone has "
                    f"{length} tokens, which leaves none for the answer. Please reduce the length of the prompt."
                )
            raise
        except _TimeIsUpError:
            return time_is_up(self._limits)
        except GenerationError:
            if not _asks_for_form(body):
                raise
            return error_response(_NO_FORM, 400, code="invalid_form")
        except _DEATH:
            logger.exception("a replica died under a request")
            return error_response(
                "The replica that had this request died; try again.",
                503,
                code="engine_unavailable",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        except TypeError:
            if _is_unicode(prompt_of(body)):
                raise
            return error_response("The prompt is not valid Unicode (a lone surrogate).", 400, code="invalid_value")


def _admitted(raw_request: Request | None) -> Admitted:
    """What the guard knows of a request."""
    return Admitted(None) if raw_request is None else raw_request.state.admitted


# What the engine does not find out before it makes a grammar of it, and then ends the request for.
_NO_FORM = (
    "The engine cannot make answers of the form that is asked for (response_format, structured_outputs): its pattern, "
    "grammar or schema is not valid, refers to itself without an end, or is too large."
)


def _asks_for_form(body: Any) -> bool:
    """Whether an answer is to have the form of a pattern, grammar or schema."""
    wanted = getattr(body, "response_format", None)
    return getattr(body, "structured_outputs", None) is not None or getattr(wanted, "type", "text") != "text"


def _sequences(body: Any) -> int:
    """How many answers a request asks for: one for each prompt, times `n`."""
    prompt = getattr(body, "prompt", None)
    many = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return many * (body.n or 1)


def _asked_tokens(body: Any) -> int | None:
    asked = getattr(body, "max_completion_tokens", None)
    return getattr(body, "max_tokens", None) if asked is None else asked


def _is_unicode(prompt: object) -> bool:
    try:
        str(prompt).encode()
    except UnicodeEncodeError:
        return False
    return True
