"""Mixed traffic on two CPU replicas for half an hour, a kill every three minutes: what grows, leaks, errs?

    python -m benchmarks.soak [--minutes 30] [--clients 6] [--json results/soak.json] [--plot docs/img/soak.png]

Clients hold conversations, ask about shared tables, stream recitals, send prompts that nearly fill the context, and
hang up. Every three minutes they pause: then no page may be held, and what the router foretells of requests sent one
by one must be what the engine has cached. After that a replica's process, an engine core or the ingress (in turn) is
killed. On the way: resident memory of each process, KV pages by state, latency, answers, predictions.

The last line is the verdict; exit status 1 if it is a bad one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console

from benchmarks import demo
from benchmarks.demo import MODEL, ROOT
from deployments.local.record import Record
from jenga.demo import recall

CONTEXT = 1024
# Little KV memory, so that its limits are met.
ENGINE = {"max_model_len": CONTEXT, "max_num_seqs": 16, "kv_memory": "16MiB"}
KILL_EVERY_S, SAMPLE_S, WINDOW_S = 180.0, 5.0, 30.0
# A process is warm after this time of its life; a slope over less than the second is noise.
WARM_S, LEAST_LIFE_S = 240.0, 240.0
QUIET_S, SEQUENTIAL = 60.0, 40
PREDICTIONS = re.compile(r"^ray_jenga_router_predictions_total\{(.*)\} ([\d.e+]+)$", re.MULTILINE)

# What a process is, by the first of these that its command line holds.
KINDS = {
    "EngineCore": "engine core",
    "ServeReplica:jenga:Engine": "replica",
    "ServeReplica:jenga:Ingress": "ingress",
    "ProxyActor": "proxy",
    "ServeController": "controller",
    "gcs_server": "GCS",
    "raylet/raylet": "raylet",
    "local.supervisor": "forwarder",
}
VICTIMS = ("replica", "engine core", "ingress")


def processes(record: Record) -> dict[str, list[psutil.Process]]:
    """Everything that the deployment runs, by kind."""
    supervisor = psutil.Process(record.supervisor.pid)
    found: dict[str, list[psutil.Process]] = defaultdict(list)
    for process in [supervisor, *supervisor.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            line = process.name() + " " + " ".join(process.cmdline())
            kind = next((kind for mark, kind in KINDS.items() if mark in line), "other")
            # Wrappers (`unshare`, `sh`) carry their child's command line.
            if kind != "forwarder" or process.pid == supervisor.pid:
                found[kind].append(process)
    return found


@dataclass
class Tally:
    """What clients saw, each entry with its time since the start."""

    begin: float = field(default_factory=time.monotonic)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    first_tokens: list[tuple[float, float]] = field(default_factory=list)
    answers: list[tuple[float, bool]] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)

    @property
    def now(self) -> float:
        return time.monotonic() - self.begin


class FaultyAnswerError(Exception):
    """A request that was not answered, and how."""


class Clients:
    """Mixed traffic until told to stop."""

    def __init__(self, url: str, tally: Tally, seed: int) -> None:
        self.tally = tally
        self.random = random.Random(seed)
        self.http = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False)
        self.running = asyncio.Event()
        self.busy = 0
        self.tables = [recall.table(7000 + n, 40 + n * 13 % 90) for n in range(24)]

    async def work(self) -> None:
        """One client: one request after the other."""
        kinds = {self.conversation: 3, self.shared_prefix: 5, self.recital: 3, self.hang_up: 2, self.long_prompt: 2}
        while True:
            await self.running.wait()
            kind = self.random.choices(list(kinds), list(kinds.values()))[0]
            self.busy += 1
            self.tally.sent[kind.__name__] += 1
            try:
                await kind()
            except FaultyAnswerError as error:
                self.tally.faults.append((self.tally.now, str(error)))
            except httpx.HTTPError as error:
                self.tally.faults.append((self.tally.now, type(error).__name__))
            finally:
                self.busy -= 1
            await asyncio.sleep(self.random.expovariate(4))

    async def pause(self) -> None:
        """Begin nothing new, and wait for what runs."""
        self.running.clear()
        while self.busy:
            await asyncio.sleep(0.1)

    async def chat(self, messages: list[dict[str, str]], tokens: int) -> str:
        begin = time.monotonic()
        body = {"model": MODEL, "messages": messages, "max_tokens": tokens, "temperature": 0}
        got = await self.http.post("/v1/chat/completions", json=body)
        if got.status_code != 200:
            raise FaultyAnswerError(f"status {got.status_code}")
        self.tally.latencies.append((self.tally.now, time.monotonic() - begin))
        content: str = got.json()["choices"][0]["message"]["content"]
        return content

    async def ask(self, question: recall.Question, tokens: int = 4) -> None:
        said = await self.chat(question.messages, tokens)
        self.tally.answers.append((self.tally.now, said == question.answer))

    async def shared_prefix(self) -> None:
        table = self.random.choice(self.tables)
        await self.ask(table.ask(self.random.randrange(len(table.pairs))))

    async def long_prompt(self) -> None:
        pairs = recall.pairs_for(CONTEXT - 16)
        await self.ask(recall.question(self.random.randrange(10**9), pairs, beyond=200))

    async def conversation(self) -> None:
        table = self.random.choice(self.tables)
        asked = table.ask(self.random.randrange(len(table.pairs)))
        messages = asked.messages
        for _ in range(self.random.randint(2, 5)):
            said = await self.chat(messages, 4)
            key, _value = self.random.choice(table.pairs)
            messages = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": f"? {key}="}]

    def _stream(self, question: recall.Question) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        body = {"model": MODEL, "messages": question.messages, "temperature": 0, "stream": True}
        return self.http.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": question.answer_tokens + 2})

    async def recital(self) -> None:
        table = self.random.choice(self.tables)
        question = table.ask(len(table.pairs) - self.random.randint(8, 30), "!")
        begin, said, ended = time.monotonic(), "", False
        async with self._stream(question) as response:
            if response.status_code != 200:
                raise FaultyAnswerError(f"status {response.status_code} to a stream")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise FaultyAnswerError("a stream cut with an error event")
                    if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
                        if not said:
                            self.tally.first_tokens.append((self.tally.now, time.monotonic() - begin))
                        said += text
        if not ended:
            raise FaultyAnswerError("a stream cut silently")
        self.tally.answers.append((self.tally.now, said == question.answer))

    async def hang_up(self) -> None:
        """Go before the first byte, or after a few of them."""
        table = self.random.choice(self.tables)
        question, patience = table.ask(2, "!"), self.random.choice((0.01, 0.05, 0.3))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience), self._stream(question) as response:
                async for _ in response.aiter_bytes():
                    pass


class Watch:
    """What the deployment's processes, pages and counters were over time."""

    def __init__(self, record: Record, tally: Tally) -> None:
        self.record, self.tally = record, tally
        self.memory: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        """MiB by kind and process, with times."""
        self.pages: list[tuple[float, dict[str, int]]] = []
        self.predictions: list[tuple[float, dict[str, int]]] = []
        self._counted: dict[tuple[str, str], float] = {}
        self._totals: Counter[str] = Counter()

    async def sample(self) -> None:
        """One row of everything that can be had."""
        for kind, members in processes(self.record).items():
            for process in members:
                with contextlib.suppress(psutil.Error):
                    self.memory[kind][process.pid].append((self.tally.now, process.memory_info().rss / 2**20))
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            self.pages.append((self.tally.now, await self.count_pages()))
        with contextlib.suppress(httpx.HTTPError):
            self.predictions.append((self.tally.now, await self.count_predictions()))

    async def count_pages(self) -> dict[str, int]:
        """Bytes by state, requests resident, replicas that told; from the replicas' last reports."""
        found = Counter({"held": 0, "resident": 0})
        async with httpx.AsyncClient(timeout=20, trust_env=False) as http:
            told = (await http.get(f"{self.record.memory_url}/data")).raise_for_status().json()["replicas"]
        for report in (each["report"] for each in told):
            found["replicas"] += 1
            found["resident"] += report["requests"]["resident"] + report["requests"]["waiting"]
            for group in report["memory"]["groups"]:
                found["held"] += group["live_pages"]
                found["cached"] += group["cached_pages"]
                found["stranded"] += group["stranded_pages"]
        return dict(found)

    async def count_predictions(self) -> dict[str, int]:
        """Predictions by outcome since the start, over all replicas that ever were."""
        async with httpx.AsyncClient(timeout=20, trust_env=False) as http:
            text = (await http.get(self.record.metrics_url)).text
        for labels, value in PREDICTIONS.findall(text):
            label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            key, count = (label["replica"], label["outcome"]), float(value)
            self._totals[label["outcome"]] += int(count - self._counted.get(key, 0))
            self._counted[key] = count
        return dict(self._totals)

    async def settled_predictions(self) -> Counter[str]:
        """The same once they stand still, since counters travel for seconds."""
        before, since, end = await self.count_predictions(), time.monotonic(), time.monotonic() + 60
        while time.monotonic() - since < 5 and time.monotonic() < end:
            await asyncio.sleep(1)
            if (now := await self.count_predictions()) != before:
                before, since = now, time.monotonic()
        return Counter(before)


