"""Fair turns between clients at the ingress: `InTurn` grants them in each proxy, `TellsTurns` says when one is over.

The ingress takes what comes first, so a thousand requests of one client, or a few large ones, would make everybody
wait. Therefore the proxy lets in a few at a time. A request's turn lasts until its answer begins or an engine has it.
Clients are told apart by the tenant of their key, which the ingress tells, and where there are no keys by address.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import overloaded
from deployments.guard import OPEN
from deployments.peers import origin
from deployments.turns import Turn, Turns

WISH = b"x-jenga-turn"
"""Header by which a proxy asks the ingress to tell the end of a turn."""
TOLD = "jenga.turn"
"""What the ingress tells: a key of an answer's first message, or a message of its own before that."""
AT_ONCE = 4
"""Turns at the same time for each ingress: enough to keep it busy, few enough to wait behind."""

_LARGE_BYTES = 1 << 16
"""Bodies of this size and more take large turns."""
_LEASE_S = 2.0
"""A turn is over by then, whatever the ingress does."""
_CLIENT_S = 0.1
"""A turn is over when the client takes longer for a part of its body; for the last one it needs another turn."""
_WAIT_S = 60.0
"""Whoever waits longer for a turn is refused."""
_LATE_S = 2.0
"""The end of a slow body waits no longer for its turn, since the time that its client has for it goes on."""
_KNOWN = 4096
"""Keys whose tenant a proxy remembers."""


class InTurn:
    """ASGI middleware of the proxy: a request waits for its turn."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turns = Turns(AT_ONCE)
        self._tenants: OrderedDict[bytes, str] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on when it is its turn."""
        if scope["type"] != "http" or scope["path"].startswith("/-/") or scope["path"].endswith(OPEN):
            # Ray's own paths, which the proxy answers, and what load balancers ask, which cost next to nothing.
            await self._app(scope, receive, send)
            return
        key = Headers(scope=scope).get("authorization", "").encode("latin-1")
        name = hashlib.blake2b(key, digest_size=16).digest()
        tenant = self._tenants.get(name)
        if tenant is not None:
            client = f"tenant {tenant}"
        elif self._tenants:
            # Whoever has no known key stands in one line: addresses may be as many as one likes.
            client = "stranger"
        else:
            client = f"address {origin((scope.get('client') or ('',))[0])}"
        scope["headers"] = [*scope["headers"], (WISH, b"1")]

        async def learn_and_send(message: Message) -> None:
            told = message.pop(TOLD, None)
            if told is not None:
                self._learn(name, told)
            if message["type"] != TOLD:
                await send(message)

        visit = _Visit(self._turns, client, receive, learn_and_send)
        try:
            if await visit.may_go_in():
                await self._app(scope, visit.receive, visit.send)
            elif not visit.left:
                await overloaded(f"this request's turn did not come within {_WAIT_S:g} s")(scope, receive, send)
        finally:
            visit.end()

    def _learn(self, name: bytes, told: dict[str, Any]) -> None:
        self._turns.at_once = told["at_once"]
        if told["tenant"] is not None:
            self._tenants[name] = told["tenant"]
            self._tenants.move_to_end(name)
            if len(self._tenants) > _KNOWN:
                self._tenants.popitem(last=False)


