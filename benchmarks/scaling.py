"""Replicas that follow demand, on real engines: what they cost, how long users wait, and whether anything breaks.

    python -m benchmarks.scaling --json results/scaling.json --plot results/scaling.png    about 6 minutes a signal
    python -m benchmarks.scaling --small --check                                           `make test-scaling`

Users ask, read the answer and ask again; their number and the length of their prompts change on the way:

    few          some users with short prompts
    long         many users with long prompts, which hold four times the KV memory
    short        as many users with short prompts
    few          as at first, until one replica is left

Shortly before the long prompts end, some streams begin that outlast the scaling down.  Each signal has a deployment of
its own, from one replica.  `--check` ends with status 1 if a request failed, a stream was cut, a replica that was
stopping took requests, or the router foretold anything wrong afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
from rich.console import Console

from benchmarks import demo
from benchmarks.demo import MODEL, ROOT
from deployments.local.api import ServeApi
from deployments.local.record import Record

KV_MEMORY = "8MiB"
DELAYS = {"look_back_s": 8, "upscale_delay_s": 4, "downscale_delay_s": 10}
SIGNALS: dict[str, dict[str, Any]] = {
    "kv-memory": {"signal": "kv-memory"},
    # What fits into 70 % of a replica's memory of either kind.
    "4 requests": {"signal": "requests", "target_ongoing_requests": 4},
    "16 requests": {"signal": "requests", "target_ongoing_requests": 16},
}
ADMITTED, PREEMPTED = "ray_jenga_admitted_requests_total", "ray_jenga_preemptions_total"
PREDICTED, FOLLOWED = "ray_jenga_router_predictions_total", "ray_jenga_router_replicas"
# Counters are that old: the engine's reports, and Ray's export.
_LAG_S = 7.0


@dataclass(frozen=True)
class Kind:
    """What a user asks: tokens of the prompt and of the answer."""

    prompt: int
    answer: int


SHORT, LONG, TALK = Kind(64, 128), Kind(2000, 160), Kind(64, 2400)


@dataclass(frozen=True)
class Phase:
    """Some users for some time."""

    name: str
    users: int
    kind: Kind
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The demand, and the most replicas."""

    phases: tuple[Phase, ...]
    talkers: int
    most: int
    rest_s: float
    """Longest wait at the end for the last replica but one to go."""
    patient_s: float = 0.0
    """Longest wait, once the long prompts' time is over, for all replicas to run."""


FULL = Plan(
    (
        Phase("few", 2, SHORT, 15),
        Phase("long", 14, LONG, 140),
        Phase("short", 14, SHORT, 60),
        Phase("few again", 2, SHORT, 10),
    ),
    talkers=4,
    most=4,
    rest_s=90,
)


def small(most: int) -> Plan:
    """Long prompts for `most` replicas, until they run, and then few."""
    users = round(3.5 * most)
    phases = (Phase("few", 2, SHORT, 5), Phase("long", users, LONG, 45), Phase("few again", 2, SHORT, 10))
    return Plan(phases, talkers=most + 1, most=most, rest_s=90, patient_s=200)


def stretched(plan: Plan, factor: float) -> Plan:
    """The same with all times longer."""
    phases = tuple(replace(phase, seconds=factor * phase.seconds) for phase in plan.phases)
    return replace(plan, phases=phases, rest_s=factor * plan.rest_s)


@dataclass
class Asked:
    """One request and what became of it."""

    phase: str
    begin: float
    first: float | None = None
    end: float | None = None
    failure: str | None = None
    """What went wrong before the answer began."""
    cut: str | None = None
    """What went wrong in a stream that had begun."""


