"""Turns between proxy and ingress: what passes when, for whom, and what ends a turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from deployments import fairness
from deployments.fairness import TOLD, InTurn, TellsTurns

Answer = Callable[[Scope, Receive, Send], Awaitable[None]]
HEAD: Message = {"type": "http.response.start", "status": 200, "headers": []}
END: Message = {"type": "http.response.body", "body": b""}


class Ingress:
    """One that reads the body, tells that an engine has the request if asked to, and answers when told."""

    def __init__(self, at_once: int = 1) -> None:
        self.app = InTurn(TellsTurns(self.answer, at_once=at_once))
        self.inside: list[str] = []
        self.bodies: list[bytes] = []
        self.go_on = asyncio.Event()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        tenant = headers.get(b"authorization", b"").decode()
        if tenant:
            scope["state"]["admitted"] = SimpleNamespace(key=SimpleNamespace(tenant=tenant))
        self.inside.append(scope["path"])
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        if b"x-engine" in headers:
            await scope["state"]["end_turn"]()
            await scope["state"]["end_turn"]()
        if scope["path"] != "/quick":
            await self.go_on.wait()
        await send(dict(HEAD))
        await send(dict(END))

    def ask(self, path: str, key: str = "", content: Any = b"", peer: str = "10.0.0.1", **headers: str) -> Any:
        """A request under way."""
        transport = httpx.ASGITransport(self.app, client=(peer, 1))
        named = {name.replace("_", "-"): value for name, value in headers.items()}

        async def asked() -> httpx.Response:
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                return await http.post(path, content=content, headers={"Authorization": key} | named)

        return asyncio.create_task(asked())

    async def holds(self, *paths: str) -> None:
        async with asyncio.timeout(20):
            while self.inside != list(paths):
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        assert self.inside == list(paths)


@pytest.mark.asyncio
async def test_another_tenant_passes_a_flood_and_the_ingress_tells_who_is_who() -> None:
    ingress = Ingress()
    for key in ("evil", "good"):
        assert (await ingress.ask("/quick", key)).status_code == 200
    ingress.inside.clear()
    flood = [ingress.ask(f"/{n}", "evil") for n in range(5)]
    await ingress.holds("/0")
    good = ingress.ask("/good", "good")
    await ingress.holds("/0")
    ingress.go_on.set()
    assert {answer.status_code for answer in await asyncio.gather(*flood, good)} == {200}
    assert ingress.inside.index("/good") == 1


@pytest.mark.asyncio
async def test_without_keys_addresses_are_told_apart() -> None:
    ingress = Ingress()
    await ingress.ask("/quick")
    ingress.inside.clear()
    flood = [ingress.ask(f"/{n}", f"made up {n}", peer="10.6.6.6") for n in range(5)]
    await ingress.holds("/0")
    good = ingress.ask("/good")
    await ingress.holds("/0")
    ingress.go_on.set()
    await asyncio.gather(*flood, good)
    assert ingress.inside.index("/good") == 1, "what nobody has vouched for counts as its address"


@pytest.mark.asyncio
async def test_with_keys_all_who_have_none_stand_in_one_line() -> None:
    ingress = Ingress()
    await ingress.ask("/quick", "good")
    ingress.inside.clear()
    flood = [ingress.ask(f"/{n}", peer=f"10.0.0.{n}") for n in range(5)]
    await ingress.holds("/0")
    good = ingress.ask("/good", "good", peer="10.0.0.1")
    await ingress.holds("/0")
    ingress.go_on.set()
    await asyncio.gather(*flood, good)
    assert ingress.inside.index("/good") == 1


@pytest.mark.asyncio
async def test_a_turn_ends_when_an_engine_has_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    ingress = Ingress()
    await ingress.ask("/quick")
    ingress.inside.clear()
    first, second = ingress.ask("/first", x_engine="1"), ingress.ask("/second")
    await ingress.holds("/first", "/second")
    third = ingress.ask("/third")
    await ingress.holds("/first", "/second")
    monkeypatch.setattr(fairness, "_LEASE_S", 0.05)
    second.cancel()
    await ingress.holds("/first", "/second", "/third")
    fourth = ingress.ask("/fourth")
    await ingress.holds("/first", "/second", "/third", "/fourth")
    ingress.go_on.set()
    assert [(await each).content for each in (first, third, fourth)] == [b""] * 3, "and clients see nothing of it"


@pytest.mark.asyncio
async def test_a_body_that_comes_slowly_holds_no_turn_and_needs_one_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "_CLIENT_S", 0.05)
    ingress = Ingress()
    await ingress.ask("/quick")
    ingress.inside.clear()
    ingress.bodies.clear()
    rest = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"slow "
        await rest.wait()
        yield b"body"

    begun = ingress.ask("/quick", content=slow())
    await ingress.holds("/quick")
    other = ingress.ask("/other")
    await ingress.holds("/quick", "/other")
    assert ingress.bodies == [b""], "the other one's turn came"
    rest.set()
    await asyncio.sleep(0.1)
    assert ingress.bodies == [b""], "and the end of the first waits for it"
    ingress.go_on.set()
    await asyncio.gather(begun, other)
    assert ingress.bodies == [b"", b"slow body"]


@pytest.mark.asyncio
async def test_large_bodies_wait_for_each_other_and_arrive_whole() -> None:
    ingress = Ingress(at_once=3)
    await ingress.ask("/quick")
    ingress.inside.clear()
    ingress.bodies.clear()

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * 30_000

    large = [ingress.ask("/large", content=parts()) for _ in range(2)]
    await ingress.holds("/large")
    small = ingress.ask("/small", content=b"y")
    await ingress.holds("/large", "/small")
    ingress.go_on.set()
    await asyncio.gather(*large, small)
    assert sorted(map(len, ingress.bodies)) == [1, 150_000, 150_000]


class Client:
    """One that does what it is told, request by request."""

    def __init__(self, app: InTurn, path: str, peer: str = "10.0.0.9") -> None:
        self.says: asyncio.Queue[Message] = asyncio.Queue()
        self.got: list[Message] = []
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "client": (peer, 1)}
        self.task = asyncio.create_task(app(scope, self.says.get, self._take))

    async def _take(self, message: Message) -> None:
        self.got.append(message)

    def say(self, body: bytes, *, more: bool = False) -> None:
        self.says.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self) -> None:
        self.says.put_nowait({"type": "http.disconnect"})


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [1, 70_000])
async def test_who_leaves_while_waiting_is_out_of_the_line_at_once(size: int) -> None:
    ingress = Ingress()
    await ingress.ask("/quick")
    ingress.inside.clear()
    first = ingress.ask("/first")
    await ingress.holds("/first")
    gone = Client(ingress.app, "/gone")
    gone.say(b"x" * size, more=size > 1)
    await ingress.holds("/first")
    gone.leave()
    await asyncio.wait_for(gone.task, 5)
    assert not gone.got
    assert list(ingress.app._turns._lines) == ["address 10.0.0.1"], "nothing of it is left"
    ingress.go_on.set()
    await first
    assert ingress.inside == ["/first"]


@pytest.mark.asyncio
async def test_a_cancelled_wait_takes_nobody_elses_turn() -> None:
    """Ray's proxy cancels its reading when an ingress dies, and this may be the end of a slow body, in line again."""
    app = InTurn(lambda scope, receive, send: hold.wait())  # type: ignore[arg-type, return-value]
    hold = asyncio.Event()
    app._turns.at_once = 1
    busy = Client(app, "/busy", "10.0.0.1")
    busy.say(b"")
    await asyncio.sleep(0.02)
    waiting = [Client(app, f"/{n}") for n in range(3)]
    for each in waiting:
        each.say(b"")
    await asyncio.sleep(0.02)
    waiting[1].task.cancel()
    await asyncio.wait({waiting[1].task})
    hold.set()
    await asyncio.gather(busy.task, waiting[0].task, waiting[2].task)
    assert (app._turns._running, app._turns._lines) == (0, {})


