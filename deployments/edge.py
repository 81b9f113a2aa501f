"""At the edge of Serve's HTTP proxy: what a connection may cost, and which headers go further.

uvicorn waits for ever for a head that never ends, however long it is, and for a client that never reads its answer;
Ray's proxy answers 500 to headers that are not UTF-8, and lets clients switch off its own limits.  Neither has a
setting for it.  `deployments.proxy` puts this in place in every proxy.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from deployments.errors import RETRY_AFTER_S, error_body
from deployments.fairness import WISH
from deployments.peers import Peers

HEAD_S = 20.0
"""Seconds from the connection, a request's first byte, or the rest of an answered one, to the end of a head."""
HEAD_BYTES = 64 << 10
"""Of a head, and of what comes beside a body: trailers, extensions of chunks."""
STALLED_S = 60.0
"""Seconds for which a client may read nothing of an answer that waits for it."""
MOST_CONNECTIONS = 4096
"""Open connections of one proxy."""

# Ray's own, for proxies of its own in front: a time limit, going on without the client, a model, a session.  And ours.
_INTERNAL = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve-multiplexed-model-id",
    b"x-session-id",
    WISH,
}
_REQUEST_ID = b"x-request-id"
_FIT_ID = re.compile(rb"[\w.:/+=-]{1,128}")


class Edge:
    """ASGI middleware: headers reach Ray's proxy only where they mean nothing to it, or are fit; WebSockets never."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "websocket":
            # Nothing here speaks it, and it would pass by keys, limits and the rules for headers.
            await send({"type": "websocket.close"})
            return
        if scope["type"] == "http":
            scope["headers"] = [(name, value) for name, value in scope["headers"] if _passes(name, value)]
        await self._app(scope, receive, send)


def _passes(name: bytes, value: bytes) -> bool:
    name = name.lower().replace(b"_", b"-")
    return name not in _INTERNAL and (name != _REQUEST_ID or _FIT_ID.fullmatch(value) is not None)


class _Patience(FlowControl):
    """uvicorn's flow control that gives up a client which does not read."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._given_up: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._given_up is None:
            self._given_up = asyncio.get_running_loop().call_later(STALLED_S, self._transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.settle()

    def settle(self) -> None:
        """It reads again, or is gone."""
        if self._given_up is not None:
            self._given_up.cancel()
            self._given_up = None


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a head that ends in time and in size, and a bound on connections."""

    _head: asyncio.TimerHandle | None = None
    _peers: Peers
    _entered = False
    _aside = 0
    """Bytes since the connection, a head or a part of a body."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        self.flow = _Patience(transport)
        self._entered = self._peers.enter(self.client and self.client[0])
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(503, "Too many connections.", "overloaded", f"retry-after: {RETRY_AFTER_S}\r\n")
        elif not self._entered:
            message = "Too many connections of your address."
            self._refuse(503, message, "overloaded", f"retry-after: {RETRY_AFTER_S}\r\n")
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client went."""
        self._head_ended()
        self._leave()
        if isinstance(self.flow, _Patience):
            self.flow.settle()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a head or of a body."""
        if self.transport.is_closing():
            return
        self._aside += len(data)
        super().data_received(data)
        if self._head is None and self.cycle is not None and self.cycle.response_complete:
            # The rest of a body that was answered already; uvicorn's keep-alive would wait for ever.
            self._await_head()
        if self._aside > HEAD_BYTES:
            self._too_large()

    def handle_websocket_upgrade(self) -> None:
        """From here on another protocol has the connection."""
        self._leave()
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP; uvicorn's own words are plain text."""
        self._refuse(400, "The request is not valid HTTP.", "invalid_http")

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        if self._head is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """A request's head is whole."""
        if self.transport.is_closing():
            return
        self._head_ended()
        self._aside = 0
        # What came in one piece was not counted on the way.
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            self._too_large()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        if self.transport.is_closing():
            return
        self._aside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        if self.transport.is_closing():
            return
        self._aside = 0
        super().on_message_complete()

    def _leave(self) -> None:
        if self._entered:
            self._entered = False
            self._peers.leave(self.client and self.client[0])

    def _await_head(self) -> None:
        if self.transport.is_closing():
            return
        self._head = self.loop.call_later(HEAD_S, self._late)

    def _head_ended(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_large(self) -> None:
        self._refuse(431, f"The request's headers are larger than {HEAD_BYTES:,} bytes.", "headers_too_large")

    def _late(self) -> None:
        if self.pipeline or not (self.cycle is None or self.cycle.response_complete):
            # Its turn comes after the answer that is under way.
            self._await_head()
            return
        self._refuse(408, f"The request's headers took longer than {HEAD_S:g} s to come.", "request_timeout")

    def _refuse(self, status: int, message: str, code: str, headers: str = "") -> None:
        self._head_ended()
        if self.transport.is_closing():
            return
        body = json.dumps(error_body(message, status, code=code)).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{headers}\r\n"
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not self.pipeline and not begun:  # otherwise it would be read as a part of another answer
            self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()


def bound_connections() -> None:
    """Serve with `BoundedProtocol` from now on, in this process."""
    BoundedProtocol._peers = Peers()
    module: Any = auto
    module.AutoHTTPProtocol = BoundedProtocol