@dataclass
class Watched:
    """What was seen of the deployment, by seconds since the start."""

    times: list[float] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    paid: list[int] = field(default_factory=list)
    """Replicas that hold resources: starting, running or stopping."""
    stopping: dict[str, tuple[float, float]] = field(default_factory=dict)
    """When a replica was first and last seen stopping."""
    counters: dict[str, dict[str, float]] = field(default_factory=dict)
    """Highest value of each series, by metric and labels; a replica's last ones stay."""
    admitted: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def total(self, metric: str, containing: str = "") -> float:
        """Sum over series."""
        return sum(value for labels, value in self.counters.get(metric, {}).items() if containing in labels)


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream.  Not by httpx's lines, which end at characters that answers to random tokens hold."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


class Load:
    """Users of one deployment."""

    def __init__(self, record: Record, watched: Watched) -> None:
        self.asked: list[Asked] = []
        self._record, self._watched = record, watched
        self._rng = random.Random(7)
        limits = httpx.Limits(max_connections=200)
        self._http = httpx.AsyncClient(base_url=record.url, timeout=300, trust_env=False, limits=limits)
        self._api = ServeApi(f"http://127.0.0.1:{record.dashboard_port}")
        self.begin = time.monotonic()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begin

    async def ask(self, phase: str, kind: Kind, prefix: Sequence[int] = ()) -> Asked:
        """One streamed answer, read to its end."""
        prompt = [*prefix, *(self._rng.randrange(10, 800) for _ in range(kind.prompt))]
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": kind.answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        asked = Asked(phase, self.now)
        self.asked.append(asked)
        usage: dict[str, Any] | None = None
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    asked.failure = f"status {response.status_code}: {(await response.aread())[:200]!r}"
                    return asked
                async for event in events(response):
                    if "error" in event:
                        asked.cut = str(event["error"])
                        return asked
                    if asked.first is None and event["choices"]:
                        asked.first = self.now
                    usage = event.get("usage") or usage
        except httpx.HTTPError as error:
            told = f"{type(error).__name__}: {error}"
            asked.failure, asked.cut = (told, None) if asked.first is None else (None, told)
            return asked
        if usage is None or usage["completion_tokens"] != kind.answer:
            asked.cut = f"ended after {usage and usage['completion_tokens']} of {kind.answer} tokens"
        asked.end = self.now
        return asked

    async def user(self, phase: Phase, over: asyncio.Event) -> None:
        """Ask again and again; the last answer is waited for."""
        while not over.is_set():
            await self.ask(phase.name, phase.kind)
            await asyncio.sleep(0.2)

    async def watch(self) -> None:
        """Replicas every half second, counters every two."""
        for tick in range(10**9):
            with suppress(httpx.HTTPError):
                state = await asyncio.to_thread(self._api.state, self._record.application)
                engines = {r.id: r.state for r in state.replicas if r.deployment.startswith("Engine:")}
                self._watched.times.append(self.now)
                self._watched.running.append(sum(each == "RUNNING" for each in engines.values()))
                self._watched.paid.append(len(engines))
                for replica in (replica for replica, each in engines.items() if each == "STOPPING"):
                    first, _ = self._watched.stopping.get(replica, (self.now, 0.0))
                    self._watched.stopping[replica] = (first, self.now)
            if tick % 4 == 0:
                with suppress(httpx.HTTPError):
                    await self.scrape()
            await asyncio.sleep(0.5)

    async def scrape(self) -> None:
        """Keep the highest value of each counter."""
        async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
            text = (await http.get(self._record.metrics_url)).text
        for metric in (ADMITTED, PREEMPTED, PREDICTED):
            series = self._watched.counters.setdefault(metric, {})
            for labels, value in re.findall(rf"^{metric}\{{(.*)\}} ([\d.e+]+)$", text, re.MULTILINE):
                series[labels] = max(series.get(labels, 0.0), float(value))
                if metric == ADMITTED and (replica := re.search(r'\breplica="([^"]*)"', labels)):
                    self._watched.admitted.setdefault(replica[1], []).append((self.now, float(value)))
        told = re.search(rf'^{FOLLOWED}\{{.*stream="in_order".*\}} ([\d.]+)$', text, re.MULTILINE)
        self.followed = int(float(told[1])) if told else 0

    async def settled(self) -> float:
        """Exact predictions and all of them, once all are told of."""
        before = -1.0
        while before != (before := self._watched.total(PREDICTED)):
            await asyncio.sleep(_LAG_S)
            await self.scrape()
        return before


