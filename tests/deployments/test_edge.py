"""Connections and headers at the edge: a real uvicorn with the proxy's protocol in front of a small application."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http import auto

from deployments import edge
from deployments.config import ConfigError
from deployments.local.forwarder import forward
from deployments.local.ports import listen
from deployments.peers import SETTING, Peers

LARGE = b"x" * (1 << 20)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """The request's headers, or more than anybody's buffers hold."""
    more = scope["path"] != "/early"
    while more:
        more = (await receive()).get("more_body", False)
    if scope["path"] == "/late":
        await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/long":
        for _ in range(64):
            await send({"type": "http.response.body", "body": LARGE, "more_body": True})
    lines = b"".join(name + b"=" + value + b"\n" for name, value in scope["headers"])
    await send({"type": "http.response.body", "body": lines})


@asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)  # put back afterwards
    edge.bound_connections()
    sock = listen("127.0.0.1", 0, "test", "nothing")
    server = uvicorn.Server(uvicorn.Config(edge.Edge(echo), log_config=None, lifespan="off", timeout_keep_alive=1))
    serve = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield sock.getsockname()[1], server
    finally:
        server.should_exit = server.force_exit = True
        await serve


async def said(port: int, *pieces: bytes) -> bytes:
    """The whole answer to what is sent, until the server ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), 20)
    except ConnectionError:
        return b"reset"
    finally:
        writer.close()


def get(*headers: bytes) -> bytes:
    return b"\r\n".join([b"GET / HTTP/1.1", b"Host: here", b"Connection: close", *headers]) + b"\r\n\r\n"


@pytest.mark.asyncio
async def test_headers_that_mean_something_to_ray_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as (port, _):
        hostile = (
            b"X-Request-ID: \xff",
            b"X-Request-Timeout-Seconds: 0.001",
            b"serve_multiplexed_model_id: \xff",
            b"Serve-Multiplexed-Model-Id: x",
            b"x-request-disconnect-disabled: ?1",
            b"x_session_id: \xff",
            b"X-Jenga-Turn: 1",
        )
        answer = await said(port, get(*hostile, b"X-Own: kept"))
        assert b" 200 " in answer
        assert b"x-own=kept" in answer
        assert not [word for word in (b"request", b"session", b"multiplexed", b"jenga") if word in answer.lower()]
        assert b"x-request-id=a-1_b" in await said(port, get(b"X-Request-ID: a-1_b"))
        assert b"x-request-id" not in await said(port, get(b"X-Request-ID: " + b"a" * 129))


@pytest.mark.asyncio
async def test_a_head_ends_in_time_and_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "HEAD_S", 0.3)
    async with serving(monkeypatch) as (port, server):
        assert b" 408 " in await said(port)
        assert b" 408 " in await said(port, b"GET / HTTP/1.1\r\nHost: ")
        # A second request on the same connection.
        first, second = (await said(port, get().replace(b"close", b"keep-alive"), b"GET / HT")).split(b"HTTP/1.1")[1:]
        assert first.startswith(b" 200 ")
        assert second.startswith(b" 408 ")
        for endless in (b"X: " + LARGE, b"X: y\r\n" * 100_000):
            assert b" 431 " in await said(port, b"GET / HTTP/1.1\r\n" + endless[:40_000], endless[40_000:80_000])
        # In one piece with its end, with and without a body behind it.
        for method in (b"GET", b"POST"):
            whole = get(b"X: " + b"a" * 100_000, b"Content-Length: 2").replace(b"GET", method)
            assert b" 431 " in await said(port, whole + b"{}")
        assert b" 200 " in await said(port, get(b"X: " + b"a" * 60_000))
        # What comes beside a body counts as well.
        chunked = get(b"Transfer-Encoding: chunked").replace(b"close", b"keep-alive")
        for endless in (b"0\r\nX: " + LARGE, b"1;" + LARGE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(chunked)
            await gone(lambda: not server.server_state.tasks)
            writer.write(endless[:80_000])
            assert b" 431 " in await asyncio.wait_for(reader.read(), 20)
            writer.close()
        assert b" 200 " in await said(port, get(b"Transfer-Encoding: chunked"), b"1;x\r\ny\r\n" * 50_000, b"0\r\n\r\n")
        # A head that waits for its turn is not late, and no refusal gets into another answer.
        first, second = (
            await said(port, get().replace(b"/ ", b"/late ", 1).replace(b"close", b"keep-alive"), b"GET")
        ).split(b"HTTP/1.1")[1:]
        assert first.startswith(b" 200 ")
        assert first.endswith(b"\r\n0\r\n\r\n")
        assert second.startswith(b" 408 ")
        assert not server.server_state.connections


@pytest.mark.asyncio
async def test_nobody_speaks_websocket_past_keys_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    wish = b"Upgrade: websocket", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13"
    async with serving(monkeypatch) as (port, _):
        answer = await said(port, get(*wish, b"X-Session-Id: \xff").replace(b"close", b"Upgrade"))
    assert b" 403 " in answer
    assert b"200" not in answer


@pytest.mark.asyncio
async def test_connections_are_bounded_and_refused_honestly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "MOST_CONNECTIONS", 3)
    async with serving(monkeypatch) as (port, _):
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        refused = await said(port)
        assert b" 503 " in refused
        assert b"retry-after: " in refused
        for _, writer in held:
            writer.close()
        while b" 503 " in (answer := await said(port, get())):
            await asyncio.sleep(0.05)
        assert b" 200 " in answer