@pytest.mark.asyncio
async def test_who_waits_too_long_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "_WAIT_S", 0.1)
    ingress = Ingress()
    await ingress.ask("/quick")
    ingress.inside.clear()
    first = ingress.ask("/first")
    await ingress.holds("/first")
    late = await ingress.ask("/late")
    assert (late.status_code, late.headers["retry-after"]) == (503, "2")
    assert late.json()["error"]["code"] == "overloaded"
    ingress.go_on.set()
    await first
    assert ingress.inside == ["/first"]


@pytest.mark.asyncio
async def test_the_end_of_a_slow_body_goes_on_without_a_turn_before_its_time_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fairness, "_CLIENT_S", 0.02)
    monkeypatch.setattr(fairness, "_LATE_S", 0.1)
    ingress = Ingress()
    await ingress.ask("/quick")
    ingress.inside.clear()
    slow = Client(ingress.app, "/quick")
    slow.say(b"slow ", more=True)
    await ingress.holds("/quick")
    first = ingress.ask("/first")
    await ingress.holds("/quick", "/first")
    slow.say(b"body")
    await asyncio.wait_for(slow.task, 5)
    assert ingress.bodies[-1] == b"slow body"
    ingress.go_on.set()
    await first


@pytest.mark.asyncio
async def test_load_balancers_do_not_stand_in_line() -> None:
    ingress = Ingress()
    await ingress.ask("/quick")
    ingress.inside.clear()
    first = ingress.ask("/first")
    await ingress.holds("/first")
    balancer = ingress.ask("/health")
    await ingress.holds("/first", "/health")
    ingress.go_on.set()
    await asyncio.gather(first, balancer)


@pytest.mark.asyncio
async def test_all_addresses_of_an_ipv6_host_are_one_client() -> None:
    ingress = Ingress()
    await ingress.ask("/quick")
    ingress.inside.clear()
    flood = [ingress.ask(f"/{n}", peer=f"2001:db8::{n + 1}") for n in range(5)]
    await ingress.holds("/0")
    good = ingress.ask("/good", peer="2001:db8:0:1::1")
    await ingress.holds("/0")
    ingress.go_on.set()
    await asyncio.gather(*flood, good)
    assert ingress.inside.index("/good") == 1


@pytest.mark.asyncio
async def test_nothing_is_told_where_nobody_asked() -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert "end_turn" not in scope.get("state", {})
        await send(dict(HEAD))

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    tells = TellsTurns(app, at_once=1)
    await tells({"type": "http", "path": "/", "headers": []}, receive, send)
    assert sent == [HEAD]
    assert TOLD not in sent[0]
