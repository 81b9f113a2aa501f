"""The memory map page: what replicas tell of their buffers, and the routes that hand it to a browser.

The engine core is asked only while somebody looks, and at most once per `PERIOD_S` for all of them
(docs/memory-map.md).
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Query, Request
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentBroadcastResponse
from starlette.responses import HTMLResponse, JSONResponse, Response
from vllm.v1.engine.exceptions import EngineDeadError

from deployments.ray_private import private
from jenga.metrics.engine import PERIOD
from jenga.metrics.map import DATA_VERSION, MemoryMap
from jenga.vllm_plugin.asking import unknown_to_core

logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0
"""Least time between two maps of one engine; what is younger is served again."""
PAGE_PERIOD_S = 0.2
"""Least time between two looks into a large page, which cost more per page than the map does."""
ANSWER_S = 5.0
"""How long a busy engine core may take."""
REPORT_S = 2.0
"""How long a replica may take for its last report, which is no question to its engine core."""
STALE_S = 3 * PERIOD
"""Age from which readers say how old a report is: several were missed."""

ENDPOINTS = {
    "memory_page": lambda app: app.get("/memory", include_in_schema=False),
    "memory_data": lambda app: app.get("/memory/data"),
    "memory_pages": lambda app: app.get("/memory/pages"),
    "memory_large_page": lambda app: app.get("/memory/page"),
}

OFF = "memory_map_off"
"""Error code of every route here where the configuration switches the page off."""

_KEPT_S = 60.0
"""More than anybody waits for a turn."""
_FILE = Path(__file__).with_name("memory_map.html")
# Scripts and data of this page only: nothing is ever fetched from elsewhere.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}

Ask = Callable[..., Awaitable[Any]]


class _InTurn:
    """One kind of question, one at a time; who waits while the same is asked gets that answer."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()
        self._asked = 0.0
        self._answers: dict[Any, tuple[float, Any]] = {}

    async def __call__(self, question: Any, *, fresh_s: float = 0.0, pause_s: float = 0.0) -> Any:
        """The answer: one to a question begun at most `fresh_s` ago, or to one begun `pause_s` after the last."""
        enough = time.monotonic() - fresh_s
        async with self._lock:
            begun, answer = self._answers.get(question, (-math.inf, None))
            if begun >= enough:
                return answer
            await asyncio.sleep(max(0.0, self._asked + pause_s - time.monotonic()))
            self._asked = begun = time.monotonic()
            answer = await self._ask(question)
            oldest = begun - _KEPT_S
            self._answers = {each: known for each, known in self._answers.items() if known[0] > oldest}
            self._answers[question] = begun, answer
            return answer


class MemoryWatch:
    """In a replica: answers about its engine's memory, asked of the engine core as seldom as freshness allows."""

    def __init__(self, ask: Ask, replica: str, model: str) -> None:
        """`ask` calls a utility of the engine core."""
        self._ask = ask
        self._replica = replica
        self._model = model
        self._map = _InTurn(lambda _: _or_problem(self._tell_map()))
        self._page = _InTurn(lambda large: _or_problem(self._tell_page(large)))

    async def answer(
        self, report: Mapping[str, Any] | None, wanted: str | None, large: int | None
    ) -> dict[str, Any] | bytes | None:
        """The engine's last report if `wanted` is None; if it is this replica its map, or one large page; else None.

        A map is compressed with gzip.  What cannot be told is ``{"problem": ...}``.
        """
        if wanted is None:
            # By the clock of the engine's own node; the reader's may be another one.
            age = None if report is None else max(0.0, time.time() - report["time"])
            return {"replica": self._replica, "model": self._model, "report": report, "report_age_s": age}
        if wanted != self._replica:
            return None
        told: dict[str, Any] | bytes
        if large is None:
            told = await self._map(None, fresh_s=PERIOD_S)
        else:
            told = await self._page(large, pause_s=PAGE_PERIOD_S)
        return told

    async def _tell_map(self) -> bytes | dict[str, Any]:
        taken = await self._ask_core("jenga_map")
        if taken is None:
            return {"problem": "no map"}
        # Beside the event loop: what the engine core only copied takes milliseconds to compress.
        return await asyncio.to_thread(_compressed, taken, self._replica)

    async def _tell_page(self, large: int) -> dict[str, Any]:
        found = await self._ask_core("jenga_large_page", large)
        return {"problem": "no page"} if found is None else found

    async def _ask_core(self, *question: Any) -> dict[str, Any] | None:
        # The limit is not around the turns that others take first: only a busy engine is said to be busy.
        async with asyncio.timeout(ANSWER_S):
            answer: dict[str, Any] | None = await self._ask(*question)
            return answer


