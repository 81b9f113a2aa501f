"""Errors in OpenAI's form, as every refusal of the REST interface has it."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


def error_body(
    message: str, status: int, *, kind: str | None = None, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients expect it; `kind` is its ``type``, by default whose fault `status` says it is."""
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    message: str, status: int, *, headers: Mapping[str, str] | None = None, **fields: str | None
) -> JSONResponse:
    """The response that carries ``error_body``."""
    return JSONResponse(error_body(message, status, **fields), status_code=status, headers=headers)


RETRY_AFTER_S = 2
"""Seconds after which a client should come back."""
SECOND_TRY_S = 1.5
"""Seconds after which what a dead process left unanswered goes to another one: by then Ray knows which is dead.

Once only, for it may be the request that kills.
"""


def overloaded(why: str) -> JSONResponse:
    """The honest refusal of what cannot be taken just now; OpenAI's clients come back by themselves."""
    return error_response(
        f"The server is busy: {why}. Try again in {RETRY_AFTER_S} s.",
        503,
        code="overloaded",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )
