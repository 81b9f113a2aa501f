"""Ten thousand abused requests against a running application: what breaks, what leaks, what do others notice?

    python -m benchmarks.hostile [--requests 10000] [--rounds 2] [--json results/hostile.json]

Two CPU replicas of the demo model, with API keys. Abuses come family by family, 32 at a time, all of it in every round,
so that memory which grows with abuse shows as a difference between rounds. A well-behaved client, a process of its own
with a key of another tenant, asks a question with a known answer four times a second, before, during and after.
Where there are three cores or more, the last is the clients', on which the well-behaved one goes first, and the others
are the server's: times are to be the server's, not those of clients in each other's way.

A fault is an answer of 5xx other than 503 with Retry-After, or no answer at all to what deserves one. Exit status 1
where there is a fault, a page that is still held at the end, or a wrong answer to the well-behaved client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks import demo
from benchmarks.demo import MODEL, ROOT
from benchmarks.soak import ENGINE, processes, quantile
from deployments import keyring
from deployments.local.record import API_KEY, Record
from jenga.demo import recall

AT_A_TIME = 32
ANSWER_S = 150.0
BODY, REQUESTS, BODY_S, REQUEST_S = 1 << 20, 256, 5.0, 60.0
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"

Body = dict[str, Any]


@dataclass(frozen=True)
class Abuse:
    """One connection: what is sent when, and how the client behaves then."""

    pieces: Sequence[bytes | float]
    """Bytes, and seconds to wait between them."""
    hang_up_s: float | None = None
    """Seconds after the last byte after which the client goes, whatever came."""
    deaf_s: float = 0.0
    """Seconds for which the client reads nothing."""
    deserves_an_answer: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of it."""

    status: str
    """The HTTP status, or `closed`, `hung up`, `silence`."""
    fault: str | None = None