@dataclass
class Check:
    """A pause in the traffic: what was still held, and how good the predictions were."""

    at_s: float
    empty_after_s: float
    held_pages: int
    resident: int
    predictions: dict[str, int]
    right: int
    asked: int


async def check(clients: Clients, watch: Watch, number: int) -> Check:
    """Stop the traffic and look."""
    await clients.pause()
    begin = time.monotonic()
    # What clients left behind has to end, and reports are some seconds old.
    while (held := await watch.count_pages())["held"] and time.monotonic() - begin < QUIET_S:
        await asyncio.sleep(1)
    empty = time.monotonic() - begin
    before = await watch.settled_predictions()
    right = 0
    for n in range(SEQUENTIAL):
        question = clients.tables[n % 8].ask((number * 11 + n) % 40)
        right += await clients.chat(question.messages, 4) == question.answer
    after = await watch.settled_predictions()
    after.subtract(before)
    outcome = {name: count for name, count in after.items() if count}
    return Check(watch.tally.now, round(empty, 1), held["held"], held["resident"], outcome, right, SEQUENTIAL)


async def kill(clients: Clients, watch: Watch, kind: str) -> dict[str, Any]:
    """Kill one process of a kind under load, and wait until everything is there again."""
    clients.running.set()
    await asyncio.sleep(2)
    tally, record = watch.tally, watch.record
    before = processes(record)
    members = before.get(kind)
    if not members:
        raise RuntimeError(f"there is no process of kind '{kind}' to kill")
    victim = clients.random.choice(members)
    faults, at = len(tally.faults), tally.now
    victim.kill()
    wanted = {each: len(before[each]) for each in VICTIMS}
    while True:
        await asyncio.sleep(0.5)
        now = processes(record)
        alive = {each: sum(process.pid != victim.pid for process in now.get(each, [])) for each in VICTIMS}
        if alive == wanted and await serves(watch, wanted["replica"]):
            break
        if tally.now - at > 170:
            break
    return {
        "at_s": round(at, 1),
        "killed": kind,
        "whole_again_s": round(tally.now - at, 1),
        "faults": dict(Counter(text for _, text in tally.faults[faults:])),
    }