@pytest.mark.asyncio
async def test_what_is_no_http_is_refused_in_the_form_of_all_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as (port, _):
        for noise in (
            b"\x16\x03\x01 hello\r\n\r\n",
            b"GET / HTTP/1.1\r\nA B: c\r\n\r\n",
            b"NONSENSE / HTTP/1.1\r\n\r\n",
        ):
            head, body = (await said(port, noise)).split(b"\r\n\r\n")
            assert b" 400 " in head
            assert json.loads(body)["error"]["code"] == "invalid_http"


@pytest.mark.asyncio
async def test_one_address_leaves_connections_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "2")
    monkeypatch.setattr(Peers, "_bounded", lambda self, host: host)  # there is only the loopback here
    async with serving(monkeypatch) as (port, server):
        outer = await forward(listen("127.0.0.1", 0, "test", "nothing"), port)
        for door, refusal in ((port, b" 503 "), (outer.sockets[0].getsockname()[1], b"")):
            held = [await asyncio.open_connection("127.0.0.1", door) for _ in range(2)]
            await gone(lambda: len(server.server_state.connections) < 2)
            refused = await said(door)
            assert refusal in refused
            assert bool(refusal) == bool(refused)
            for _, writer in held:
                writer.close()
            await gone(lambda: server.server_state.connections)
            assert b" 200 " in await said(door, get()), "those that are over are not counted"
        wish = get(b"Upgrade: websocket", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13")
        for _ in range(3):
            assert b" 403 " in await said(port, wish.replace(b"close", b"Upgrade"))
        outer.close()


def test_addresses_are_counted_where_one_host_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "1")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.9.0.0/16")
    peers = Peers()
    assert [peers.enter(host) for host in ("10.0.0.1", "10.0.0.1", "10.0.0.2")] == [True, False, True]
    assert [peers.enter(host) for host in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")] == [True, False, True]
    assert not peers.enter("::ffff:10.0.0.1")
    for free in ("127.0.0.1", "::1", "10.9.1.1", None, ""):
        assert [peers.enter(free) for _ in range(3)] == [True] * 3
    peers.leave("10.0.0.1")
    assert peers.enter("10.0.0.1")
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv(SETTING, wrong)
        with pytest.raises(ConfigError, match=SETTING):
            Peers()


@pytest.mark.asyncio
async def test_the_rest_of_a_body_that_nobody_waits_for_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "HEAD_S", 0.3)
    head = get(b"Content-Length: 3").replace(b" / ", b" /early ").replace(b"close", b"keep-alive")
    async with serving(monkeypatch) as (port, server):
        for rest in (b"x", b"xyz", b"xyzGET"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            assert b" 200 " in await reader.readuntil(b"\r\n0\r\n\r\n")
            writer.write(rest)
            assert b" 408 " in await asyncio.wait_for(reader.read(), 20)
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.write(b"xyz" + get())
        assert b" 200 " in await asyncio.wait_for(reader.read(), 20), "and then the next request"
        writer.close()
        assert not server.server_state.connections


async def gone(what: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while what():
            await asyncio.sleep(0.05)


@pytest.mark.asyncio
async def test_who_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "STALLED_S", 0.3)
    async with serving(monkeypatch) as (port, server):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(get().replace(b" / ", b" /long "))
        await gone(lambda: not server.server_state.tasks)
        await gone(lambda: server.server_state.connections)
        writer.close()


@pytest.mark.asyncio
async def test_the_forwarder_holds_no_half_of_a_connection_that_the_server_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edge, "HEAD_S", 0.2)
    monkeypatch.setattr("deployments.local.forwarder.STALLED_S", 0.3)
    async with serving(monkeypatch) as (port, server):
        outer = await forward(listen("127.0.0.1", 0, "test", "nothing"), port)
        door = outer.sockets[0].getsockname()[1]
        before = len(asyncio.all_tasks())
        reader, writer = await asyncio.open_connection("127.0.0.1", door)
        assert b" 408 " in await reader.read(), "and the client keeps its half"
        await gone(lambda: len(asyncio.all_tasks()) > before)
        _, stalled = await asyncio.open_connection("127.0.0.1", door, limit=1024)
        stalled.write(get().replace(b" / ", b" /long "))
        await gone(lambda: not server.server_state.tasks)
        await gone(lambda: server.server_state.tasks)
        for each in (writer, stalled):
            each.close()
        outer.close()