def request(
    path: str,
    body: bytes | Body = b"",
    *,
    method: str = "POST",
    key: str | None = None,
    headers: Sequence[bytes] = (),
    length: int | None = None,
) -> bytes:
    """The bytes of a request that closes its connection."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"{method} {path} HTTP/1.1".encode(),
        b"Host: here",
        b"Connection: close",
        b"Content-Type: application/json",
        f"Content-Length: {len(content) if length is None else length}".encode(),
        *([f"Authorization: Bearer {key}".encode()] if key else []),
        *headers,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + content


def completion(**fields: Any) -> Body:
    return {"model": MODEL, "prompt": "a1=42; b2=17; ? a1=", "max_tokens": 4, "temperature": 0} | fields


def chat(**fields: Any) -> Body:
    messages = [{"role": "user", "content": "a1=42; b2=17; ? a1="}]
    return {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0} | fields


def target(rng: random.Random) -> tuple[str, Body]:
    return (COMPLETIONS, completion()) if rng.random() < 0.5 else (CHATS, chat())


class Families:
    """Abuses by family, each an endless stream."""

    def __init__(self, spec: Mapping[str, Any], seed: int, *, key: str | None, limited: str | None = None) -> None:
        self.rng, self.key, self.limited = random.Random(seed), key, limited
        schemas = spec["components"]["schemas"]
        self.fields = {
            COMPLETIONS: sorted(schemas["CompletionRequest"]["properties"]),
            CHATS: sorted(schemas["ChatCompletionRequest"]["properties"]),
        }

    def all(self) -> dict[str, Callable[[], Abuse]]:
        """The families that take no time of their own, by name."""
        return {
            "wrong fields": self.wrong_fields,
            "random bytes": self.random_bytes,
            "depth and number": self.depth_and_number,
            "oversized": self.oversized,
            "headers": self.headers,
            "forms": self.forms,
            "wrong keys": self.wrong_keys,
            "hang up": self.hang_up,
        }

    def post(self, path: str, body: bytes | Body, **options: Any) -> Abuse:
        whole = request(path, body, key=self.key, **options)
        # The refusal of what is too large may be lost with the connection, which ends before all is sent.
        return Abuse([whole], deserves_an_answer=len(whole) < BODY)

    VALUES: tuple[Any, ...] = (
        *(None, True, -1, 0, 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 1.5, 1e308, -1e308, 1e-320),
        *(float("nan"), float("inf"), "", "a", "\ud800", "\0", "a" * 10_000, "../../etc/passwd", "{{7*7}}", "%s%n"),
        *([], [[]], [None], [1] * 2000, [-1], [1e30], ["x"] * 300, [""], [{}], {}, {"": {}}, {"a": [1]}, {"5": 1e300}),
    )
    # Cost by design what they say: only what is wrong of them.
    COSTLY = ("max_tokens", "max_completion_tokens", "n", "min_tokens", "best_of", "prompt_logprobs", "ignore_eos")
    WRONG = (-1, 2**63, 10**30, "x", [], {}, 1.5, "\ud800")

    def wrong_fields(self) -> Abuse:
        """A good request of which one to three fields are something else."""
        path, body = target(self.rng)
        for _ in range(self.rng.randint(1, 3)):
            name = self.rng.choice(self.fields[path])
            body[name] = self.rng.choice(self.WRONG if name in self.COSTLY else self.VALUES)
        if self.rng.random() < 0.2:
            body["stream"] = True
        return self.post(path, body)

    def random_bytes(self) -> Abuse:
        """Noise instead of HTTP, or instead of a body, or a few wrong bytes in a good one."""
        rng = self.rng
        noise = rng.randbytes(rng.randint(1, 3000))
        path, body = target(rng)
        kind = rng.randrange(4)
        if kind == 0:
            # May be an unfinished line, which only the time limit answers.
            return Abuse([noise], hang_up_s=1.0, deserves_an_answer=False)
        if kind == 1:
            return self.post(path, noise)
        good = bytearray(json.dumps(body).encode())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(good))
            good[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
        if kind == 2:
            return self.post(path, bytes(good))
        head = bytearray(request(path, body, key=self.key))
        head[rng.randrange(60)] = rng.randrange(256)
        return Abuse([bytes(head)], hang_up_s=2.0, deserves_an_answer=False)

    def depth_and_number(self) -> Abuse:
        """Lists in lists, and more of everything than anybody needs."""
        rng, many = self.rng, self.rng.choice((200, 3000, 9000, 60_000))
        depth = rng.choice((60, 70, 400, 900, 5000, 100_000))
        deep = b"[" * depth + b"]" * depth if rng.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
        name = rng.choice((b"prompt", b"x", b"kv_transfer_params", b"logit_bias", b"stop")).join((b'"', b'"'))
        good = json.dumps(completion())[1:].encode()
        cases: list[tuple[str, bytes | Body]] = [
            (COMPLETIONS, b"{" + name + b":" + deep + b"," + good),
            (CHATS, chat(messages=[{}] * many)),
            (CHATS, chat(messages=[{"role": "user"}] * many)),
            (CHATS, chat(messages=[1] * many)),
            (CHATS, chat(messages=[{"role": "user", "content": [1] * many}])),
            (CHATS, chat(messages=[{"role": "user", "content": [{"type": "text"}] * many}])),
            (CHATS, chat(tools=[{"type": "function"}] * many)),
            (COMPLETIONS, completion(prompt=[rng.choice((1, 1.5, "a", None, [], [1]))] * many)),
            (COMPLETIONS, completion(**{rng.choice(("stop", "bad_words", "stop_token_ids")): [1.5] * many})),
            (COMPLETIONS, completion(**{f"k{n}": n for n in range(many)})),
            (COMPLETIONS, completion(logit_bias={str(n): 1 for n in range(many)})),
        ]
        return self.post(*rng.choice(cases))

    def oversized(self) -> Abuse:
        """Bodies beyond the limit, told and untold, and heads without an end."""
        rng = self.rng
        large = b"x" * (BODY + (BODY >> 2))
        chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
        head = request(COMPLETIONS, key=self.key).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        cases = (
            # The answer comes before all is sent, and the connection ends with it.
            Abuse([request(COMPLETIONS, large, key=self.key)], deserves_an_answer=False),
            Abuse([head, *[chunk] * 24], deserves_an_answer=False),
            Abuse([request(COMPLETIONS, b"{}", key=self.key, length=10**15)]),
            Abuse([request("/v1/" + "a" * 200_000, method="GET", key=self.key)], deserves_an_answer=False),
            Abuse([request("/", method="GET", headers=[b"X: " + b"y" * 300_000])], deserves_an_answer=False),
            Abuse([request("/", method="GET", headers=[b"X: y"] * 20_000)], deserves_an_answer=False),
            self.post(COMPLETIONS, completion(prompt="k" * (BODY - 1000))),
            self.post(COMPLETIONS, completion(prompt=[7] * (BODY // 4))),
        )
        return rng.choice(cases)

    def headers(self) -> Abuse:
        """Headers that mean something to what is between client and engine, and methods and paths that mean nothing."""
        rng = self.rng
        if rng.random() < 0.3:
            paths = (
                "/v1/%ff%00",
                "/v1/models/%ff",
                "//",
                "/-/routes",
                "/memory/pages?replica=%ff&large=1e9",
                "/docs/../x",
            )
            method = rng.choice(("GET", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "HEAD"))
            return Abuse([request(rng.choice(paths), method=method, key=self.key)])
        names = (b"X-Request-ID", b"X-Session-Id", b"serve_multiplexed_model_id", b"X-Request-Timeout-Seconds")
        names += (b"x-request-disconnect-disabled", b"Content-Type", b"Accept", b"Origin", b"X-data-parallel-rank")
        values = (
            b"\xff\xfe",
            b"",
            b"0",
            b"-1",
            b"nan",
            b"0.0001",
            b"a" * 5000,
            b"?1",
            rng.randbytes(20).hex().encode(),
        )
        chosen = [rng.choice(names) + b": " + rng.choice(values) for _ in range(rng.randint(1, 3))]
        path, body = target(rng)
        return Abuse([request(path, body, key=self.key, headers=chosen)])

    def forms(self) -> Abuse:
        """Patterns, grammars and schemas that are wrong, endless or large."""
        rng, many = self.rng, self.rng.choice((10, 200, 2000))
        schemas: list[Any] = [
            {"$ref": "#"},
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
            {"type": "string", "pattern": "(" * many},
            {"type": "string", "pattern": "((a{1,300}){1,300}){1,300}"},
            {"type": "array", "items": {"type": "string"}, "minItems": 10**6},
            {"enum": [f"v{n}" for n in range(many)]},
            {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(many)}},
            {"type": ["x", 3]},
            {"allOf": [{"type": "string"}] * many},
        ]
        outputs: list[Body] = [
            {"regex": rng.choice(("[[[", "(a*)*b", "a{1,99999999}", "(" * many + "a" + ")" * many, "\0"))},
            {"regex": "|".join(f"a{n}" for n in range(many))},
            {"grammar": rng.choice(("root ::= ", 'root ::= root "a"', "root ::= a\na ::= root", "\0", "{}"))},
            {
                "grammar": "root ::= r0\n"
                + "\n".join(f'r{n} ::= "a" r{n + 1}' for n in range(many))
                + f'\nr{many} ::= "b"'
            },
            {"choice": ["\ud800"]},
            {"choice": [f"c{n}" for n in range(many)]},
            {"json": "{", "regex": "a"},
        ]
        stream = rng.random() < 0.3
        if rng.random() < 0.5:
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": rng.choice(schemas)}}
            return self.post(CHATS, chat(response_format=wanted, stream=stream))
        return self.post(COMPLETIONS, completion(structured_outputs=rng.choice(outputs), stream=stream))

    def wrong_keys(self) -> Abuse:
        """No key, nobody's key, a key that may not, another tenant's salt."""
        rng = self.rng
        wrong = (
            "",
            "x",
            "jenga--",
            "jenga-" + "0" * 12 + "-" + "A" * 43,
            "\u00ff",
            "a" * 20_000,
            (self.key or "x")[:-1],
        )
        kind = rng.randrange(3)
        if kind == 0:
            return Abuse([request(COMPLETIONS, completion(), key=rng.choice(wrong).encode().decode("latin-1"))])
        if kind == 1:
            path = rng.choice(("/memory", "/memory/data", "/memory/pages?replica=x", "/memory/page?replica=x&large=0"))
            return Abuse([request(path, method="GET", key=rng.choice((self.key, None)))])
        salt = rng.choice(("umbrella", "", "a" * 200, rng.randbytes(32).hex()))
        return self.post(COMPLETIONS, completion(cache_salt=salt))

    def hang_up(self) -> Abuse:
        """Go while an answer comes, before it begins, or in the middle of the question."""
        rng = self.rng
        question = recall.question(rng.randrange(10**6), 100, verb="!")
        body = chat(messages=question.messages, max_tokens=200, stream=rng.random() < 0.7, ignore_eos=True)
        whole = request(CHATS, body, key=self.key)
        if rng.random() < 0.2:
            whole = whole[: rng.randrange(len(whole))]
        return Abuse([whole], hang_up_s=rng.choice((0.0, 0.01, 0.1, 0.5)), deserves_an_answer=False)

    def flood(self, key: str | None) -> Abuse:
        """A good request, of which there are too many."""
        return Abuse([request(CHATS, chat(), key=key)])

    def slow_head(self) -> Abuse:
        """A head that comes byte by byte, without an end."""
        pieces: list[bytes | float] = [b"POST /v1/completions HTTP/1.1\r\nX: "]
        for _ in range(60):
            pieces += [1.0, b"y"]
        return Abuse(pieces)

    def slow_body(self) -> Abuse:
        """A body that comes byte by byte, without an end."""
        pieces: list[bytes | float] = [request(COMPLETIONS, b"{", key=self.key, length=1000)]
        for _ in range(30):
            pieces += [0.5, b" "]
        return Abuse(pieces)

    def slow_reader(self) -> Abuse:
        """Ask for a long answer, and read it late."""
        body = completion(prompt=["k"] * 2, max_tokens=60, ignore_eos=True, logprobs=5, stream=True)
        return Abuse([request(COMPLETIONS, body, key=self.key)], deaf_s=10.0)


def from_schema(spec: Mapping[str, Any], count: int, seed: int, key: str | None) -> list[Abuse]:
    """Requests that schemathesis makes of the OpenAPI description, right ones and wrong ones.

    Half of those with a body are given a model, a prompt and few tokens, so that they get further than the first fault.
    """
    import hypothesis
    import requests
    import schemathesis
    from hypothesis import given, settings

    operations = [found.ok() for found in schemathesis.openapi.from_dict(dict(spec)).get_all_operations()]
    rng, made = random.Random(seed), []
    # Those with a body are nearly all there is to get wrong.
    shares = {op.label: 5 if "POST" in op.label else 1 for op in operations}
    for operation in operations:
        each = max(1, count * shares[operation.label] // sum(shares.values()) // 2)
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            with contextlib.suppress(hypothesis.errors.Unsatisfiable):

                @hypothesis.seed(seed)
                @settings(
                    max_examples=each,
                    deadline=None,
                    database=None,
                    phases=[hypothesis.Phase.generate],
                    suppress_health_check=list(hypothesis.HealthCheck),
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def keep(case: Any) -> None:
                    asked = case.as_transport_kwargs(base_url="http://here")
                    body = asked.get("json")
                    if isinstance(body, dict) and rng.random() < 0.5:
                        good = chat() if "chat" in asked["url"] else completion()
                        asked["json"] = {k: v for k, v in (good | body).items() if k not in Families.COSTLY} | {
                            "model": MODEL,
                            "max_tokens": 4,
                        }
                    with contextlib.suppress(requests.RequestException, UnicodeError, ValueError):
                        ready = requests.Request(**asked).prepare()
                        content = ready.body or b""
                        content = content.encode() if isinstance(content, str) else content
                        made.append(Abuse([request(ready.path_url, content, method=str(ready.method), key=key)]))

                keep()
    rng.shuffle(made)
    return made


async def commit(place: tuple[str, int], abuse: Abuse) -> Outcome:
    """Do it, and say what became of it."""
    try:
        async with asyncio.timeout(ANSWER_S):
            said = await _exchange(place, abuse)
    except TimeoutError:
        return Outcome("silence", "no answer" if abuse.deserves_an_answer else None)
    except OSError as error:
        return Outcome("closed", f"no answer: {type(error).__name__}" if abuse.deserves_an_answer else None)
    if said is None:
        return Outcome("hung up")
    match = re.match(rb"HTTP/1\.1 (\d{3}) ", said)
    if match is None:
        return Outcome("closed", "closed without an answer" if abuse.deserves_an_answer else None)
    status = match[1].decode()
    honest = status == "503" and b"\r\nretry-after: " in said.lower()
    return Outcome(status, said[:400].decode(errors="replace") if status >= "500" and not honest else None)


async def _exchange(place: tuple[str, int], abuse: Abuse) -> bytes | None:
    """The beginning of the answer, None where the client went first."""
    reader, writer = await asyncio.open_connection(*place, limit=1 << 16)
    sending = asyncio.create_task(_send(writer, abuse.pieces))
    try:
        if abuse.deaf_s:
            await asyncio.sleep(abuse.deaf_s)
        try:
            async with asyncio.timeout(abuse.hang_up_s):
                if abuse.hang_up_s is not None:
                    await sending
                said = b""
                while data := await reader.read(1 << 16):
                    said = (said + data)[:2000]
                return said
        except TimeoutError:
            if abuse.hang_up_s is None:
                raise
            return None
    finally:
        sending.cancel()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await sending
        writer.transport.abort()


async def _send(writer: asyncio.StreamWriter, pieces: Sequence[bytes | float]) -> None:
    # An answer may come before the end of the question, with the end of the connection.
    with contextlib.suppress(OSError):
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(piece)
                await writer.drain()
            else:
                await asyncio.sleep(piece)


async def commit_all(place: tuple[str, int], abuses: Sequence[Abuse], at_a_time: int = AT_A_TIME) -> list[Outcome]:
    """All of them, so many at a time."""
    waiting, outcomes = iter(abuses), []

    async def work() -> None:
        for abuse in waiting:
            outcomes.append(await commit(place, abuse))

    await asyncio.gather(*(work() for _ in range(min(at_a_time, len(abuses)))))
    return outcomes


@dataclass
class Answers:
    """What the well-behaved client got: times since the epoch, seconds, and what was wrong."""

    rows: list[tuple[float, float, int, str]] = field(default_factory=list)
    """When it was answered, how long that took, how often it was told to come back, what was wrong (or nothing)."""

    def between(self, begin: float, end: float) -> dict[str, Any]:
        """A summary of what was answered in a time."""
        rows = [row for row in self.rows if begin <= row[0] <= end]
        seconds = [row[1] for row in rows]
        return {
            "answers": len(rows),
            "p50_ms": round(1000 * quantile(seconds, 0.5)) if seconds else None,
            "p99_ms": round(1000 * quantile(seconds, 0.99)) if seconds else None,
            "told_to_come_back": sum(row[2] for row in rows),
            "wrong": [row[3] for row in rows if row[3]],
        }


def behave_well(url: str, key: str | None, out: Any, stop: Any) -> None:
    """The process of the well-behaved client: a question, its answer, a pause; comes back when told, as OpenAI's do."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    rng = random.Random(5)
    # A fresh connection each time, as a new client would have.
    while not stop.is_set():
        number = rng.randrange(10**9)
        question = recall.question(number, 40)
        body = {"model": MODEL, "messages": question.messages, "max_tokens": 4, "temperature": 0}
        begin, told = time.time(), 0
        wrong = ""
        try:
            while True:
                got = httpx.post(f"{url}{CHATS}", json=body, headers=headers, timeout=ANSWER_S, trust_env=False)
                if got.status_code in (429, 503) and "retry-after" in got.headers and told < 20:
                    told += 1
                    time.sleep(float(got.headers["retry-after"]))
                    continue
                break
            if got.status_code != 200:
                wrong = f"status {got.status_code}"
            elif (said := got.json()["choices"][0]["message"]["content"]) != question.answer:
                # The model itself errs on one question of a thousand: from nothing cached, it does so again.
                anew = httpx.post(
                    f"{url}{CHATS}",
                    json=body | {"cache_salt": f"anew {number}"},
                    headers=headers,
                    timeout=ANSWER_S,
                    trust_env=False,
                )
                if anew.status_code != 200 or anew.json()["choices"][0]["message"]["content"] != said:
                    wrong = f"question {number}: '{said}', not '{question.answer}'"
        except httpx.HTTPError as error:
            wrong = type(error).__name__
        out.put((time.time(), time.time() - begin, told, wrong))
        stop.wait(0.25)