class _Visit:
    """One request: what has come of its body, and its turn."""

    def __init__(self, turns: Turns, client: str, receive: Receive, send: Send) -> None:
        self._turns, self._client = turns, client
        self._receive, self._send = receive, send
        self._come: list[Message] = []
        self._reading: asyncio.Future[Message] | None = None
        self._size = 0
        self._whole = self._answered = False
        self._turn: Turn | None = None
        self._lease: asyncio.TimerHandle | None = None

    async def may_go_in(self) -> bool:
        """Read a small body, or what comes of a larger one at once, and wait for a turn.

        False: the client `left`, or the turn did not come.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLIENT_S):
                while not self._whole and self._size < _LARGE_BYTES:
                    await self._read()
        return not self.left and await self._wait_for_turn(_WAIT_S)

    async def receive(self) -> Message:
        """ASGI's `receive`: the last part of a body is handed over in a turn."""
        if self._come:
            return self._come.pop(0)
        if self._whole:
            return await self._next()
        slow = asyncio.get_running_loop().call_later(_CLIENT_S, self.end_turn)
        try:
            await self._read()
        finally:
            slow.cancel()
        if self._whole and not self._answered and not self.left and (self._turn is None or self._turn.ended):
            await self._wait_for_turn(_LATE_S)
        return self._come.pop(0)

    async def send(self, message: Message) -> None:
        """ASGI's `send`: an answer, or the word that an engine has the request, ends the turn."""
        if message["type"] in ("http.response.start", TOLD):
            self._answered = True
            self.end_turn()
        await self._send(message)

    def end_turn(self) -> None:
        """The ingress has done what it does for this request, or somebody else's turn has come."""
        if self._lease is not None:
            self._lease.cancel()
        if self._turn is not None:
            self._turns.end(self._turn)

    def end(self) -> None:
        """The request is over."""
        self.end_turn()
        if self._reading is not None:
            self._reading.cancel()

    def _begin_to_read(self) -> asyncio.Future[Message]:
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._receive())
        return self._reading

    async def _next(self) -> Message:
        """The client's next message; who gives up waiting for it leaves it to the next one."""
        message = await asyncio.shield(self._begin_to_read())
        self._reading = None
        return message

    async def _read(self) -> None:
        """Read one message."""
        message = await self._next()
        self._come.append(message)
        self._size += len(message.get("body", b""))
        self._whole = _is_end(message) or not message.get("more_body", False)

    @property
    def left(self) -> bool:
        """Whether the client is known to have left."""
        reading = self._reading
        ahead = [] if reading is None or not reading.done() or reading.cancelled() else [reading.result()]
        return any(map(_is_end, [*self._come, *ahead]))

    async def _wait_for_turn(self, most_s: float) -> bool:
        """Whether a turn came within `most_s` seconds, and its client was still there."""
        turn = self._turn = self._turns.queue(self._client, large=self._size >= _LARGE_BYTES)
        try:
            async with asyncio.timeout(most_s):
                # A client that leaves is out of the line; one that goes on sending waits for its turn.
                await asyncio.wait({turn.granted, self._begin_to_read()}, return_when=asyncio.FIRST_COMPLETED)
                if not self.left:
                    await asyncio.shield(turn.granted)
        except TimeoutError:
            pass
        except BaseException:
            self._turns.end(turn)
            raise
        if turn.granted.done() and not self.left:
            self._lease = asyncio.get_running_loop().call_later(_LEASE_S, self.end_turn)
            return True
        self._turns.end(turn)
        return False


def _is_end(message: Message) -> bool:
    return bool(message["type"] == "http.disconnect")


class TellsTurns:
    """Outermost ASGI middleware of the ingress: says whose request it was, and when the ingress is done with it."""

    def __init__(self, app: ASGIApp, *, at_once: int) -> None:
        """`at_once`: turns that a proxy should grant at the same time."""
        self._app = app
        self._at_once = at_once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or WISH not in dict(scope["headers"]):
            # No `InTurn` in front, which alone understands what would be told.
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        told = False

        def news() -> dict[str, Any]:
            admitted = state.get("admitted")
            key = admitted and admitted.key
            return {"tenant": key and key.tenant, "at_once": self._at_once}

        async def tell() -> None:
            nonlocal told
            if not told:
                told = True
                await send({"type": TOLD, TOLD: news()})

        async def send_and_tell(message: Message) -> None:
            nonlocal told
            if not told and message["type"] == "http.response.start":
                told = True
                message = {**message, TOLD: news()}
            await send(message)

        state["end_turn"] = tell
        await self._app(scope, receive, send_and_tell)