async def _or_problem(telling: Awaitable[bytes | dict[str, Any]]) -> bytes | dict[str, Any]:
    try:
        return await telling
    except TimeoutError:
        return {"problem": "busy"}
    except EngineDeadError:
        raise  # the replica ends with it
    except Exception as error:
        if unknown_to_core(error):
            return {"problem": "no map"}
        logger.warning("the engine did not tell of its memory: %s: %s", type(error).__name__, error)
        return {"problem": "failed"}


def _compressed(taken: Mapping[str, Any], replica: str) -> bytes:
    return gzip.compress(MemoryMap.from_dict(taken).encode(replica), compresslevel=1)


class MemoryRoutes:
    """The routes; a mixin of the ingress, which has the handles of all models' replicas."""

    _memory_map_on: bool
    """Whether the configuration shows the page."""
    _memory_handles: Callable[[], Mapping[str, Any]]
    """A handle for each model."""

    async def memory_page(self) -> Response:
        """The page itself."""
        if not self._memory_map_on:
            return _refused(404, OFF)
        return HTMLResponse(_FILE.read_text(), headers=_HEADERS)

    async def memory_data(self, request: Request) -> Response:
        """Every replica's last report (`jenga.metrics.engine.EngineReport`, None before the first), as JSON.

        Those that did not answer within `REPORT_S` are counted.
        """
        if refused := self._refuse(request):
            return refused
        replicas, silent = await self._ask_replicas(None, None, REPORT_S)
        replicas.sort(key=lambda each: (each["model"], each["replica"]))
        told = {
            "version": DATA_VERSION,
            "taken": time.time(),
            "period_s": PERIOD_S,
            "stale_after_s": STALE_S,
            "silent_replicas": silent,
            "replicas": replicas,
        }
        return JSONResponse(told, headers=_HEADERS)

    async def memory_pages(self, request: Request, replica: str) -> Response:
        """One replica's map: `jenga.metrics.map.MemoryMap.encode`."""
        if refused := self._refuse(request):
            return refused
        found = await self._ask_replica(replica, None)
        if not isinstance(found, bytes):
            return found
        return Response(found, media_type="application/octet-stream", headers=_HEADERS | {"Content-Encoding": "gzip"})

    async def memory_large_page(
        self, request: Request, replica: str, large: Annotated[int, Query(ge=0, lt=1 << 31)]
    ) -> Response:
        """What is in one large page of one replica: `jenga.metrics.map.LargePage`, as JSON."""
        if refused := self._refuse(request):
            return refused
        found = await self._ask_replica(replica, large)
        return found if isinstance(found, Response) else JSONResponse(found, headers=_HEADERS)

    def _refuse(self, request: Request) -> Response | None:
        """A page of another site must not read request ids through its visitor's browser (Ray's CORS allows all)."""
        if not self._memory_map_on:
            return _refused(404, OFF)
        # Browsers tell the first only to addresses that they trust (HTTPS, loopback), the second to all.
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") or not _own_origin(request):
            return _refused(403, "other_site")
        return None

    async def _ask_replica(self, replica: str, large: int | None) -> Any:
        """A replica's answer, or a response that says why there is none."""
        # Longer than the replica itself waits for its engine core, which for single pages is done in turn.
        answers, silent = await self._ask_replicas(replica, large, 2 * ANSWER_S)
        if not answers:
            # A silent one does not say whether it is the one that was asked for.
            return _refused(503 if silent else 404, "replica_busy" if silent else "replica_gone", replica=replica)
        problem = answers[0].get("problem") if isinstance(answers[0], dict) else None
        match problem:
            case "busy":
                return _refused(503, "replica_busy", replica=replica)
            case "failed":
                return _refused(500, "map_failed", replica=replica)
            case "no map":
                return _refused(404, "no_map", replica=replica)
            case "no page":
                return _refused(404, "no_page", replica=replica, large=large)
        return answers[0]

    async def _ask_replicas(self, replica: str | None, large: int | None, limit_s: float) -> tuple[list[Any], int]:
        """What the replicas answer, those that die meanwhile left out; and how many said nothing within `limit_s`.

        With `replica`, its answer alone is waited for.
        """
        found = await asyncio.gather(
            *(
                _answers(handle.broadcast("memory", replica, large), limit_s, first=replica is not None)
                for handle in self._memory_handles().values()
            )
        )
        return [each for answers, _ in found for each in answers], sum(silent for _, silent in found)


