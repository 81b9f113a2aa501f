"""The memory map's routes and what a replica tells, without Ray and without an engine; `jenga top` against a server."""

import asyncio
import gzip
import io
import json
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentBroadcastResponse
from rich.console import Console
from typer.testing import CliRunner, Result
from vllm.v1.engine.exceptions import EngineDeadError

from deployments import engine, memory_map, top
from deployments.cli import add_commands
from deployments.config import parse_serving
from jenga.allocator import RESERVED, UNOWNED, PageState, TwoLevelAllocator
from jenga.layout import GroupLayout, LayerGroup, Layout
from jenga.metrics import memory_snapshot
from jenga.metrics.engine import EngineReport, HitTotals, RequestCounts, eviction_ages
from jenga.metrics.map import DATA_VERSION, VERSION, MemoryMap
from jenga.metrics.memory import GROUP_CAUSES, LIVE_CAUSES, POOL_CAUSES
from jenga.metrics.prometheus import Exporter as PrometheusExporter
from jenga.policies import FullAttention, SlidingWindow
from jenga.vllm_plugin import asking

LAYOUT = Layout(
    1024,
    (
        GroupLayout(LayerGroup("full", FullAttention(), 2, page_tokens=16, page_bytes=256), ratio=4, stride=256),
        GroupLayout(LayerGroup("window", SlidingWindow(64), 6, page_tokens=16, page_bytes=1024), ratio=1, stride=1024),
    ),
    0.0,
    0.0,
    "by hand",
)


def pool() -> TwoLevelAllocator:
    made = TwoLevelAllocator(50, LAYOUT.ratios)
    made.allocate(0, 30)
    for page in made.allocate(1, 9)[:4]:
        made.release(1, page, keep=True)
    return made


def report(made: TwoLevelAllocator) -> dict[str, Any]:
    """An engine's report, by hand."""
    return EngineReport(
        time=1e9,
        memory=memory_snapshot(LAYOUT, made.usage(), 50 * 1024 + 7),
        counters=made.counters(),
        hits=HitTotals(12, 4000, 5, 1000, 0, (0, 0), (0, 0)),
        requests=RequestCounts(3, 1, (0, 0), (0, 0)),
        page_tokens=(16, 16),
        ages=eviction_ages(made),
        checkpoints=(None, None),
        stock=None,
    ).to_dict()


class Core:
    """An engine core that counts its questions, and may never answer."""

    def __init__(self) -> None:
        self.pool = pool()
        self.asked: list[tuple[Any, ...]] = []
        self.stuck = False
        self.stock = False
        self.fault: Exception | None = None

    async def ask(self, *question: Any) -> Any:
        self.asked.append(question)
        if self.stuck:
            await asyncio.Event().wait()
        if self.fault:
            raise self.fault
        if self.stock:
            return None
        if question == ("jenga_map",):
            return MemoryMap.take(LAYOUT, self.pool, 5.0).to_dict()
        return {"large": question[1]} if question[1] < 50 else None


class OnItsWay:
    """A replica's answer on its way, as Ray has it."""

    def __init__(self, answer: Awaitable[Any]) -> None:
        self.answer = answer
        self.given_up = False

    async def get_async(self) -> Any:
        return await self.answer

    def cancel(self) -> None:
        self.given_up = True


async def dies() -> None:
    raise RuntimeError("the actor died")


async def answers_none() -> None:
    pass


class Broadcast:
    """A handle whose replicas answer as `watch` does, beside one that dies, another one and silent ones."""

    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        self.answer = answer
        self.available = True
        self.silent = 0
        self.results: list[OnItsWay] = []

    def broadcast(self, method: str, *arguments: Any) -> DeploymentBroadcastResponse:
        assert method == "memory"
        return DeploymentBroadcastResponse(self.send(*arguments), None)

    async def send(self, *arguments: Any) -> Any:
        if not self.available:
            raise DeploymentUnavailableError("engine")
        silent = [asyncio.Event().wait() for _ in range(self.silent)]
        self.results = [OnItsWay(each) for each in (dies(), *silent, self.answer(*arguments), answers_none())]
        return self.results