async def drive(record: Record, plan: Plan, console: Console) -> dict[str, Any]:
    """The whole demand on one deployment."""
    watched = Watched()
    load = Load(record, watched)
    watching = asyncio.create_task(load.watch())
    talkers: list[asyncio.Task[Asked]] = []
    marks = []
    try:
        for phase in plan.phases:
            marks.append((load.now, phase.name))
            console.print(f"  {load.now:4.0f} s: {phase.users} users, prompts of {phase.kind.prompt} tokens")
            over = asyncio.Event()
            users = [asyncio.create_task(load.user(phase, over)) for _ in range(phase.users)]
            await asyncio.sleep(phase.seconds)
            if phase.kind is LONG:
                latest = load.now + plan.patient_s
                while load.now < latest and watched.running[-1] < plan.most:
                    await asyncio.sleep(0.5)
                if plan.patient_s:
                    await asyncio.sleep(20)  # the newest is given its share by then (`jenga.routing.slow_start`)
                # They are spread over all replicas, and outlast the phase.
                talkers += [asyncio.create_task(load.ask("talk", TALK)) for _ in range(plan.talkers)]
                await asyncio.sleep(3)
            over.set()
            await asyncio.gather(*users)
        last, until = plan.phases[-1], load.now + plan.rest_s
        while load.now < until and (watched.running[-1] > 1 or watched.paid[-1] > 1):
            await asyncio.gather(*(load.ask(last.name, last.kind) for _ in range(last.users)))
        await asyncio.gather(*talkers)
        quiet = load.now
        marks.append((quiet, "one by one"))
        # The streams' predictions have been told by then; what follows is one at a time.
        await load.settled()
        before = {outcome: watched.total(PREDICTED, f'outcome="{outcome}"') for outcome in ("exact", "over", "under")}
        heads = [[random.Random(n).randrange(10, 800) for _ in range(320)] for n in range(6)]
        for number in range(60):
            await load.ask("afterwards", Kind(40, 8), heads[number % len(heads)])
        await load.settled()
        outcomes = {name: int(watched.total(PREDICTED, f'outcome="{name}"') - count) for name, count in before.items()}
    finally:
        watching.cancel()
    return summary(load, watched, marks, outcomes, quiet)


def replica_seconds(watched: Watched, quiet: float) -> float:
    """Seconds times replicas that held resources."""
    total = 0.0
    for begin, end, count in zip(watched.times, watched.times[1:], watched.paid, strict=False):
        total += count * (min(end, quiet) - begin) if begin < quiet else 0.0
    return total


def until(watched: Watched, after: float, replicas: int) -> float | None:
    """Seconds from `after` until that many run for the first time, None if they never do."""
    seen = zip(watched.times, watched.running, strict=True)
    return next((round(at - after, 1) for at, running in seen if at >= after and running >= replicas), None)


def until_one(watched: Watched, after: float) -> float | None:
    """Seconds from `after` until one runs and no second one any more, None if that never comes."""
    if watched.running[-1] > 1:
        return None
    last = max((at for at, running in zip(watched.times, watched.running, strict=True) if running > 1), default=after)
    return round(max(0.0, last - after), 1)


def late(watched: Watched) -> int:
    """Requests that replicas took in although they had been stopping for a while, as far as reports can tell."""
    found = 0.0
    for replica, (since, last) in watched.stopping.items():
        values = [value for at, value in watched.admitted.get(replica, []) if since + _LAG_S <= at <= last]
        found += max(values) - min(values) if values else 0.0
    return int(found)


