"""OpenAI ingress: Ray's, with OpenAI's error form for every kind of failure."""

import json
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, init
from ray.serve.llm.ingress import OpenAiIngress
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

logger = logging.getLogger("ray.serve")

# What this product serves of Ray's endpoints; embeddings, scores and audio need other models.
ENDPOINTS = {name: DEFAULT_ENDPOINTS[name] for name in ("completions", "chat", "tokenize", "detokenize")} | {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
}


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(message: str, status: int, **fields: str | None) -> JSONResponse:
    """The response that carries ``error_body``."""
    return JSONResponse(error_body(message, status, **fields), status_code=status)


def validation_response(error: RequestValidationError) -> JSONResponse:
    """What the request's body has wrong, first fault first, without echoing the body."""
    faults = error.errors()
    fault = faults[0] if faults else {"type": "", "msg": "invalid request", "loc": ()}
    if fault["type"] == "json_invalid":
        reason = fault.get("ctx", {}).get("error", "cannot be parsed")
        where = f" at character {fault['loc'][-1]}" if fault.get("loc") else ""
        return error_response(f"The request body is not valid JSON: {reason}{where}.", 400, code="invalid_json")
    param = ".".join(str(part) for part in fault["loc"] if part != "body") or None
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        message = "This field is required."
    return error_response(f"{param}: {message}" if param else message, 400, param=param, code="invalid_value")


def http_error_code(status: int, message: str) -> str | None:
    """OpenAI's machine-readable name of the failure, where it has one."""
    if status == 404 and "model" in message:
        return "model_not_found"
    if status == 400 and "maximum context length" in message:
        return "context_length_exceeded"
    return None


def build_fastapi() -> FastAPI:
    """Ray's FastAPI application (request ids, metrics, CORS) with our error handlers."""
    app = init()

    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_response(error)

    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404 and message == "Not Found":
            message = f"There is no {request.method} {request.url.path}."
        return error_response(message, error.status_code, code=http_error_code(error.status_code, message))

    async def on_openai_error(request: Request, error: OpenAIHTTPException) -> JSONResponse:
        return error_response(error.message, error.status_code, code=http_error_code(error.status_code, error.message))

    app.add_exception_handler(RequestValidationError, on_validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, on_http_error)  # type: ignore[arg-type]
    app.add_exception_handler(OpenAIHTTPException, on_openai_error)  # type: ignore[arg-type]
    return app


class Ingress(OpenAiIngress):
    """Ray's ingress, with OpenAI's own words for an unknown model and no traceback in any answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._created = int(time.time())

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
            "max_model_len": card.metadata.get("max_request_context_length"),
        }

    async def _get_model_id(self, model: str | None) -> str:
        if model is None and len(self._model_cards) == 1:
            return next(iter(self._model_cards))
        if model not in self._model_cards:
            served = ", ".join(sorted(self._model_cards))
            raise HTTPException(404, f"The model '{model}' does not exist; served here: {served}.")
        return model

    async def _get_response(self, **request: Any) -> AsyncGenerator[Any, None]:
        """Ray's stream of a replica's answer; a failure inside a stream becomes its last event."""
        started = False
        try:
            async for part in super()._get_response(**request):
                started = True
                yield part
        except Exception as error:
            if not started:
                raise
            logger.exception("the engine failed during a stream")
            body = error_body(f"The engine failed: {type(error).__name__}.", 500, code="engine_error")
            yield f"data: {json.dumps(body)}\n\n"

    async def _process_llm_request(self, *args: Any, **kwargs: Any) -> Response:
        """Ray's handling; what it does not foresee is logged here and told without its traceback."""
        try:
            return await super()._process_llm_request(*args, **kwargs)
        except (HTTPException, OpenAIHTTPException):
            raise
        except Exception:
            logger.exception("a request failed")
            return error_response("The server failed on this request; its log tells why.", 500, code="internal_error")
