"""What every request passes before anything is made of it: its key, its key's limits, its size and form, its time."""

from __future__ import annotations

import asyncio
import base64
import math
from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import bodies
from deployments.config import Auth, Limits
from deployments.errors import error_response, overloaded
from deployments.keyring import Key, KeyRing, LiveKeys
from deployments.order import Order
from deployments.quota import Quotas

OPEN = ("/health",)
"""Paths that need no key."""
_MEMORY = "/memory"
_TENANTS_PART = 0.75
"""Of `limits.requests` and `limits.bodies`: what one tenant may have in progress, so that others find a place."""


@dataclass(frozen=True)
class Admitted:
    """What the guard knows of a request that it let in; `request.state.admitted`."""

    deadline: float | None
    """Time of the event loop at which the request ends, one way or another; None: never."""
    key: Key | None = None
    ring: KeyRing | None = None

    def cache_salt(self, own: str | None) -> str | None:
        """The request's cache salt: with keys the tenant's, and the client's `own` within it."""
        return own if self.key is None or self.ring is None else self.ring.cache_salt(self.key, own)


class Guard:
    """ASGI middleware; with `auth` every path but those in `OPEN` needs a key."""

    def __init__(self, app: ASGIApp, *, auth: Auth | None, limits: Limits, context: int | None = None) -> None:
        """`context`: tokens that the model can have, if that is known.

        Raises KeyFileError where the keys cannot be read: the ingress does not start without them."""
        self._app = app
        self._limits = limits
        self._context = context
        self._keys = None if auth is None else LiveKeys(auth.keys_file, auth.keys_variable)
        self._quotas = Quotas()
        self._order = Order()
        self._running: Counter[str | None] = Counter()
        self._held: Counter[str | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self._limits.request_s
        admitted, path = Admitted(deadline), get_route_path(scope)
        if self._keys is not None and path not in OPEN:
            ring = self._keys.ring
            key = _key(ring, scope, path)
            if isinstance(key, Response):
                await key(scope, receive, send)
                return
            admitted = Admitted(deadline, key, ring)
        scope.setdefault("state", {})["admitted"] = admitted
        if scope["method"] != "POST" or path in OPEN:
            # Of no other method, and of nobody without a key where there are keys, is a body read.
            await self._run(scope, receive, send, counted=path not in OPEN)
            return
        if admitted.key is not None and (excess := self._quotas.enter(admitted.key)) is not None:
            refused = error_response(
                f"Key '{admitted.key.name}' may make {excess.limit}; try again in {excess.retry_after_s} s.",
                429,
                kind="requests",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(excess.retry_after_s)},
            )
            await refused(scope, receive, send)
            return
        try:
            await self._read_and_run(scope, receive, send)
        finally:
            if admitted.key is not None:
                self._quotas.leave(admitted.key)

    async def _read_and_run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, and answer it if it is fit for that."""
        parts: list[bytes] = []
        try:
            refused = await self._read(scope, receive, parts)
            if refused is None and (found := bodies.fault(body := b"".join(parts), self._limits, self._context)):
                refused = error_response(found.message, 400, code=found.code, param=found.param)
            if refused is None:
                await self._run(scope, _replay(body, receive), send)
            else:
                await refused(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._held[_tenant(scope)] -= sum(map(len, parts))
            self._held += Counter()  # forgets tenants without requests

    async def _run(self, scope: Scope, receive: Receive, send: Send, *, counted: bool = True) -> None:
        """Hand a whole request on, unless there are too many."""
        if not counted:
            await self._app(scope, receive, send)
            return
        tenant, most = _tenant(scope), self._limits.requests
        if self._running.total() >= most:
            refused = overloaded(f"{most} requests are in progress (limits.requests)")
        elif tenant is not None and self._running[tenant] >= math.ceil(most * _TENANTS_PART):
            refused = overloaded(f"{self._running[tenant]} requests of your tenant are in progress (limits.requests)")
        else:
            if tenant is not None:
                scope["state"]["priority"] = self._order.next(tenant, self._running[tenant])
            self._running[tenant] += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._running[tenant] -= 1
                self._running += Counter()
                if tenant is not None and tenant not in self._running:
                    self._order.forget(tenant)
            return
        await refused(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, parts: list[bytes]) -> Response | None:
        """Read the whole body into `parts`; the refusal of one that is too large, too slow or one too many.

        Raises ClientDisconnect where the client went.
        """
        most, size, tenant = int(self._limits.body), 0, _tenant(scope)
        tenants_most = max(most, self._limits.bodies * _TENANTS_PART)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > most:
            return _too_large(most)
        try:
            async with asyncio.timeout(min(self._limits.body_s, self._limits.request_s)):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self._held[tenant] += len(parts[-1])
                    if size > most:
                        return _too_large(most)
                    if self._held.total() > self._limits.bodies:
                        return overloaded(f"requests of {self._limits.bodies:,} bytes are in progress (limits.bodies)")
                    if tenant is not None and self._held[tenant] > tenants_most:
                        return overloaded(
                            f"requests of your tenant of {tenants_most:,.0f} bytes are in progress (limits.bodies)"
                        )
                    if not message.get("more_body", False):
                        return None
        except TimeoutError:
            return body_is_late(self._limits)


def _tenant(scope: Scope) -> str | None:
    key = scope["state"]["admitted"].key
    return key and key.tenant


def _replay(body: bytes, receive: Receive) -> Receive:
    """What reads `body` once, and then whatever else the client sends."""
    kept = [body]

    async def again() -> Message:
        return {"type": "http.request", "body": kept.pop(), "more_body": False} if kept else await receive()

    return again


def _key(ring: KeyRing, scope: MutableMapping[str, Any], path: str) -> Key | Response:
    """The key of a request, or its refusal; the key itself goes no further than here."""
    memory = path == _MEMORY or path.startswith(f"{_MEMORY}/")
    presented = _presented(Headers(scope=scope).get("authorization", ""), basic=memory)
    scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() != b"authorization"]
    # A browser asks its user for a key only if Basic is offered.
    challenge = {"WWW-Authenticate": 'Basic realm="password: an API key made with --admin"' if memory else "Bearer"}
    if presented is None:
        return error_response(
            "You did not provide an API key. Send one in the header: Authorization: Bearer YOUR_KEY.",
            401,
            code="missing_api_key",
            headers=challenge,
        )
    key = ring.find(presented)
    if key is None:
        return error_response("Incorrect API key provided.", 401, code="invalid_api_key", headers=challenge)
    if memory and not key.admin:
        return error_response(
            f"Key '{key.name}' may not see {_MEMORY}; `jenga keys add --admin` makes one that may.",
            403,
            code="admin_key_required",
        )
    return key


def _presented(header: str, *, basic: bool) -> str | None:
    """The key in an ``Authorization`` header: a bearer token, with `basic` also a password."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip() or None
    if basic and scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
        except ValueError:
            return None
    return None


def _too_large(most: int) -> Response:
    return error_response(
        f"The request body is larger than {most:,} bytes, which is the most that is taken here (limits.body).",
        413,
        code="request_too_large",
        headers={"Connection": "close"},
    )


TIME_IS_UP = "The request took longer than {seconds:g} s, which is the most that is allowed here (limits.request_s)."


def time_is_up(limits: Limits) -> Response:
    """The answer to a request that took too long; OpenAI's clients do not try it again by themselves."""
    return error_response(
        TIME_IS_UP.format(seconds=limits.request_s),
        408,
        code="request_timeout",
        headers={"x-should-retry": "false"},
    )


def body_is_late(limits: Limits) -> Response:
    """The answer to a request whose body did not come to its end."""
    return error_response(
        f"The request's body took longer than {min(limits.body_s, limits.request_s):g} s to come (limits.body_s).",
        408,
        code="request_timeout",
        headers={"x-should-retry": "false", "Connection": "close"},
    )
