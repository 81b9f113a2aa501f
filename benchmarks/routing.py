"""Routers compared on two real CPU replicas: are their promises kept, and what do they save?

    python benchmarks/routing.py [--models gemma3-recall granite-hybrid qwen3-next] [--requests 1000] [--load 300]
                                 [--seeds 1 2 3] [--dynamo FOLDER] [--json results/routing.json]

For each model one deployment is started (`jenga serve` with `benchmarks.routing_peers:build`): two engines, the
product's ingress, and every router; a request names its router.  Before each run all prefix caches are emptied.  The
requests are the same for every router: chats about shared system prompts and tables, to several depths.  KV memory is
so short that cached pages are evicted all the time.

- Sequential: is the router's promise what the engine then has (`ray_jenga_router_predictions_total`)?
- 32 at a time, once for each seed: the same, and tokens of prompt computed, time to first token at the client, spread
  over replicas.  Who comes first changes from seed to seed, since a shared machine is not always as quick.

Prices of the router were tuned on seeds 11 and 12; the default seeds are others.

`--dynamo` is a folder with `ai-dynamo-runtime` (``pip install --no-deps --target FOLDER ai-dynamo-runtime``), the index
inside Ray's KVAwareRouter, which is left out without it.
"""

from __future__ import annotations

import argparse
import asyncio
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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import httpx
import yaml
from rich.console import Console
from rich.progress import Progress

from deployments.config import load
from deployments.local import launch
from deployments.local.ports import free_ports
from deployments.local.record import Record
from jenga.demo import recall

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"gemma3-recall": "demo", "granite-hybrid": "granite-hybrid", "qwen3-next": "qwen3-next"}
OURS, AFFINITY, LEAST_LOADED = "cache-aware", "prefix-affinity", "least-loaded"
RAY_PREFIX, RAY_KV = "ray PrefixCacheAffinityRouter", "ray KVAwareRouter"
PROMISING = (OURS, RAY_PREFIX, RAY_KV)
SYSTEMS, TABLES, MAX_TOKENS, CONCURRENCY = 4, 48, 8, 32
KV_MEMORY = {"gemma3-recall": "24MiB", "granite-hybrid": "24MiB", "qwen3-next": "24MiB"}

Chat = list[dict[str, str]]


def workload(requests: int, seed: int) -> list[Chat]:
    """Chats that share prefixes: a system prompt, half a table, a table, a table and a question, whole prompts."""
    rng = random.Random(f"routing {seed}")
    systems = [recall.table(1000 + number, 32).text for number in range(SYSTEMS)]
    chats: list[Chat] = []
    for _ in range(requests):
        # A few tables are asked about all the time, most seldom.
        number = min(int(rng.paretovariate(0.9)) - 1, TABLES - 1) if rng.random() < 0.7 else rng.randrange(TABLES)
        table = recall.table(seed * 1000 + number, 60 + number * 37 % 100)
        kind = rng.random()
        if kind < 0.1 and chats:
            chats.append(rng.choice(chats[-40:]))
            continue
        if kind < 0.25:  # another end to the same first half
            half = len(table.pairs) // 2
            table = recall.Table(table.pairs[:half] + recall.table(rng.randrange(10**6), 100).pairs[:half])
        asked = table.ask(rng.randrange(len(table.pairs)))
        chat = [{"role": "system", "content": systems[number % SYSTEMS]}, {"role": "user", "content": asked.text}]
        if kind > 0.8:  # a second turn
            key, _ = rng.choice(table.pairs)
            chat += [{"role": "assistant", "content": asked.answer}, {"role": "user", "content": f"? {key}="}]
        chats.append(chat)
    return chats


@dataclass(frozen=True)
class Answered:
    """What one request was and took."""

    prompt: int
    cached: int
    first_token_s: float
    whole_s: float