@contextlib.contextmanager
def well_behaved(url: str, key: str | None) -> Iterator[Answers]:
    """A well-behaved client for the time of a `with`; its answers are whole behind it."""
    context = multiprocessing.get_context("spawn")
    out, stop = context.SimpleQueue(), context.Event()
    process = context.Process(target=behave_well, args=(url, key, out, stop), daemon=True)
    process.start()
    answers = Answers()
    try:
        yield answers
    finally:
        stop.set()
        while process.is_alive() or not out.empty():
            while not out.empty():
                answers.rows.append(out.get())
            process.join(0.1)


def resident(record: Record) -> dict[str, int]:
    """MiB by kind of process."""
    found = {}
    for kind, members in processes(record).items():
        found[kind] = round(sum(process.memory_info().rss for process in members) / 2**20)
    return found


def held(record: Record, key: str | None) -> dict[str, int]:
    """Pages held and requests resident or waiting, by the replicas' last reports."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    told = (
        httpx.get(f"{record.memory_url}/data", headers=headers, timeout=30, trust_env=False).raise_for_status().json()
    )
    reports = [each["report"] for each in told["replicas"]]
    return {
        "replicas": len(reports),
        "pages": sum(group["live_pages"] for report in reports for group in report["memory"]["groups"]),
        "requests": sum(report["requests"]["resident"] + report["requests"]["waiting"] for report in reports),
    }


def nothing_held(record: Record, key: str | None, seconds: float = 90) -> dict[str, int]:
    """The same once nothing is held any more, or after so many seconds."""
    end = time.monotonic() + seconds
    while ((now := held(record, key))["pages"] or now["requests"]) and time.monotonic() < end:
        time.sleep(1)
    return now


HOLDERS = {
    "mallory": ("evil",),
    "limited": ("evil", "--concurrent-requests", "16"),
    "alice": ("acme",),
    "root": ("operators", "--admin"),
}


@dataclass(frozen=True)
class Cores:
    """Which cores are whose; the same ones where there are too few to divide."""

    server: tuple[int, ...]
    clients: tuple[int, ...]

    @classmethod
    def divided(cls) -> Cores:
        """The last core that this process may use for the clients, all others for the server."""
        cores = tuple(sorted(os.sched_getaffinity(0)))
        return cls(cores[:-1], cores[-1:]) if len(cores) > 2 else cls(cores, cores)


def start(folder: Path, console: Console) -> tuple[Record, dict[str, str]]:
    """Two replicas of the demo model with keys and limits, and the keys; the caller stops them."""
    keys, ring = {}, keyring.KeyRing.new()
    for name, (tenant, *options) in HOLDERS.items():
        limit = int(options[1]) if "--concurrent-requests" in options else None
        ring, keys[name] = ring.add(name, tenant=tenant, admin="--admin" in options, concurrent_requests=limit)
    keyring.write(folder / "keys.json", ring)
    auth = {"keys_file": str(folder / "keys.json")}
    limits = {"body": BODY, "requests": REQUESTS, "body_s": BODY_S, "request_s": REQUEST_S}
    os.environ[API_KEY] = keys["root"]
    return demo.serve(folder, console, ENGINE, auth=auth, limits=limits), keys


# Of all requests; the rest are schemathesis'.
SHARES = {
    "wrong fields": 0.25,
    "random bytes": 0.15,
    "depth and number": 0.08,
    "oversized": 0.03,
    "headers": 0.06,
    "forms": 0.02,
    "wrong keys": 0.08,
    "hang up": 0.08,
}
AT_ONCE, SLOW = 1000, 100


def rounds(families: Families, schema: Sequence[Abuse], drawn: int) -> dict[str, tuple[list[Abuse], int]]:
    """One round's abuses by name, and how many at a time; `drawn` are those that take no time of their own."""
    counts = {name: round(drawn * share) for name, share in SHARES.items()}
    # schemathesis does not always find as many different ones.
    counts["wrong fields"] += drawn - len(schema) - sum(counts.values())
    plan = {"schemathesis": (list(schema), AT_A_TIME)}
    for name, make in families.all().items():
        plan[name] = ([make() for _ in range(counts[name])], AT_A_TIME)
    plan["slow heads"] = ([families.slow_head() for _ in range(SLOW)], SLOW)
    plan["slow bodies"] = ([families.slow_body() for _ in range(SLOW)], SLOW)
    plan["slow readers"] = ([families.slow_reader() for _ in range(SLOW // 4)], SLOW)
    plan["1,000 at once, key with a limit"] = ([families.flood(families.limited) for _ in range(AT_ONCE)], AT_ONCE)
    plan["1,000 at once, key without"] = ([families.flood(families.key) for _ in range(AT_ONCE)], AT_ONCE)
    return plan


CALM_S = 20.0


async def abuse_all(
    record: Record, keys: Mapping[str, str], requests: int, repeats: int, console: Console
) -> dict[str, Any]:
    """The whole run."""
    place = (str(urlsplit(record.url).hostname), record.port)
    head = {"Authorization": f"Bearer {keys['root']}"}
    spec = httpx.get(f"{record.url}/openapi.json", headers=head, timeout=30, trust_env=False).raise_for_status().json()
    drawn = requests // repeats - (2 * AT_ONCE + 2 * SLOW + SLOW // 4)
    count = round(drawn * (1 - sum(SHARES.values())))
    console.print(f"making {repeats * count} requests of the OpenAPI description ...")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        schemas = pool.starmap(from_schema, [(spec, count, seed, keys["mallory"]) for seed in range(1, repeats + 1)])
    rows, marks = [], []
    with well_behaved(record.url, keys["alice"]) as answers:
        os.nice(10)  # behind the well-behaved one, which has begun
        await asyncio.sleep(8)
        begin = time.time()
        await asyncio.sleep(CALM_S)
        marks.append(("before", begin, time.time(), resident(record)))
        for number in range(1, repeats + 1):
            families = Families(spec, seed=number, key=keys["mallory"], limited=keys["limited"])
            for name, (abuses, at_a_time) in rounds(families, schemas[number - 1], drawn).items():
                begin = time.time()
                outcomes = await commit_all(place, abuses, at_a_time)
                rows.append((name, number, begin, time.time(), outcomes))
                statuses = Counter(outcome.status for outcome in outcomes)
                console.print(f"round {number}, {name}: {time.time() - begin:.0f} s, {dict(statuses)}", highlight=False)
                for outcome in outcomes:
                    if outcome.fault:
                        console.print("  fault:", outcome.fault[:400], highlight=False, markup=False)
            await asyncio.sleep(CALM_S / 2)
            begin = time.time()
            await asyncio.sleep(CALM_S)
            marks.append((f"after round {number}", begin, time.time(), resident(record)))
    left = nothing_held(record, keys["root"])
    return {
        "requests": sum(len(row[4]) for row in rows),
        "rows": [
            {
                "family": name,
                "round": number,
                "requests": len(outcomes),
                "seconds": round(end - begin, 1),
                "statuses": dict(sorted(Counter(outcome.status for outcome in outcomes).items())),
                "faults": [outcome.fault for outcome in outcomes if outcome.fault],
                "well_behaved": answers.between(begin, end),
            }
            for name, number, begin, end, outcomes in rows
        ],
        "calm": [
            {"when": when, "well_behaved": answers.between(begin, end), "resident_mib": memory}
            for when, begin, end, memory in marks
        ],
        "left": left,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table(title=f"{result['requests']:,} abused requests")
    for column in ("abuse", "requests", "answered", "faults", "others: p50 / p99 ms", "come back", "wrong"):
        table.add_column(column, justify="left" if column in ("abuse", "answered") else "right")
    calm = {each["when"]: each["well_behaved"] for each in result["calm"]}

    def add(name: str, asked: str, answered: str, faults: str, others: dict[str, Any]) -> None:
        times = f"{others['p50_ms']} / {others['p99_ms']}"
        table.add_row(name, asked, answered, faults, times, str(others["told_to_come_back"]), str(len(others["wrong"])))

    add("(before)", "", "", "", calm["before"])
    for row in result["rows"]:
        answered = ", ".join(f"{status}: {count}" for status, count in row["statuses"].items())
        name = row["family"] + (f" (round {row['round']})" if row["round"] > 1 else "")
        add(name, f"{row['requests']:,}", answered, str(len(row["faults"])), row["well_behaved"])
    add("(after)", "", "", "", result["calm"][-1]["well_behaved"])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="in all, at least 5,000")
    parser.add_argument("--rounds", type=int, default=2, help="times that all families come")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: growth shows from the second round on; give at least 2")
    if options.requests < (least := 2500 * options.rounds):
        parser.error(
            f"--requests {options.requests}: the floods and the slow ones are {2225 * options.rounds:,} of "
            f"{options.rounds} rounds; give at least {least}"
        )
    cores = Cores.divided()
    console = Console(stderr=True, width=160)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hostile-") as made:
        folder = Path(made)
        try:
            os.sched_setaffinity(0, cores.server)  # inherited by what is started
            record, keys = start(folder, console)
            os.sched_setaffinity(0, cores.clients)
            result = asyncio.run(abuse_all(record, keys, options.requests, options.rounds, console))
        finally:
            demo.stop(folder)
    show(result, console)
    faults = sum(len(row["faults"]) for row in result["rows"])
    wrong = sum(len(each["well_behaved"]["wrong"]) for each in (*result["rows"], *result["calm"]))
    memory = {each["when"]: each["resident_mib"] for each in result["calm"]}
    last, former = (memory[f"after round {number}"] for number in (options.rounds, options.rounds - 1))
    grown = {kind: mib - former.get(kind, 0) for kind, mib in last.items()}
    good = not faults and not wrong and not result["left"]["pages"]
    result["verdict"] = (
        f"{'good' if good else 'BAD'}: {faults} faults in {result['requests']:,} abused requests, {wrong} wrong or "
        f"failed answers to the well-behaved client, {result['left']['pages']} pages held at the end; memory, last "
        "round against the one before, MiB: " + ", ".join(f"{kind} {mib:+d}" for kind, mib in sorted(grown.items()))
    )
    if options.json:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        head = {"commit": git.strip(), "machine": machine, "seconds": round(time.monotonic() - began)}
        head |= {"cores": asdict(cores)}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(head | result, indent=1) + "\n")
    print(result["verdict"])
    sys.exit(not good)


if __name__ == "__main__":
    main()