class Server:
    """The routes over one replica."""

    def __init__(self) -> None:
        self.core = Core()
        watch = memory_map.MemoryWatch(self.core.ask, "r1", "m")
        self.handle = Broadcast(lambda *asked: watch.answer(report(self.core.pool), *asked))
        self.routes = memory_map.MemoryRoutes()
        self.routes._memory_map_on = True
        self.routes._memory_handles = lambda: {"m": self.handle}
        app = FastAPI()
        for name, route in memory_map.ENDPOINTS.items():
            route(app)(getattr(self.routes, name))
        self.client = TestClient(app)

    def error(self, path: str, **headers: str) -> tuple[int, str, str]:
        got = self.client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        error = got.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return got.status_code, error["code"], error["message"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(memory_map, "PAGE_PERIOD_S", 0.0)
    return Server()


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    got = server.client.get("/memory")
    assert got.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in got.headers["content-security-policy"]
    assert "//" not in got.text.replace("// ", "").replace("<!-- ", "")  # no address of another host


def test_the_page_s_constants_are_ours() -> None:
    page = memory_map._FILE.read_text()
    ours = {
        "FREE": PageState.FREE,
        "LIVE": PageState.LIVE,
        "CACHED": PageState.CACHED,
        "UNOWNED": UNOWNED,
        "RESERVED": RESERVED,
        "VERSION": VERSION,
        "DATA_VERSION": DATA_VERSION,
    }
    for name, value in ours.items():
        assert re.findall(rf"^const (?:.*, )?{name} = (-?\d+)[,;]", page, re.MULTILINE) == [str(int(value))], name
    (causes,) = re.findall(r"^const CAUSES = (\[.*\]);$", page, re.MULTILINE)
    assert json.loads(causes) == [*GROUP_CAUSES, *POOL_CAUSES]
    assert set(LIVE_CAUSES) < set(GROUP_CAUSES)


def test_a_map_reaches_the_browser_whole_and_the_core_is_asked_once_for_all_who_look(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = server.client.get("/memory/data").json()
    assert [each["replica"] for each in data["replicas"]] == ["r1"]
    assert data["replicas"][0]["report"] == json.loads(json.dumps(report(server.core.pool)))
    assert server.core.asked == [], "a report costs the engine core nothing"
    for _ in range(3):
        got = server.client.get("/memory/pages", params={"replica": "r1"})
        assert got.headers["content-encoding"] == "gzip"
        replica, taken = MemoryMap.decode(got.content)
    assert server.core.asked == [("jenga_map",)]
    assert (replica, taken) == ("r1", MemoryMap.take(LAYOUT, server.core.pool, 5.0))
    assert [sum(counts.values()) for counts in taken.count()] == [8 * 4, 9]
    monkeypatch.setattr(memory_map, "PERIOD_S", 0.0)
    server.client.get("/memory/pages", params={"replica": "r1"})
    assert len(server.core.asked) == 2
    assert server.client.get("/memory/page", params={"replica": "r1", "large": 3}).json() == {"large": 3}


def test_what_cannot_be_shown_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert server.error("/memory/pages?replica=r2")[:2] == (404, "replica_gone")
    assert server.error("/memory/page?replica=r1&large=50")[:2] == (404, "no_page")
    for path in ("/memory/data", "/memory/pages?replica=r1", "/memory/page?replica=r1&large=1"):
        assert server.error(path, sec_fetch_site="cross-site")[:2] == (403, "other_site")
        assert server.client.get(path, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert server.client.get("/memory", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200, "a link"
    monkeypatch.setattr(memory_map, "PERIOD_S", 0.0)
    server.core.stock = True
    status, code, said = server.error("/memory/pages?replica=r1")
    assert (status, code) == (404, "no_map")
    assert "JENGA=0" in said
    for path, question in (("pages?replica=r1", "jenga_map"), ("page?replica=r1&large=1", "jenga_large_page")):
        words = f"Call to {question} method failed: 'EngineCoreProc' object has no attribute"
        caplog.clear()
        server.core.fault = Exception(f"{words} '{question}'")  # with JENGA=0
        assert server.error(f"/memory/{path}")[:2] == (404, "no_map")
        assert "did not tell" not in caplog.text
        for fault in (Exception(f"{words} 'blocks'"), ValueError("anything else")):
            server.core.fault = fault
            caplog.clear()
            status, code, said = server.error(f"/memory/{path}")
            assert (status, code) == (500, "map_failed")
            assert "JENGA=0" not in said
            assert str(fault) in caplog.text, "the log says why"
    server.core.fault = EngineDeadError()
    assert server.error("/memory/pages?replica=r1")[:2] == (404, "replica_gone")
    server.core.fault = None
    monkeypatch.setattr(memory_map, "ANSWER_S", 0.05)
    server.core.stuck = True
    assert server.error("/memory/pages?replica=r1")[:2] == (503, "replica_busy")
    assert server.client.get("/memory/data").json()["replicas"], "a busy engine's last report is still told"
    server.handle.available = False
    assert server.client.get("/memory/data").json()["replicas"] == []
    assert server.error("/memory/pages?replica=r1")[:2] == (404, "replica_gone")


def test_a_silent_replica_hides_no_other(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.client.get("/memory/data").json()["silent_replicas"] == 0
    server.handle.silent = 1
    monkeypatch.setattr(memory_map, "REPORT_S", 0.2)
    data = server.client.get("/memory/data").json()
    assert ([each["replica"] for each in data["replicas"]], data["silent_replicas"]) == (["r1"], 1)
    assert [result.given_up for result in server.handle.results] == [False, True, False, False]
    # Nobody waits for the silent one where another one has answered, and where it may be the one that was asked for
    # it is not said to be gone.
    monkeypatch.setattr(memory_map, "ANSWER_S", 1e6)
    assert server.client.get("/memory/pages?replica=r1").status_code == 200
    assert server.client.get("/memory/page?replica=r1&large=3").json() == {"large": 3}
    monkeypatch.setattr(memory_map, "ANSWER_S", 0.1)
    status, code, said = server.error("/memory/pages?replica=r2")
    assert (status, code) == (503, "replica_busy")
    assert "'r2' did not answer" in said
    server.handle.silent = 0
    assert server.error("/memory/pages?replica=r2")[:2] == (404, "replica_gone")


@pytest.mark.parametrize("path", ["/memory/data", "/memory/pages?replica=r1", "/memory/page?replica=r1&large=1"])
def test_pages_of_other_sites_are_refused_where_browsers_send_the_origin_only(server: Server, path: str) -> None:
    """Over plain HTTP, not on the loopback, there is no Sec-Fetch-Site."""
    other = (
        "http://evil.example",
        "http://jenga:8001",
        "http://jenga",
        "http://jenga.example:8000",
        "null",
        "http://[",
    )
    for origin in other:
        assert server.error(path, host="jenga:8000", origin=origin)[:2] == (403, "other_site"), origin
    for host, origin in (
        ("jenga:8000", "http://jenga:8000"),
        ("JENGA", "http://jenga"),
        ("jenga:80", "http://jenga"),
        ("jenga", "https://jenga"),
        ("[::1]:8000", "http://[::1]:8000"),
    ):
        assert server.client.get(path, headers={"Host": host, "Origin": origin}).status_code == 200, origin


@pytest.mark.asyncio
async def test_many_who_look_do_not_make_an_idle_engine_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is the engine's, not that of those who wait for their turn; the same page is looked into once."""
    monkeypatch.setattr(memory_map, "ANSWER_S", 0.2)
    monkeypatch.setattr(memory_map, "PAGE_PERIOD_S", 0.02)
    core = Core()
    watch = memory_map.MemoryWatch(core.ask, "r1", "m")
    pages = list(range(30))  # 0.6 s of turns
    found = await asyncio.gather(*(watch.answer(None, "r1", page) for page in pages * 20))
    assert found == [{"large": page} for page in pages * 20]
    assert core.asked == [("jenga_large_page", page) for page in pages]
    assert await watch.answer(None, "r1", 3) == {"large": 3}
    assert len(core.asked) == len(pages) + 1, "who comes later gets a look of his own"
    core.stuck = True
    busy = await asyncio.gather(*(watch.answer(None, "r1", large) for large in [None, 3] * 10))
    assert busy == [{"problem": "busy"}] * 20
    assert len(core.asked) == len(pages) + 3


@pytest.mark.asyncio
async def test_a_report_that_fails_is_asked_for_again_and_an_old_one_is_known_as_such(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Any] = [Exception("Call to jenga_memory method failed: division by zero")] * 2 + [report(pool())]
    asked: list[str] = []

    class EngineCore:
        async def call_utility_async(self, question: str) -> Any:
            asked.append(question)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(asking, "PERIOD", 0.0)
    monkeypatch.setattr(engine, "Exporter", lambda labels: PrometheusExporter(labels, CollectorRegistry()))
    monkeypatch.setattr(engine, "logger", logging.getLogger("engine"))
    replica: Any = object.__new__(engine.JengaServer)
    replica.engine = SimpleNamespace(_engine_client=SimpleNamespace(engine_core=EngineCore()))
    replica._llm_config = SimpleNamespace(model_id="m", deployment_config={})
    replica._memory_watch = memory_map.MemoryWatch(replica._ask_core, "r1", "m")
    assert (await replica.memory(None, None))["report_age_s"] is None
    answers.append(None)  # would be vLLM's own manager: the end
    await replica._export_metrics()
    assert asked == ["jenga_memory"] * 4
    assert caplog.text.count("division by zero") == 1
    live = 30 * 256 + 5 * 1024  # bytes of `pool`
    assert replica._kv_in_use == round(20 * live / (50 * 1024 + 7)) / 20 > 0
    told = await replica.memory(None, None)
    assert told["report"] == report(pool())
    assert told["report_age_s"] == pytest.approx(time.time() - 1e9, abs=60)


def test_switched_off_it_tells_nothing(server: Server) -> None:
    server.routes._memory_map_on = False
    for path in ("/memory", "/memory/data", "/memory/pages?replica=r1", "/memory/page?replica=r1&large=1"):
        status, code, said = server.error(path)
        assert (status, code) == (404, memory_map.OFF)
        assert "memory_map: true" in said
    assert server.core.asked == []
    model = {"model": {"id": "m", "path": "/m"}}
    assert parse_serving(model).memory_map is True
    assert parse_serving(model | {"memory_map": False}).memory_map is False


# -- jenga top -----------------------------------------------------------------------------------------------------


@pytest.fixture
def listening() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server on the loopback that answers everything as told: its address, and what to change."""
    told: dict[str, Any] = {"status": 200, "body": ""}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told["path"] = self.path
            self.send_response(told["status"])
            self.end_headers()
            self.wfile.write(told["body"].encode())

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", told
    http.shutdown()
    http.server_close()


def summary(**changes: Any) -> dict[str, Any]:
    replica = {"replica": "r1", "model": "m", "report": report(pool()), "report_age_s": 0.5}
    told = {"version": DATA_VERSION, "taken": 1e9, "period_s": 1.0, "stale_after_s": 12.0, "silent_replicas": 0}
    return told | {"replicas": [replica]} | changes


def jenga_top(state: Path, *arguments: str) -> Result:
    app = typer.Typer()
    add_commands(app)
    return CliRunner().invoke(app, ["top", *arguments], env={"COLUMNS": "140", "JENGA_STATE_DIR": str(state)})


def test_top_shows_every_replica_once_and_as_json(listening: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    address, told = listening
    told["body"] = json.dumps(summary())
    shown = jenga_top(tmp_path, "--once", "--address", address)
    assert shown.exit_code == 0, shown.output
    assert told["path"] == "/memory/data"
    for word in ("replica r1", "3 resident, 1 waiting", "5 of 12 requests", "1,000 of 4,000 tokens (25.0%)", "window"):
        assert word in shown.stdout, shown.stdout
    for cause, size in memory_snapshot(LAYOUT, pool().usage(), 50 * 1024 + 7).by_cause().items():
        lines = [line.split()[-1] for line in shown.stdout.splitlines() if line.split()[:1] == [cause]]
        assert lines == ([f"{size / (50 * 1024 + 7):.1%}"] if size else [])
    assert json.loads(jenga_top(tmp_path, "--json", "--address", f"{address}/v1/").stdout) == json.loads(told["body"])


def test_top_tells_what_is_wrong(listening: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    address, told = listening

    def said() -> str:
        with pytest.raises(top.TopError) as caught:
            top.ask(address)
        return str(caught.value)

    told.update(status=404, body=bytes(memory_map._refused(404, memory_map.OFF).body).decode())
    assert "switched off" in said()
    told.update(status=404, body="no such page")
    assert "not as Jenga Serve does" in said()
    told.update(status=200, body="<html>")
    assert "not as Jenga Serve does" in said()
    told.update(status=200, body=json.dumps(summary(version=9)))
    assert f"version 9, this program reads {DATA_VERSION}" in said()
    with pytest.raises(top.TopError, match="no address"):
        top.ask("here")
    refused = jenga_top(tmp_path, "--once", "--address", "http://127.0.0.1:1")
    assert refused.exit_code == 1
    assert "nothing answers at http://127.0.0.1:1" in refused.stderr
    assert "--address" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_top_shows_replicas_without_a_report_and_what_is_out_of_date() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    silent = summary(replicas=[{"replica": "r2", "model": "m", "report": None, "report_age_s": None}])
    aged = summary()
    console.print(top.render("http://x", aged))
    assert "old" not in console.export_text()
    aged["replicas"][0]["report_age_s"] = 1234.5
    console.print(top.render("http://x", aged))
    console.print(top.render("http://x", silent, trouble="gone [away]"))
    console.print(top.render("http://x", summary(replicas=[])))
    console.print(top.render("http://x", summary(silent_replicas=2)))
    text = console.export_text()
    for words in (
        "this is 1,234 s old",
        "2 replicas do not answer",
        "no report",
        "not up to date: gone [away]",
        "no replica answers",
    ):
        assert words in text


def test_a_map_of_another_version_or_length_is_refused() -> None:
    data = MemoryMap.take(LAYOUT, pool(), 5.0).encode("r1")
    assert len(gzip.compress(data, 1)) < len(data)
    with pytest.raises(ValueError, match="its header speaks of"):
        MemoryMap.decode(data[:-1])
    with pytest.raises(ValueError, match="of version 2"):
        MemoryMap.decode(data.replace(b'"version": 1', b'"version": 2'))
