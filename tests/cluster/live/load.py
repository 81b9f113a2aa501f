"""A steady load of chat requests with known answers, and what became of each of them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx

from jenga.demo import recall

CLIENT_S = 300.0
"""The client's own patience, above every limit of the server that is tested."""
_TABLES = 6
_PAIRS = 60


@dataclass
class Outcome:
    """One request."""

    stream: bool
    begin: float
    """Seconds on the monotonic clock."""
    end: float = 0.0
    verdict: str = "lost"
    """``right``, ``wrong`` (another answer), ``failed``; of streams also ``cut`` (with an error event), ``unbegun``
    (with one before any token), ``silent``."""
    detail: str = ""


class Load(threading.Thread):
    """Requests at a constant rate, whatever becomes of the ones before.  `finish` ends it and waits for all answers."""

    def __init__(self, url: str, model: str, *, rate: float, stream_every: int, key: str | None = None) -> None:
        """`rate` requests a second, one in `stream_every` of them a stream of about 150 tokens."""
        super().__init__(daemon=True)
        self._url, self._model, self._rate, self._stream_every = url, model, rate, stream_every
        self._ending = threading.Event()
        self.outcomes: list[Outcome] = []
        self.start()

    def run(self) -> None:
        asyncio.run(self._run())

    def finish(self) -> list[Outcome]:
        """Send nothing more, wait for what was sent."""
        self._ending.set()
        self.join()
        return self.outcomes

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=CLIENT_S, limits=limits, trust_env=False) as client,
            asyncio.TaskGroup() as group,
        ):
            begin, number = time.monotonic(), 0
            while not self._ending.is_set():
                stream = number % self._stream_every == 0
                outcome = Outcome(stream, time.monotonic())
                self.outcomes.append(outcome)
                group.create_task(self._ask(client, outcome, number))
                number += 1
                await asyncio.sleep(max(0.0, begin + number / self._rate - time.monotonic()))

    async def _ask(self, client: httpx.AsyncClient, outcome: Outcome, number: int) -> None:
        table = recall.table(number % _TABLES, _PAIRS)
        question = table.ask(20 + number % 5, "!") if outcome.stream else table.ask(number * 7 % _PAIRS, "?")
        body = {
            "model": self._model,
            "messages": question.messages,
            "max_tokens": question.answer_tokens,
            "temperature": 0,
            "stream": outcome.stream,
        }
        try:
            outcome.verdict, outcome.detail = await self._post(client, body, question.answer)
        except httpx.HTTPError as error:
            outcome.verdict = "silent" if outcome.stream else "failed"
            outcome.detail = f"{type(error).__name__}: {error}"
        outcome.end = time.monotonic()

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any], right: str) -> tuple[str, str]:
        if not body["stream"]:
            got = await client.post("/v1/chat/completions", json=body)
            if got.status_code != 200:
                return "failed", f"{got.status_code} {got.text[:200]}"
            said = got.json()["choices"][0]["message"]["content"] or ""
            return _verdict(said, right)
        said, ended = "", False
        async with client.stream("POST", "/v1/chat/completions", json=body) as got:
            if got.status_code != 200:
                return "failed", f"{got.status_code} {(await got.aread())[:200]!r}"
            async for line in got.aiter_lines():
                data = line.removeprefix("data: ")
                if data == line:
                    continue
                assert not ended, "nothing follows [DONE]"
                if data == "[DONE]":
                    ended = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    return "cut" if said else "unbegun", str(event["error"])
                said += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        return _verdict(said, right) if ended else ("silent", "no [DONE]")


def _verdict(said: str, right: str) -> tuple[str, str]:
    # Bit for bit it is another matter (docs/equality.md): the demo model errs now and then, whatever happens around it.
    return ("right", "") if said.strip() == right.strip() else ("wrong", f"{said!r} for {right!r}")


def count(outcomes: list[Outcome]) -> dict[str, Any]:
    """The row's figures: requests by kind and verdict, and the longest answer in seconds."""
    plain = Counter(each.verdict for each in outcomes if not each.stream)
    streams = Counter(each.verdict for each in outcomes if each.stream)
    return {
        "requests": sum(plain.values()),
        "requests_failed": plain["failed"] + plain["lost"],
        "streams": sum(streams.values()),
        "streams_refused": streams["failed"] + streams["lost"],
        "streams_cut": streams["cut"] + streams["unbegun"],
        "streams_cut_unbegun": streams["unbegun"],
        "streams_cut_silently": streams["silent"],
        "wrong_answers": plain["wrong"] + streams["wrong"],
        "longest_s": round(max((each.end - each.begin for each in outcomes), default=0.0), 1),
        "details": dict(Counter(each.detail for each in outcomes if each.verdict not in ("right", "wrong"))),
    }