@dataclass(frozen=True)
class Deployment:
    """What runs, and how to ask it."""

    model: str
    record: Record

    async def ask(self, client: httpx.AsyncClient, router: str, chat: Chat) -> Answered:
        body = {
            "model": self.model,
            "user": router,
            "messages": chat,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begin = time.perf_counter()
        first, usage = None, None
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{router}: status {response.status_code}: {(await response.aread())[:300]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"{router}: {event['error']}")
                if first is None and event["choices"]:
                    first = time.perf_counter() - begin
                usage = event.get("usage") or usage
        if usage is None or first is None:
            raise RuntimeError(f"{router}: an answer without a token or without its usage")
        details = usage["prompt_tokens_details"] or {}
        return Answered(usage["prompt_tokens"], details.get("cached_tokens") or 0, first, time.perf_counter() - begin)

    async def ask_all(
        self, router: str, chats: Sequence[Chat], concurrency: int, progress: Progress, title: str
    ) -> tuple[list[Answered], float]:
        """All answers, and the seconds that they took."""
        task = progress.add_task(title, total=len(chats))
        waiting, answers = iter(chats), []
        limits = httpx.Limits(max_connections=concurrency)
        async with httpx.AsyncClient(base_url=self.record.url, timeout=300, trust_env=False, limits=limits) as client:

            async def work() -> None:
                for chat in waiting:
                    answers.append(await self.ask(client, router, chat))
                    progress.advance(task)

            begin = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(concurrency)))
            seconds = time.perf_counter() - begin
        progress.remove_task(task)
        return answers, seconds

    def empty_caches(self) -> None:
        httpx.post(
            f"{self.record.url}/reset_prefix_cache", json={"model": self.model}, timeout=60, trust_env=False
        ).raise_for_status()

    def counters(self) -> Counter[tuple[str, str]]:
        """Counters of the metrics endpoint, by name and by the label that matters here."""
        text = httpx.get(self.record.metrics_url, timeout=120, trust_env=False).text
        found: Counter[tuple[str, str]] = Counter()
        for name, label in COUNTED.items():
            for labels, value in re.findall(rf"^{name}\{{(.*)\}} ([\d.e+]+)$", text, re.MULTILINE):
                key = re.search(rf'\b{label}="([^"]*)"', labels)
                found[name, key[1] if key else ""] += float(value)  # type: ignore[assignment]  # a count
        return found

    async def settled(self) -> Counter[tuple[str, str]]:
        """The counters once they have stood still, since they are reported with a delay."""
        before, since, end = self.counters(), time.monotonic(), time.monotonic() + 60
        while time.monotonic() - since < 4:
            await asyncio.sleep(1)
            now = self.counters()
            if now != before:
                before, since = now, time.monotonic()
            if time.monotonic() > end:
                raise RuntimeError("the counters never stand still: somebody else asks")
        return before


PREDICTIONS = "ray_jenga_router_predictions_total"
REQUESTS = "ray_vllm_request_success_total"
PROMPT_TOKENS, HIT_TOKENS = "ray_vllm_prompt_tokens_total", "ray_jenga_hit_tokens_total"
EVICTED = "ray_jenga_evicted_pages_total"
FALLBACKS = "ray_jenga_router_fallbacks_total"
COUNTED = {
    PREDICTIONS: "outcome",
    REQUESTS: "ReplicaId",
    PROMPT_TOKENS: "ReplicaId",
    HIT_TOKENS: "replica",
    EVICTED: "group",
    FALLBACKS: "reason",
}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{n}": round(1000 * cuts[n - 1], 1) for n in (50, 90, 99)}


async def measure(
    deployment: Deployment, router: str, chats: Sequence[Chat], concurrency: int, progress: Progress
) -> dict[str, Any]:
    """One run from empty caches."""
    deployment.empty_caches()
    # The first requests tell routers that the caches are empty; Ray's tracker starts with the first one it sees.
    warm = [[{"role": "user", "content": f"{number} {router}"}] for number in range(4)]
    title = f"{deployment.model}, {router}, {concurrency} at a time"
    for chat in warm:
        await deployment.ask_all(router, [chat], 1, progress, title)
    await asyncio.sleep(1)
    before = await deployment.settled()
    answers, seconds = await deployment.ask_all(router, chats, concurrency, progress, title)
    told = await deployment.settled()
    told.subtract(before)
    outcomes = {outcome: int(told[PREDICTIONS, outcome]) for outcome in ("exact", "over", "under")}
    promised = sum(outcomes.values())
    requests = {replica: int(n) for (name, replica), n in told.items() if name == REQUESTS and replica}
    computed = {
        replica: int(told[PROMPT_TOKENS, replica] - told[HIT_TOKENS, replica])
        for name, replica in told
        if name == PROMPT_TOKENS and replica
    }
    prompt, cached = sum(a.prompt for a in answers), sum(a.cached for a in answers)
    return {
        "router": router,
        "concurrency": concurrency,
        "requests": len(answers),
        "outcomes": outcomes if router in PROMISING else None,
        "exact_share": round(outcomes["exact"] / promised, 5) if router in PROMISING and promised else None,
        "promised_requests": promised if router in PROMISING else None,
        "prompt_tokens": prompt,
        "computed_tokens": prompt - cached,
        "ttft_ms": quantiles([a.first_token_s for a in answers]),
        "latency_ms": quantiles([a.whole_s for a in answers]),
        "seconds": round(seconds, 2),
        "requests_per_s": round(len(answers) / seconds, 2),
        "requests_by_replica": sorted(requests.values()),
        "computed_by_replica": sorted(computed.values()),
        "evicted_pages": {g: int(n) for (name, g), n in told.items() if name == EVICTED and n},
        "fallbacks": {r: int(n) for (name, r), n in told.items() if name == FALLBACKS and n},
        "load_average": round(os.getloadavg()[0], 1),
    }