def summary(
    load: Load, watched: Watched, marks: list[tuple[float, str]], outcomes: dict[str, int], quiet: float
) -> dict[str, Any]:
    """The figures of one run."""
    starts = {name: at for at, name in reversed(marks)}
    top = max(watched.running)
    drained = {replica: last - first for replica, (first, last) in watched.stopping.items()}
    talks = [asked for asked in load.asked if asked.phase == "talk" and asked.end is not None]
    in_demand = [asked for asked in load.asked if asked.begin < quiet]
    return {
        "requests": len(load.asked),
        "failed": [asked.failure for asked in load.asked if asked.failure],
        "cut": [asked.cut for asked in load.asked if asked.cut],
        "most_running": top,
        "seconds_to_most": until(watched, starts["long"], top),
        "seconds_to_second": until(watched, starts["long"], 2),
        "left_running": watched.running[-1],
        "seconds_to_one": until_one(watched, starts["few again"]),
        "longest_drain_s": round(max(drained.values(), default=0.0), 1),
        "longest_stream_s": round(max((asked.end - asked.begin for asked in talks if asked.end), default=0.0), 1),
        "admitted_while_stopping": late(watched),
        "replica_seconds": round(replica_seconds(watched, quiet)),
        "seconds": round(quiet),
        "preemptions": int(watched.total(PREEMPTED)),
        "ttft_ms": {
            name or "all": wait
            for name in (None, "long", "short", "few again")
            if (wait := ttft(in_demand, name)) is not None
        },
        "afterwards": outcomes,
        "streams_followed_at_the_end": load.followed,
        "load_average": round(os.getloadavg()[0], 1),
        "marks": [(round(at, 1), name) for at, name in marks],
        "timeline": {
            "seconds": [round(at, 1) for at in watched.times],
            "running": watched.running,
            "paid": watched.paid,
        },
        "answered": [
            (round(asked.begin, 1), asked.phase, round(1000 * (asked.first - asked.begin)))
            for asked in in_demand
            if asked.first is not None
        ],
    }


def ttft(asked: Sequence[Asked], phase: str | None) -> dict[str, float] | None:
    """p50 and p99 in milliseconds, None of too few."""
    waits = [each.first - each.begin for each in asked if each.first is not None and phase in (None, each.phase)]
    if len(waits) < 2:
        return None
    cuts = quantiles(waits, n=100, method="inclusive")
    return {"p50": round(1000 * cuts[49]), "p99": round(1000 * cuts[98]), "requests": len(waits)}


def start(signal: str, plan: Plan, folder: Path, console: Console) -> Record:
    """Serve with one replica; the caller stops it."""
    # A step's prompt tokens need memory in every window: with vLLM's 2,048, one prompt would fill a replica.
    step = {"max_num_batched_tokens": 256}
    engine = {"max_model_len": 4096, "kv_memory": KV_MEMORY, "max_num_seqs": 64, "extra": step}
    replicas = {"min": 1, "max": plan.most, **DELAYS, **SIGNALS[signal]}
    return demo.serve(folder, console, engine, replicas=replicas, stream_batch_ms=100)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| signal | replicas, most | requests | failed | streams cut | s to most | s to one | replica-seconds "
        "| preemptions | TTFT p50/p99 (ms), all | long prompts | short prompts | exact afterwards |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        waits = [run["ttft_ms"].get(phase) for phase in ("all", "long", "short")]
        shown = ["-" if wait is None else f"{wait['p50']:,}/{wait['p99']:,}" for wait in waits]
        after = run["afterwards"]
        lines.append(
            f"| {name} | {run['most_running']} | {run['requests']:,} | {len(run['failed'])} | {len(run['cut'])} "
            f"| {run['seconds_to_most']} | {run['seconds_to_one']} | {run['replica_seconds']:,} of {run['seconds']} s "
            f"| {run['preemptions']:,} | {' | '.join(shown)} | {after['exact']} of {sum(after.values())} |"
        )
    return "\n".join(lines)


