"""In front of Serve's HTTP proxy: a request whose ingress died goes to another one, a stream that broke off says so.

Ray's proxy would answer 500 to the first, end the second without a word, and answer 404 to all while an application
starts.  Whoever starts a Ray node says `ENVIRONMENT` there: the proxy calls `middlewares`.
"""

from __future__ import annotations

import asyncio
import json
import logging

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.edge import Edge, bound_connections
from deployments.errors import RETRY_AFTER_S, SECOND_TRY_S, error_body, error_response
from deployments.fairness import InTurn

logger = logging.getLogger("ray.serve")

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.proxy:middlewares"}
"""Variables of a Ray node whose proxy is to have this."""

_KEPT_BYTES = 16 << 20
"""Larger bodies are not sent twice."""


def middlewares() -> list[Middleware]:
    """What Serve's proxy puts around itself."""
    bound_connections()
    # The last is the outermost.
    return [Middleware(SecondTry), Middleware(InTurn), Middleware(Edge)]


class SecondTry:
    """ASGI middleware: what ends without an answer is asked once more; every request here may be made twice."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        await self._ask(scope, exchange)
        if exchange.may_go_again:
            logger.warning("an ingress died under a request, which goes to another one")
            await asyncio.sleep(SECOND_TRY_S)
            exchange.rewind()
            await self._ask(scope, exchange)
        await exchange.close(scope)

    async def _ask(self, scope: Scope, exchange: _Exchange) -> None:
        await self._app(_copy(scope), exchange.receive, exchange.send)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # Ray's proxy takes the cancellation for a client that left, and returns as if all were well.
            raise asyncio.CancelledError


def _copy(scope: Scope) -> Scope:
    # The proxy writes the route into it.
    return {**scope, "headers": list(scope["headers"])}


class _Exchange:
    """One client's request and how much of its answer has been sent."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._kept: list[Message] = []
        self._size = 0
        self._again: list[Message] = []
        self._gone = self._started = self._ended = self._events = self._unserved = False
        self._tail = b"\n\n"

    @property
    def may_go_again(self) -> bool:
        """Whether there is no answer, somebody waits for one, and the whole request is still known."""
        return not (self._started or self._gone or self._unserved) and self._size <= _KEPT_BYTES

    def rewind(self) -> None:
        """Read the request from its beginning again."""
        self._again = list(self._kept)

    async def receive(self) -> Message:
        """ASGI's `receive`."""
        if self._again:
            return self._again.pop(0)
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone = True
        elif not self._started:
            self._size += len(message.get("body", b""))
            if self._size <= _KEPT_BYTES:
                self._kept.append(message)
            else:
                self._kept.clear()
        return message

    async def send(self, message: Message) -> None:
        """ASGI's `send`."""
        if self._unserved:
            return
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            # The proxy's own words where there is no application; the ingress has JSON for paths that it does not know.
            self._unserved = message["status"] == 404 and kind.startswith(b"text/plain")
            if self._unserved:
                return
            self._started = True
            self._kept.clear()
            self._events = kind.startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self._tail = (self._tail + message.get("body", b""))[-2:]
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def close(self, scope: Scope) -> None:
        """Say what happened where the answer did not come to its end."""
        if self._gone or self._ended:
            return
        if not self._started:
            why = "Nothing is served here just now" if self._unserved else "The server that had this request died"
            response = error_response(
                f"{why}; try again.",
                503,
                code="server_unavailable",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
            await response(scope, self._receive, self._send)
        elif self._events:
            told = error_body("The server that made this answer died.", 500, code="server_unavailable")
            gap = b"" if self._tail == b"\n\n" else b"\n\n"
            last = gap + f"data: {json.dumps(told)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
