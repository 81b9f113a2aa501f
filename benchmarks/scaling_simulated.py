"""Signals of autoscaling beside each other on simulated GPU engines, which take minutes to start.

    python benchmarks/scaling_simulated.py [--json FILE]

Gemma-3-27B with 16 GiB of KV memory a replica: chats, then more and more documents, then many chats, then few. The
engines are those of `jenga simulate` (a roofline of an H100), the decisions are made by the deployed policy and by Ray
Serve's own, both behind Ray's delays and bounds. Requests go to the shortest queue, new replicas start slowly
(`jenga.routing.slow_start`), stopping ones end their answers. No two prompts share anything. Figures are means over
seeds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import mean, quantiles
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig
from rich.console import Console
from rich.progress import track
from zoo import PARAMETERS

from deployments.app import autoscaling
from deployments.autoscaling import ADMITTED, KV_IN_USE, RESIDENT, WAITING, KvMemoryPolicy
from deployments.config import Autoscaling, KvMemory, OngoingRequests
from jenga.models import load_model
from jenga.routing.slow_start import SlowStart
from jenga.simulate import StepCost, plan_for
from jenga.simulate.engine import Limits, Simulation
from jenga.traces import TraceRequest

MODEL, MEMORY, MOST = "gemma-3-27b", 16 << 30, 8
START_S, TICK_S, LOOK_BACK_S, DOWN_S, SLOW_START_S = 120.0, 5.0, 30.0, 300.0, 30.0
# At a time (seconds), short and long requests per second; straight lines between.
DEMAND = (
    (0, 3.0, 0.0),
    (300, 3.0, 0.0),
    (1200, 2.0, 0.8),
    (1500, 2.0, 0.8),
    (1800, 14.0, 0.0),
    (2400, 14.0, 0.0),
    (2700, 2.0, 0.0),
    (3300, 2.0, 0.0),
)
SHORT, LONG, ANSWER = (64, 512), (16_384, 32_768), (100, 400)
BOUNDS: dict[str, Any] = {"min": 1, "max": MOST, "look_back_s": LOOK_BACK_S, "downscale_delay_s": DOWN_S}
SIGNALS: dict[str, Autoscaling] = {
    "kv-memory": KvMemory(**BOUNDS),
    "kv-memory, kv_target 0.5": KvMemory(kv_target=0.5, **BOUNDS),
    **{f"{n} requests": OngoingRequests(signal="requests", target_ongoing_requests=n, **BOUNDS) for n in (4, 16, 64)},
}


def requests(seed: int) -> list[TraceRequest]:
    """Poisson arrivals at the rates of `DEMAND`."""
    rng = random.Random(seed)
    found = []
    for (begin, *first), (end, *last) in pairwise(DEMAND):
        for low, high, lengths in zip(first, last, (SHORT, LONG), strict=True):
            most, now = max(low, high), float(begin)
            while most and (now := now + rng.expovariate(most)) < end:
                if rng.random() * most < low + (high - low) * (now - begin) / (end - begin):
                    found.append(TraceRequest(0, now, rng.randint(*lengths), rng.randint(*ANSWER), (), 512, 0))
    found.sort(key=lambda request: request.arrival_s)
    return [replace(request, serial=serial) for serial, request in enumerate(found)]


@dataclass
class Replica:
    """An engine, from its being asked for to its end."""

    number: int
    asked: float
    ready: float
    engine: Simulation
    stopping: bool = False
    ended: float | None = None
    submitted: int = 0
    seen: deque[tuple[float, int, int, int]] = field(default_factory=lambda: deque(maxlen=round(LOOK_BACK_S / TICK_S)))
    """KV memory in use, residents, waiting ones, and all that were admitted, every tick."""

    def average(self, part: int) -> float:
        """Over the look-back time."""
        return mean(each[part] for each in self.seen)


class Cluster:
    """Replicas that a policy starts and stops."""

    def __init__(self, settings: Autoscaling) -> None:
        spec = load_model(MODEL)
        kinds = [k if k.is_state else replace(k, block_tokens=max(64, k.block_tokens)) for k in spec.layer_types()]
        billions, active = PARAMETERS[MODEL]
        cost = StepCost(weight_bytes=2e9 * billions, active_parameters=1e9 * active)
        self._make = lambda: Simulation(
            plan_for("jenga", spec.name, kinds, MEMORY, ()),
            kinds,
            cost=cost,
            limits=Limits(sequences=256, prefix_caching=False),
            watch=self,
            sampling=False,
        )
        config = AutoscalingConfig(**autoscaling(settings))
        own = KvMemoryPolicy(**config.policy.policy_kwargs) if isinstance(settings, KvMemory) else None
        core = own or autoscaling_policy.replica_queue_length_autoscaling_policy
        self._config, self._policy = config, autoscaling_policy._apply_autoscaling_config(core)
        self._state: dict[str, Any] = {}
        self._target = 1
        self._now = 0.0
        self._slow: SlowStart[int] = SlowStart(SLOW_START_S, lambda: self._now)
        self.ttft: dict[int, float] = {}
        self.replicas = [Replica(0, 0.0, 0.0, self._make())]

    # What engines tell (`jenga.simulate.engine.Watch`).
    def admitted(self, serial: int, hit_tokens: int) -> None:
        """Nothing to note."""

    def first_token(self, serial: int, seconds: float) -> None:
        """Of one request."""
        self.ttft[serial] = seconds

    def finished(self, serial: int, rejected: bool) -> None:
        """Nothing to note, as every request fits."""
        if rejected:
            raise RuntimeError(f"request {serial} does not fit into an empty replica")

    def present(self) -> list[Replica]:
        """Those that run or start and are not to stop."""
        return [each for each in self.replicas if not each.stopping]

    def run(self, trace: Sequence[TraceRequest]) -> None:
        """Serve everything."""
        tick = 0.0
        for request in trace:
            while tick <= request.arrival_s:
                self._decide(tick)
                tick += TICK_S
            self._advance(request.arrival_s)
            running = {each.number: each for each in self.present() if each.ready <= request.arrival_s}
            self._slow.keep(running)
            queues = {number: each.engine.queue for number, each in running.items()}
            chosen = min(self._slow.open(queues), key=lambda number: queues[number])
            running[chosen].engine.submit(request)
            running[chosen].submitted += 1
        self._advance(inf)
        last = max(self._now, DEMAND[-1][0])
        for each in self.replicas:
            each.ended = last if each.ended is None else each.ended

    def _advance(self, now: float) -> None:
        self._now = now if now < inf else self._now
        for each in self.replicas:
            if each.ended is None:
                each.engine.advance(now)
                if each.stopping and not each.engine.queue:
                    each.ended = self._now

    def _decide(self, now: float) -> None:
        self._advance(now)
        running = [each for each in self.present() if each.ready <= now]
        for each in running:
            engine = each.engine
            admitted = each.submitted - engine.waiting + engine.preemptions
            each.seen.append((engine.used, engine.queue - engine.waiting, engine.waiting, admitted))
        names = [each.number for each in running]
        told = {
            name: {each.number: each.average(part) for each in running}
            for part, name in enumerate((KV_IN_USE, RESIDENT, WAITING))
        }
        points = {
            name: {each.number: [SimpleNamespace(value=seen[part]) for seen in each.seen] for each in running}
            for part, name in ((2, WAITING), (3, ADMITTED))
        }
        context: Any = SimpleNamespace(
            aggregated_metrics=told,
            raw_metrics=points,
            running_replicas=names,
            current_num_replicas=len(names),
            target_num_replicas=self._target,
            total_num_requests=sum(each.average(1) + each.average(2) for each in running),
            config=self._config,
            policy_state=self._state,
        )
        with patch.object(autoscaling_policy, "time", SimpleNamespace(time=lambda: now)):
            wanted, self._state = self._policy(context)
        self._target = max(1, min(MOST, wanted))
        present = self.present()
        for number in range(len(self.replicas), len(self.replicas) + self._target - len(present)):
            self.replicas.append(Replica(number, now, now + START_S, self._make()))
        # As Ray does: those that still start, then the newest.
        for each in sorted(present, key=lambda r: (r.ready <= now, -r.number))[: max(0, len(present) - self._target)]:
            each.stopping = True


def one(settings: Autoscaling, seed: int) -> dict[str, float]:
    """The figures of one run."""
    trace = requests(seed)
    cluster = Cluster(settings)
    cluster.run(trace)
    found: dict[str, float] = {"requests": len(trace)}
    kinds = {
        "all": lambda _: True,
        "short": lambda r: r.prompt_tokens <= SHORT[1],
        "long": lambda r: r.prompt_tokens > SHORT[1],
    }
    for name, wants in kinds.items():
        cuts = quantiles([cluster.ttft[r.serial] for r in trace if wants(r)], n=100, method="inclusive")
        found |= {f"{name} p50": cuts[49], f"{name} p99": cuts[98]}
    found["replica_s"] = sum((each.ended or 0.0) - each.asked for each in cluster.replicas)
    found["preemptions"] = sum(each.engine.preemptions for each in cluster.replicas)
    edges = sorted({each.asked for each in cluster.replicas})
    found["most"] = max(sum(e.asked <= at and (e.ended or inf) > at for e in cluster.replicas) for at in edges)
    return found


def table(results: dict[str, dict[str, float]]) -> Iterator[str]:
    """The results in Markdown."""
    yield "| signal | replicas, most | replica-seconds | TTFT p50/p99 (s), all | short | long | preemptions |"
    yield "|---|---|---|---|---|---|---|"
    for name, run in results.items():
        waits = [f"{run[f'{kind} p50']:.2f}/{run[f'{kind} p99']:.1f}" for kind in ("all", "short", "long")]
        spent = f"{run['most']:.1f} | {run['replica_s']:,.0f}"
        yield f"| {name} | {spent} | {' | '.join(waits)} | {run['preemptions']:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(stderr=True)
    results: dict[str, dict[str, float]] = {}
    for name, settings in SIGNALS.items():
        runs = [one(settings, seed) for seed in track(range(options.seeds), description=name, console=console)]
        results[name] = {key: mean(run[key] for run in runs) for key in runs[0]}
    print("\n".join(table(results)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"seeds": options.seeds, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