def faults(run: dict[str, Any], most: int) -> Iterator[str]:
    """What must not happen."""
    yield from (f"failed: {what}" for what in run["failed"])
    yield from (f"cut: {what}" for what in run["cut"])
    if run["most_running"] < most:
        yield f"{run['most_running']} replicas ran at most, of {most}"
    if run["left_running"] != 1 or run["streams_followed_at_the_end"] != 1:
        yield f"{run['left_running']} replicas left, {run['streams_followed_at_the_end']} in the router's index"
    if run["admitted_while_stopping"]:
        yield f"{run['admitted_while_stopping']} requests went to replicas that were stopping"
    after = run["afterwards"]
    if after["over"] or after["under"] or after["exact"] < 60:
        yield f"predictions afterwards: {after}"


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Replicas and waits over time, one row for each signal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(results), 1, figsize=(9, 0.5 + 2.6 * len(results)), sharex=True, squeeze=False)
    for (name, run), (axis,) in zip(results.items(), rows, strict=True):
        times = run["timeline"]["seconds"]
        axis.step(
            times, run["timeline"]["paid"], where="post", color="0.75", label="replicas, starting and stopping too"
        )
        axis.step(times, run["timeline"]["running"], where="post", color="tab:blue", label="replicas that run")
        most = max(run["timeline"]["paid"])
        axis.set(ylabel=f"replicas ({name})", ylim=(-0.5, most + 0.5), yticks=range(most + 1), xlim=(0, times[-1]))
        waits = axis.twinx()
        waits.plot(
            [at for at, *_ in run["answered"]],
            [wait / 1000 for *_, wait in run["answered"]],
            ".",
            ms=2,
            color="tab:red",
        )
        waits.set(yscale="log", ylabel="s to first token")
        waits.yaxis.label.set_color("tab:red")
        for at, phase in run["marks"]:
            axis.axvline(at, color="0.9", zorder=0)
            axis.annotate(
                phase,
                (at, 0),
                xycoords=("data", "axes fraction"),
                xytext=(2, 2),
                textcoords="offset points",
                rotation=90,
                fontsize=7,
            )
    rows[0][0].legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    rows[-1][0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", nargs="+", choices=list(SIGNALS), default=list(SIGNALS))
    parser.add_argument("--small", action="store_true", help="kv-memory alone, until all replicas run, and back")
    parser.add_argument("--most", type=int, default=2, help="replicas of --small")
    parser.add_argument("--stretch", type=float, default=1, help="factor on the demand's times, for slow machines")
    parser.add_argument("--check", action="store_true", help="status 1 if anything went wrong")
    parser.add_argument("--json", type=Path, help="added to what the file has of other signals")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    console = Console(stderr=True)
    # Ray's metrics are ten seconds old by default.
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112  # Ray's own spelling
    plan = stretched(small(options.most) if options.small else FULL, options.stretch)
    results: dict[str, dict[str, Any]] = {}
    if options.json and options.json.is_file():
        results = json.loads(options.json.read_text())["results"]
    wrong = []
    for signal in ["kv-memory"] if options.small else options.signals:
        with tempfile.TemporaryDirectory(prefix="scaling-") as made:
            folder = Path(made)
            try:
                results[signal] = asyncio.run(drive(start(signal, plan, folder, console), plan, console))
            finally:
                demo.stop(folder)
        print(table({signal: results[signal]}), flush=True)
        wrong += [f"{signal}: {what}" for what in faults(results[signal], plan.most if signal == "kv-memory" else 1)]
        if options.json:
            save(options.json, results, plan)
    if options.plot:
        plot(results, options.plot)
    print(table(results))
    for what in wrong:
        console.print(what, style="red", highlight=False)
    sys.exit(1 if options.check and wrong else 0)


def save(path: Path, results: dict[str, Any], plan: Plan) -> None:
    """All results with what they were measured on."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    told = {
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "kv_memory": KV_MEMORY,
        "delays": DELAYS,
        "phases": [asdict(phase) for phase in plan.phases],
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
