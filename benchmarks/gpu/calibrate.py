"""`jenga simulate` against a run of `throughput`: its step's constants from that run, then the same clients simulated.

What a step takes beyond the roofline is fitted, per model: a constant, the least time of a step with prompt tokens, and
something for each running request.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import models, serve, throughput
from benchmarks.gpu.workloads import Workload
from jenga.checkpoints import GPU_PASS_TOKENS, PASS_TOKENS
from jenga.hf_config import from_hf_config
from jenga.layers import LayerType
from jenga.simulate import Limits, Simulation, SimulationResult, StepCost
from jenga.strategies import Plan, make_plan
from jenga.traces import TraceRequest

RATES = [1e13 * each for each in range(30, 99, 3)]
"""Arithmetic rates to choose from; an H100's peak is 9.9e14."""
LAUNCHES = [1e-3 * each for each in range(0, 81, 2)]
"""Least times of a step with prompt tokens to choose from."""
BLOCK_TOKENS = 16
STRATEGIES = {
    "jenga": "jenga",
    f"jenga, pass_tokens {PASS_TOKENS}": "jenga",
    "stock": "vllm",
    "stock, no caching": "vllm",
    "hybrid manager off": "paged",
}
FLOAT32_STATES = ("nemotron-h-8b", "kimi-linear-48b")
"""What vLLM keeps in float32 unless told otherwise; other models' states have the model's type."""


def fit(rows: Iterable[dict[str, Any]], types: Sequence[LayerType], weight_bytes: float) -> tuple[StepCost, float]:
    """Constants of one dense bfloat16 model from all its steps, and the mean error of the runs' times.

    Raises:
        ValueError: no run has its steps.
    """
    runs = [steps for row in rows for run in row["runs"] if (steps := Steps.of(run, types))]
    if not runs:
        raise ValueError("this run has no times of steps; run `throughput` again")
    host = np.array([(len(run.running) / run.seconds, run.running.sum() / run.seconds) for run in runs])
    best: tuple[float, StepCost] | None = None
    for flops, launches in itertools.product(RATES, LAUNCHES):
        cost = StepCost(
            weight_bytes=weight_bytes,
            active_parameters=weight_bytes / 2,
            flops_per_s=flops,
            prefill_s=launches,
        )
        device = np.array([run.device(cost).sum() / run.seconds for run in runs])
        overhead, request = not_negative(host, 1 - device)
        error = float(np.abs(device + host @ (overhead, request) - 1).mean())
        if best is None or error < best[0]:
            best = error, replace(cost, overhead_s=max(float(overhead), 1e-6), request_s=float(request))
    assert best is not None
    return best[1], best[0]


@dataclass(frozen=True)
class Steps:
    """A run's steps: arrays with an item for each."""

    running: np.ndarray
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    cache_bytes: np.ndarray
    """What a step reads of the caches, if its requests are as long as half-answered ones are on average."""
    seconds: float
    """All of them together.  With async scheduling, a step's own end is reported some steps later."""

    @classmethod
    def of(cls, run: dict[str, Any], types: Sequence[LayerType]) -> Steps | None:
        """None if the run's steps were not recorded."""
        if "step_times" not in run:
            return None
        times, running, _, prompts, said = np.array(run["step_times"], float).T
        length = int((run["prompt_tokens"] + run["said_tokens"] / 2) / run["requests"])
        read = sum(kind.needed_bytes(length) for kind in types)
        running, prompts, said = running[1:], prompts[1:], said[1:]
        return cls(running, prompts, prompts + said, read * running, times[-1] - times[0])

    def device(self, cost: StepCost) -> np.ndarray:
        """Seconds of each step but for what the host adds."""
        compute = 2 * cost.active_parameters * self.tokens / cost.flops_per_s
        roofline = np.maximum(compute, cost.weight_bytes / cost.bytes_per_s) + self.cache_bytes / cost.bytes_per_s
        return np.where(self.prompt_tokens > 0, np.maximum(roofline, cost.prefill_s), roofline)