async def _answers(asked: DeploymentBroadcastResponse, limit_s: float, *, first: bool) -> tuple[list[Any], int]:
    """The answers that are not None (with `first`, one of them), and how many did not come within `limit_s`.

    Not Ray's `results_async`, whose limit throws all answers away when one of them is late.
    """
    try:
        async with asyncio.timeout(limit_s):
            results = await private(asked, "_fetch_replica_results_async", "the memory map")()
    except DeploymentUnavailableError as error:
        logger.debug("no replica told of its memory: %s", error)
        return [], 0
    except TimeoutError:
        return [], 1
    waiting = {asyncio.ensure_future(result.get_async()): result for result in results}
    answers: list[Any] = []
    end = time.monotonic() + limit_s
    try:
        while waiting and not (first and answers):
            done, _ = await asyncio.wait(
                waiting, timeout=max(0.0, end - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                for result in waiting.values():
                    result.cancel()  # or questions would pile up in a replica that stands still
                return answers, len(waiting)
            for each in done:
                del waiting[each]
                if each.cancelled() or (error := each.exception()):
                    logger.debug("a replica did not tell of its memory: %s", "cancelled" if each.cancelled() else error)
                elif each.result() is not None:
                    answers.append(each.result())
        return answers, 0
    finally:
        for late in waiting:
            late.cancel()


def _own_origin(request: Request) -> bool:
    """Whether a browser says that a page of this server asks, or says nothing of it."""
    origin = request.headers.get("origin")
    if origin is None:
        return True
    try:
        # A browser leaves the port out where it goes without saying; a client may write it.
        asks = urlsplit(origin)
        own = urlsplit(f"//{request.headers.get('host', '')}")
        default = {"http": 80, "https": 443}.get(asks.scheme)
        return bool(asks.hostname) and (asks.hostname, asks.port or default) == (own.hostname, own.port or default)
    except ValueError:
        return False


_WORDS = {
    OFF: "The memory map is switched off here; `memory_map: true` in the configuration switches it on.",
    "other_site": "The memory map is shown only to pages of this server.",
    "replica_gone": "Replica '{replica}' is gone: it ended, or Ray replaced it. /memory/data lists those that run.",
    "replica_busy": "Replica '{replica}' did not answer in time: its engine is busy with a long step, or its "
    "process stands still.",
    "map_failed": "Replica '{replica}' could not tell of its memory; its log says why.",
    "no_map": "Replica '{replica}' has no map: vLLM's own memory manager is in charge of it (JENGA=0, or a model or "
    "setting that Jenga leaves to vLLM; the replica's log says which).",
    "no_page": "Replica '{replica}' has no large page {large}, or vLLM's own memory manager.",
}


def _refused(status: int, code: str, **words: Any) -> Response:
    """An error in OpenAI's form, like all of this server's."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = _WORDS[code].format(**words)
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Response(json.dumps(body), status_code=status, media_type="application/json", headers=_HEADERS)