async def serves(watch: Watch, replicas: int) -> bool:
    """Whether every replica has told its pages."""
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
        return (await watch.count_pages()).get("replicas", 0) == replicas
    return False


async def soak(record: Record, minutes: float, many: int, console: Console) -> dict[str, Any]:
    """The whole run."""
    tally = Tally()
    clients, watch = Clients(record.url, tally, seed=1), Watch(record, tally)
    clients.running.set()
    workers = [asyncio.create_task(clients.work()) for _ in range(many)]

    async def sampling() -> None:
        while True:
            await watch.sample()
            await asyncio.sleep(SAMPLE_S)

    workers.append(asyncio.create_task(sampling()))
    checks, kills = [], []
    turns = itertools.cycle(VICTIMS)
    for number in itertools.count(1):
        due = min(number * KILL_EVERY_S, minutes * 60)
        await asyncio.sleep(max(0.0, due - tally.now))
        for task in workers:
            if task.done():
                task.result()  # a client that ended has a fault of its own
        checks.append(await check(clients, watch, number))
        console.print(f"{tally.now:6.0f} s {checks[-1]}", highlight=False)
        if due >= minutes * 60:
            break
        kills.append(await kill(clients, watch, next(turns)))
        console.print(f"{tally.now:6.0f} s {kills[-1]}", highlight=False)
    for task in workers:
        task.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    await clients.http.aclose()
    return summary(tally, watch, checks, kills)