def not_negative(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares whose constants are at least 0."""
    used = list(range(features.shape[1]))
    while True:
        found = np.linalg.lstsq(features[:, used], values, rcond=None)[0]
        if (found >= 0).all():
            constants = np.zeros(features.shape[1])
            constants[used] = found
            return constants
        used.pop(int(found.argmin()))


class Clients:
    """The clients of a workload, each of whom asks its next turn when the last one is answered."""

    def __init__(self, workload: Workload) -> None:
        self._turns = [list(client.turns) for client in workload.clients]
        self._said: list[list[int]] = [[] for _ in workload.clients]
        self._ids: dict[tuple[int, tuple[int, ...]], int] = {}
        self._of: dict[int, int] = {}
        self._new = itertools.count(-1, -1)
        self._queue = deque(range(len(self._turns)))
        self._at_a_time = workload.at_a_time or len(self._turns)
        self.due: list[TraceRequest] = []
        """Asked, and not yet submitted."""

    def begin(self) -> None:
        """The first clients ask."""
        for _ in range(min(self._at_a_time, len(self._queue))):
            self._ask(self._queue.popleft())

    def _ask(self, client: int) -> None:
        new, answer = self._turns[client].pop(0)
        said = self._said[client] + new
        # What the engine will answer is not known, but no other prompt holds it.
        self._said[client] = said + [next(self._new) for _ in range(answer)]
        blocks, last = [], -1
        for start in range(0, len(said), BLOCK_TOKENS):
            last = self._ids.setdefault((last, tuple(said[start : start + BLOCK_TOKENS])), len(self._ids))
            blocks.append(last)
        serial = len(self._of)
        self._of[serial] = client
        self.due.append(TraceRequest(serial, 0.0, len(said), answer, tuple(blocks), BLOCK_TOKENS, len(said)))

    def admitted(self, serial: int, hit_tokens: int) -> None:
        """Nothing to do."""

    def first_token(self, serial: int, seconds: float) -> None:
        """Nothing to do."""

    def finished(self, serial: int, rejected: bool) -> None:
        """The client, or else the next one, asks again."""
        client = self._of[serial]
        if self._turns[client]:
            self._ask(client)
        elif self._queue:
            self._ask(self._queue.popleft())


def served(
    workload: Workload, plan: Plan, types: Sequence[LayerType], cost: StepCost, limits: Limits
) -> SimulationResult:
    """The workload's clients on a simulated engine, step by step."""
    clients = Clients(workload)
    simulation = Simulation(plan, types, cost=cost, limits=limits, watch=clients, sampling=False)
    clients.begin()
    while clients.due or simulation.queue:
        for each in clients.due:
            simulation.submit(replace(each, arrival_s=simulation.now_s))
        clients.due.clear()
        simulation.advance(math.nextafter(simulation.now_s, math.inf))
    return simulation.result()


def run(out: Path, folder: Path, trace: Path | None) -> list[dict[str, Any]]:
    """Fit each model of `folder`/throughput.json and simulate what it was asked; rows are printed and saved in `out`.

    Constants go to `out`/NAME.cost.json, for `jenga simulate --step-cost`.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it has not what is compared here.
    """
    measured: list[dict[str, Any]] = json.loads((folder / "throughput.json").read_text())
    made = []
    for name in dict.fromkeys(row["model"] for row in measured):
        rows = [row for row in measured if row["model"] == name and row.get("runs")]
        if not rows:
            continue
        types = layer_types(name, out)
        cost, error = fit(rows, types, rows[0]["weight_bytes"])
        (out / f"{name}.cost.json").write_text(json.dumps(asdict(cost), indent=1) + "\n")
        print(f"{name}: {describe(cost)}; its runs' steps within {error:.0%} on average", flush=True)
        load = next(each for each in throughput.LOADS if each.model == name)
        load = throughput.with_trace(load, trace) if trace else load
        for row in rows:
            for asked in dict.fromkeys(run["workload"] for run in row["runs"]):
                made += compared(row, types, load, cost, asked)
    for each in made:
        print(
            f"{each['model']:16s} {each['contender']:20s} {each['workload']:28s}"
            f" {each['measured']:8,.0f} tokens/s, simulated {each['simulated']:8,.0f} ({each['error']:+.0%});"
            f" resident {each['resident'] or 0:.0f}, simulated {each['resident_simulated']:.0f}",
            flush=True,
        )
    if not made:
        raise ValueError(f"{folder / 'throughput.json'} holds no engine that came to its end; run `throughput` again")
    errors = [abs(each["error"]) for each in made]
    print(f"mean error {statistics.fmean(errors):.0%}, worst {max(errors):.0%}, of {len(errors)}", flush=True)
    (out / "calibration.json").write_text(json.dumps(made, indent=1) + "\n")
    return made


def describe(cost: StepCost) -> str:
    """The constants in words."""
    return (
        f"{1e3 * cost.overhead_s:.1f} ms a step, at least {1e3 * cost.prefill_s:.0f} ms with prompt tokens, "
        f"{1e6 * cost.request_s:.0f} us a running request, {cost.flops_per_s / 1e12:.0f} TFLOP/s"
    )


def layer_types(name: str, out: Path) -> tuple[LayerType, ...]:
    """Layer types of the benchmark's version of a model, as vLLM stores them."""
    config = models.make(name, out / "work", small=False) / "config.json"
    return from_hf_config(config).layer_types(state_dtype="float32" if name in FLOAT32_STATES else "bfloat16")


def compared(
    row: dict[str, Any], types: tuple[LayerType, ...], load: throughput.Load, cost: StepCost, asked: str
) -> Iterator[dict[str, Any]]:
    """One contender's workload, measured and simulated; nothing if it cannot be simulated."""
    runs = [run for run in row["runs"] if run["workload"] == asked]
    workload = next((w for w in map(first_of, load.workloads) if w.name == asked), None)
    if workload is None:
        return
    who = row["contender"]
    plan = make_plan(STRATEGIES[who], row["model"], types, int(load.kv_gib * throughput.GIB))
    limits = Limits(
        batched_tokens=throughput.BATCHED,
        sequences=load.running,
        prefix_caching=bool(throughput.CONTENDERS[who][1]["enable_prefix_caching"]),
        pass_tokens=GPU_PASS_TOKENS if who == "jenga" else PASS_TOKENS,
    )
    result = served(workload, plan, types, cost, limits)
    measured = statistics.median(run["said_per_s"] for run in runs)
    simulated = result.output_tokens / result.seconds
    full = [run["resident_mean"] for run in runs if run["resident_mean"]]
    yield {
        "model": row["model"],
        "contender": who,
        "workload": asked,
        "measured": measured,
        "simulated": simulated,
        "error": simulated / measured - 1,
        "resident": statistics.median(full) if full else None,
        "resident_simulated": result.resident_mean,
    }


def first_of(workload: tuple[Any, ...]) -> Workload:
    """The workload as its first run asked it."""
    name, *sizes = workload
    return serve.build(name, sizes, 0)