def start(model: str, folder: Path, memory: str, console: Console) -> Deployment:
    """Serve `model` with all routers; the caller stops it."""
    port, dashboard, metrics = free_ports(3)
    data = yaml.safe_load((ROOT / "configs" / f"{CONFIGS[model]}.yaml").read_text())
    data["http_options"]["port"] = port
    args = data["applications"][0]["args"]
    args["model"]["path"] = str(ROOT / "var" / "models" / model)
    args["engine"]["kv_memory"] = memory
    # Dynamo's index knows blocks by the tokens in the events, which the product leaves out.
    args["engine"]["extra"] = {"additional_config": {"jenga": {"events": {"contents": True}}}}
    file = folder / f"{model}.yaml"
    file.write_text(yaml.safe_dump(data))
    ready = load(file)
    application = ready.application.model_copy(update={"import_path": "benchmarks.routing_peers:build"})
    ready = ready.model_copy(update={"applications": [application]})
    options = launch.Options(None, None, dashboard, metrics, True, 400)
    with patch.object(launch, "load", return_value=ready):
        return Deployment(model, launch.serve(file, options, console, folder / "run"))


async def compare(
    deployment: Deployment,
    routers: Sequence[str],
    requests: int,
    load: int,
    seeds: Sequence[int],
    progress: Progress,
) -> list[dict[str, Any]]:
    """All runs on one deployment; without `requests` none one at a time."""
    runs = []
    if requests:
        chats = workload(max(requests, load), seeds[0])
        runs.append(await measure(deployment, OURS, chats[:requests], 1, progress))
        for router in routers:
            if router in PROMISING and router != OURS:
                runs.append(await measure(deployment, router, chats[: load // 2], 1, progress))
    for number, seed in enumerate(seeds):
        chats = workload(load, seed)
        turn = number % len(routers)
        for router in (*routers[turn:], *routers[:turn]):
            runs.append(await measure(deployment, router, chats, CONCURRENCY, progress) | {"seed": seed})
    return runs


def grouped(runs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs of one router at one concurrency together."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["router"], run["concurrency"]), []).append(run)
    return list(groups.values())


def tables(results: dict[str, list[dict[str, Any]]]) -> str:
    """The results in Markdown."""
    lines = ["| model | router | at a time | requests | exact | over | under |", "|---|---|---|---|---|---|---|"]
    for model, runs in results.items():
        for group in grouped(runs):
            if group[0]["outcomes"]:
                outcomes = Counter[str]()
                for run in group:
                    outcomes.update(run["outcomes"])
                total = outcomes.total()
                share = f"{100 * outcomes['exact'] / total:.1f} %" if total else "-"
                lines.append(
                    f"| {model} | {group[0]['router']} | {group[0]['concurrency']} | {total} | {share} "
                    f"| {outcomes['over']} | {outcomes['under']} |"
                )
    lines += [
        "",
        "| model | router | tokens computed, by seed | median | TTFT p50/p90/p99 (ms, medians) | requests/s "
        "| busiest replica's tokens over the mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, runs in results.items():
        for group in grouped(runs):
            if group[0]["concurrency"] > 1:
                group.sort(key=lambda run: run["seed"])
                times = "/".join(f"{median(run['ttft_ms'][p] for run in group):.0f}" for p in ("p50", "p90", "p99"))
                spread = median(max(run["computed_by_replica"]) / fmean(run["computed_by_replica"]) for run in group)
                tokens = ", ".join(f"{run['computed_tokens']:,}" for run in group)
                lines.append(
                    f"| {model} | {group[0]['router']} | {tokens} "
                    f"| {median(run['computed_tokens'] for run in group):,.0f} | {times} "
                    f"| {median(run['requests_per_s'] for run in group):.1f} | {spread:.2f} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--routers", nargs="+", choices=[OURS, AFFINITY, LEAST_LOADED, RAY_PREFIX, RAY_KV])
    parser.add_argument(
        "--requests", type=int, default=1000, help="sequential requests to the cache-aware router; 0: none at all"
    )
    parser.add_argument(
        "--load", type=int, default=300, help="requests of runs at 32 at a time; half of it, peers one by one"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--kv-memory", help="KV memory of each replica, such as 12MiB")
    parser.add_argument("--dynamo", type=Path, help="folder with ai-dynamo-runtime")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(stderr=True)
    paths = [str(options.dynamo.absolute())] if options.dynamo else []
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Ray's metrics are ten seconds old by default, and every run waits for them twice.
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112  # Ray's own spelling
    routers = options.routers or [OURS, AFFINITY, LEAST_LOADED, RAY_PREFIX, *([RAY_KV] if options.dynamo else [])]
    results = {}
    began = time.monotonic()
    for model in options.models:
        memory = options.kv_memory or KV_MEMORY[model]
        with tempfile.TemporaryDirectory(prefix="routing-") as made:
            folder = Path(made)
            try:
                deployment = start(model, folder, memory, console)
                with Progress(console=console, transient=True) as progress:
                    results[model] = asyncio.run(
                        compare(deployment, routers, options.requests, options.load, options.seeds, progress)
                    )
            finally:
                launch.stop(folder / "run")
        print(tables({model: results[model]}), flush=True)
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps(
                {
                    "commit": commit,
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
                    "seconds": round(time.monotonic() - began),
                    "kv_memory": {model: options.kv_memory or KV_MEMORY[model] for model in options.models},
                    "max_tokens": MAX_TOKENS,
                    "results": results,
                },
                indent=1,
            )
            + "\n"
        )
    sys.stderr.write(f"{time.monotonic() - began:.0f} s in all\n")


if __name__ == "__main__":
    main()