def slope(points: list[tuple[float, float]]) -> float | None:
    """MiB per hour of a process that has lived long enough, by least squares over its warm time."""
    warm = [(t, mib) for t, mib in points if t - points[0][0] >= WARM_S]
    if len(warm) < 3 or warm[-1][0] - warm[0][0] < LEAST_LIFE_S:
        return None
    return statistics.linear_regression(*zip(*warm, strict=True)).slope * 3600


def windows(points: list[tuple[float, float]], end: float) -> Iterator[tuple[float, list[float]]]:
    """Values by window of `WINDOW_S`, with the window's middle."""
    rows: dict[int, list[float]] = defaultdict(list)
    for at, value in points:
        rows[int(at // WINDOW_S)].append(value)
    for row in range(int(end // WINDOW_S) + 1):
        if rows[row]:
            yield (row + 0.5) * WINDOW_S, rows[row]


def quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def summary(tally: Tally, watch: Watch, checks: list[Check], kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything as plain data: rows over time, then totals and the verdict."""
    end = tally.now
    memory: dict[str, Any] = {}
    for kind, members in sorted(watch.memory.items()):
        slopes = [round(found, 1) for points in members.values() if (found := slope(points)) is not None]
        memory[kind] = {
            "processes": len(members),
            "slopes_mib_per_hour": slopes if kind != "other" else [round(sum(slopes), 1)],
            "peak_mib": round(max(mib for points in members.values() for _, mib in points)),
            # The sum of what lived at a time: a point for each sample of the deployment.
            "mib": total(list(members.values())),
        }
    latency = [
        {"at_s": at, "p50_s": round(quantile(v, 0.5), 3), "p99_s": round(quantile(v, 0.99), 3), "requests": len(v)}
        for at, v in windows(tally.latencies, end)
    ]
    answers = [
        {"at_s": at, "right": sum(map(int, v)), "of": len(v)}
        for at, v in windows([(at, float(right)) for at, right in tally.answers], end)
    ]
    calm = [value for at, value in tally.latencies if not any(0 <= at - k["at_s"] <= k["whole_again_s"] for k in kills)]
    outcomes = watch.predictions[-1][1] if watch.predictions else {}
    leaked = sum(each.held_pages for each in checks)
    inexact = sum(count for each in checks for name, count in each.predictions.items() if name != "exact")
    silent = sum(text == "a stream cut silently" for _, text in tally.faults)
    result = {
        "seconds": round(end),
        "requests": dict(tally.sent),
        "faults": dict(Counter(text for _, text in tally.faults)),
        "faults_at_s": [[round(at, 1), text] for at, text in tally.faults],
        "latency_s": {"p50": round(quantile(calm, 0.5), 3), "p99": round(quantile(calm, 0.99), 3)},
        "right_answers": [sum(right for _, right in tally.answers), len(tally.answers)],
        "predictions_under_load": outcomes,
        "checks": [vars(each) for each in checks],
        "kills": kills,
        "memory": memory,
        "pages": [{"at_s": round(at, 1)} | found for at, found in watch.pages],
        "predictions": [{"at_s": round(at, 1)} | found for at, found in watch.predictions],
        "latency": latency,
        "answers": answers,
    }
    worst = {kind: max(row["slopes_mib_per_hour"], default=0.0) for kind, row in memory.items()}
    told = ", ".join(f"{kind} {found:+.0f}" for kind, found in worst.items() if memory[kind]["slopes_mib_per_hour"])
    asked = sum(each.asked for each in checks)
    good = leaked == 0 and inexact == 0 and silent == 0
    result["verdict"] = (
        f"{'good' if good else 'BAD'}: {leaked} pages held in {len(checks)} pauses, {asked - inexact} of {asked} "
        f"predictions one by one exact, {len(tally.faults)} of {sum(tally.sent.values())} requests failed around "
        f"{len(kills)} kills ({silent} silently); memory after warm-up, steepest of each kind in MiB/h: {told}"
    )
    result["good"] = good
    return result


def total(lives: list[list[tuple[float, float]]]) -> list[list[float]]:
    """Memory of all processes of a kind at each sample: seconds, MiB."""
    sums: dict[int, float] = defaultdict(float)
    for points in lives:
        for at, mib in points:
            sums[int(at // SAMPLE_S)] += mib
    return [[row * SAMPLE_S, round(mib, 1)] for row, mib in sorted(sums.items())]


def plot(result: dict[str, Any], file: Path) -> None:
    """Memory, pages, latency and exactness over time, kills as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(10, 11), sharex=True, layout="constrained")
    for kind, row in result["memory"].items():
        if kind not in ("GCS", "raylet", "other"):
            times, mib = zip(*row["mib"], strict=True)
            axes[0].plot([t / 60 for t in times], mib, label=kind, linewidth=1)
    axes[0].set_ylabel("resident memory (MiB)")
    minutes = [row["at_s"] / 60 for row in result["pages"]]
    states = ("held", "cached", "stranded")
    axes[1].stackplot(minutes, [[row.get(s, 0) for row in result["pages"]] for s in states], labels=states)
    axes[1].set_ylabel("small pages, both replicas")
    minutes = [row["at_s"] / 60 for row in result["latency"]]
    for part in ("p50", "p99"):
        axes[2].plot(minutes, [row[f"{part}_s"] for row in result["latency"]], label=part, marker=".", linewidth=1)
    axes[2].set_yscale("log")
    axes[2].set_ylabel("latency of whole answers (s)")
    minutes = [row["at_s"] / 60 for row in result["answers"]]
    right = [100 * row["right"] / row["of"] for row in result["answers"]]
    axes[3].plot(minutes, right, label="right answers", marker=".", linewidth=1)
    exact = [(c["at_s"] / 60, 100 * c["predictions"].get("exact", 0) / c["asked"]) for c in result["checks"]]
    axes[3].plot(*zip(*exact, strict=True), "s", label="predictions exact, one by one")
    times, shares = [], []
    for before, after in zip(result["predictions"], result["predictions"][6:], strict=False):
        grown = {k: after.get(k, 0) - before.get(k, 0) for k in ("exact", "over", "under")}
        if sum(grown.values()) > 20:
            times.append(after["at_s"] / 60)
            shares.append(100 * grown["exact"] / sum(grown.values()))
    axes[3].plot(times, shares, label="predictions exact, under load", linewidth=1)
    axes[3].set_ylabel("per cent")
    axes[3].set_xlabel("minutes")
    for axis in axes:
        for each in result["kills"]:
            axis.axvline(each["at_s"] / 60, color="grey", linestyle=":", linewidth=1)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left", ncols=6, fontsize=8)
    for each in result["kills"]:
        axes[0].text(each["at_s"] / 60, axes[0].get_ylim()[1], each["killed"], fontsize=7, va="bottom", rotation=20)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    for file in filter(None, (options.json, options.plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    # Ray's metrics are ten seconds old by default.
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112  # Ray's own spelling
    with tempfile.TemporaryDirectory(prefix="soak-") as made:
        folder = Path(made)
        try:
            record = demo.serve(folder, console, ENGINE)
            result = asyncio.run(soak(record, options.minutes, options.clients, console))
        finally:
            demo.stop(folder)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    result = {"commit": commit.strip(), "machine": machine, "clients": options.clients} | result
    if options.json:
        options.json.write_text(json.dumps(result) + "\n")
    if options.plot:
        plot(result, options.plot)
    print(result["verdict"])
    sys.exit(not result["good"])


if __name__ == "__main__":
    main()
