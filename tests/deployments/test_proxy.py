"""What stands in front of Serve's proxy: second tries, and streams that broke off."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages
from starlette.types import Message, Receive, Scope, Send

from deployments import proxy
from deployments.errors import RETRY_AFTER_S
from deployments.proxy import SecondTry

Behaviour = Callable[[Receive, Send], Awaitable[None]]
BODY = b'{"model": "m"}'


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "SECOND_TRY_S", 0.0)


async def dies(receive: Receive, send: Send) -> None:
    """An ingress that reads the request and is killed."""
    await receive()


async def answers(receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b"got " + body})


def breaks_off(*parts: bytes) -> Behaviour:
    async def stream(receive: Receive, send: Send) -> None:
        await receive()
        kind = b"text/event-stream; charset=utf-8"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})

    return stream


def exchange(*behaviours: Behaviour, body: bytes = BODY, client_leaves: bool = False) -> tuple[list[Message], int]:
    """What the client got, and how often the application behind was asked."""
    left = list(behaviours)
    scopes: list[Scope] = []

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        assert scope["path"] == "/v1/completions", "what the proxy does to one scope is not in the other"
        scope["path"] = "/changed"
        await left.pop(0)(receive, send)

    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    if client_leaves:
        incoming = [{"type": "http.disconnect"}]
    got: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        got.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(SecondTry(behind)(scope, receive, send))
    return got, len(scopes)


def told(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(message["body"].decode().removeprefix("data: "))["error"]
    return found


def test_a_request_whose_ingress_died_goes_whole_to_the_next_one() -> None:
    got, asked = exchange(dies, answers)
    assert asked == 2
    assert [message["type"] for message in got] == ["http.response.start", "http.response.body"]
    assert got[1]["body"] == b"got " + BODY


def test_two_dead_in_a_row_are_an_honest_503() -> None:
    got, asked = exchange(dies, dies)
    assert asked == 2
    assert got[0]["status"] == 503
    assert dict(got[0]["headers"])[b"retry-after"] == str(RETRY_AFTER_S).encode()
    assert told(got[1])["code"] == "server_unavailable"


def test_without_an_application_the_answer_is_503_and_not_404() -> None:
    async def unknown(receive: Receive, send: Send) -> None:
        """As Ray's proxy answers while an application starts."""
        for message in convert_object_to_asgi_messages("Path '/v1/completions' not found.", status_code=404):
            await send(message)

    got, asked = exchange(unknown)
    assert (asked, got[0]["status"]) == (1, 503)
    assert dict(got[0]["headers"])[b"retry-after"] == str(RETRY_AFTER_S).encode()
    assert told(got[1])["code"] == "server_unavailable"


def test_a_proxy_that_is_told_to_stop_asks_nobody_again() -> None:
    asked = 0

    async def swallows(scope: Scope, receive: Receive, send: Send) -> None:
        """As Ray's proxy does."""
        nonlocal asked
        asked += 1
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async def cancelled() -> None:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": BODY}

        async def send(message: Message) -> None:
            sent.append(message)

        task = asyncio.create_task(SecondTry(swallows)({"type": "http", "headers": []}, receive, send))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sent == []

    asyncio.run(cancelled())
    assert asked == 1


def test_nobody_asks_again_for_a_client_that_left() -> None:
    assert exchange(dies, client_leaves=True) == ([], 1)


def test_a_body_beyond_the_bound_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_KEPT_BYTES", len(BODY) - 1)
    got, asked = exchange(dies)
    assert (asked, got[0]["status"]) == (1, 503)


@pytest.mark.parametrize("parts", [(b"data: {}\n\n",), (b'data: {"half": ',), ()])
def test_a_stream_that_breaks_off_ends_with_an_error_event(parts: tuple[bytes, ...]) -> None:
    got, asked = exchange(breaks_off(*parts))
    assert asked == 1, "what has begun is not begun again"
    text = b"".join(message.get("body", b"") for message in got).decode()
    *_, last, nothing = text.split("\n\n")
    assert nothing == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_unavailable"
    assert not got[-1]["more_body"]


def test_a_whole_answer_passes_untouched() -> None:
    got, asked = exchange(answers)
    assert (asked, len(got), got[1]["body"]) == (1, 2, b"got " + BODY)
