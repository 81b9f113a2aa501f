"""Times the memory manager against vLLM's, in one process.

    python benchmarks/allocator.py [--models NAME ...] [--requests 8 64 256] [--repeats 5] [--json FILE]

Three tables of processor time, every figure the median over repeats with the smallest and largest beside it:

1. the memory manager's part of a scheduler step, call by call, under the load of `scheduler_step.py`: vLLM's
   `KVCacheManager` on its own coordinator and on Jenga's, the same requests, the same bytes, in turns;
2. single operations: `BlockPool` and `TwoLevelAllocator` alone, in turns, both with an index of what is cached;
3. `TwoLevelAllocator` in pools of growing size, random pages.  Beside it a yardstick: as many plain dicts in a list,
   one key put into and taken from random ones.  What that loses in a big heap, the processor's caches lose.

The models are Gemma-3-27B (sliding windows; vLLM 0.32 makes seven groups of it, Jenga two) and Falcon-H1-34B (attention
and recurrent states; two groups each, in blocks of 2,064 and of 16 tokens).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scheduler_step import BATCHED_TOKENS, PROMPT, SIDES, WARM_STEPS, Engine, Figure, Planner
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec, iter_layer_specs
from vllm.v1.request import Request, RequestStatus

from jenga.allocator import TwoLevelAllocator
from jenga.hits import GroupCache, longest_common_hit
from jenga.models import ModelSpec
from jenga.vllm_plugin.config import JengaKVCacheConfig

STEPS = 100
Times = dict[str, float]


# -- 1. a scheduler step ------------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up the time of a memory manager's calls, less what looking at the clock takes."""

    def __init__(self, manager: Any) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        begin = time.thread_time()
        for _ in range(1000):
            time.thread_time()
        self.look = (time.thread_time() - begin) / 1000
        for call in ("new_step_starts", "get_computed_blocks", "allocate_slots", "free"):
            setattr(manager, call, self.timed(call, getattr(manager, call)))

    def timed(self, call: str, function: Callable[..., Any]) -> Callable[..., Any]:
        names = {"new_step_starts": "new step", "get_computed_blocks": "hit lookup", "free": "free"}

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            name = names.get(call) or self.kind_of(args[0])
            begin = time.thread_time()
            result = function(*args, **kwargs)
            self.spent[name] += time.thread_time() - begin - self.look
            return result

        return wrapped

    @staticmethod
    def kind_of(request: Request) -> str:
        return "grow" if request.status == RequestStatus.RUNNING else "admit"


def step_times(planner: Planner, model: ModelSpec, requests: int, seed: int) -> dict[str, Times]:
    """Microseconds per step by side and call, the two sides in turns."""
    engines = {
        side: Engine(*planner.scheduler(model, requests, side == "jenga"), requests=requests, seed=seed)
        for side in SIDES
    }
    for _ in range(requests * PROMPT // BATCHED_TOKENS + WARM_STEPS):
        for engine in engines.values():
            engine.step()
    watches = {side: Stopwatch(engine.scheduler.kv_cache_manager) for side, engine in engines.items()}
    gc.collect()
    gc.disable()
    for number in range(STEPS):
        for side in SIDES if number % 2 else SIDES[::-1]:
            engines[side].step()
    gc.enable()
    calls = ("new step", "grow", "hit lookup", "admit", "free")
    return {
        side: {call: watch.spent[call] / STEPS * 1e6 for call in calls}
        | {"all calls": sum(watch.spent.values()) / STEPS * 1e6}
        for side, watch in watches.items()
    }


# -- 2. single operations -----------------------------------------------------------------------------------------


def pages_held(planned: KVCacheConfig) -> list[int]:
    """Pages that a prompt of `PROMPT` tokens fills, by group (of states: one)."""
    specs = [next(iter(iter_layer_specs(g.kv_cache_spec))) for g in planned.kv_cache_groups]
    return [1 if isinstance(s, MambaSpec) else -(-PROMPT // s.block_size) for s in specs]


def stock_operations(planned: KVCacheConfig, requests: int, prompts: list[Request]) -> Times:
    """Microseconds per request, in a pool that holds all of them and no more."""
    held_by = pages_held(planned)
    pool = BlockPool(requests * sum(held_by) + 1, enable_caching=True, hash_block_size=PROMPT // max(held_by))
    held: list[list[Any]] = []

    def allocate() -> None:
        for _ in range(requests):
            held.append([pool.get_new_blocks(count) for count in held_by])

    def free() -> None:
        for blocks in held:
            for row in blocks:
                pool.free_blocks(reversed(row))

    def revive() -> None:
        for blocks in held:
            for row in blocks:
                pool.touch(row)

    figures = {"allocate": seconds(allocate)}
    for request, blocks in zip(prompts, held, strict=True):
        for group, row in enumerate(blocks):
            pool.cache_full_blocks(request, row, 0, len(row), PROMPT // len(row), group)
    figures["free (kept)"] = seconds(free)
    figures["revive"] = seconds(revive)
    free()
    held.clear()
    figures["evict and allocate"] = seconds(allocate)
    return {name: value / requests * 1e6 for name, value in figures.items()}


def jenga_operations(planned: JengaKVCacheConfig, requests: int) -> Times:
    """The same for `TwoLevelAllocator`, whose evictions take their entry out of a dict of hashes.

    A layer type's pages are one group, whatever parts they are cut into; where the parts lie is asked as well.
    """
    ratios, widths = planned.layout.ratios, planned.layout.parts
    held_by = pages_held(planned)[: len(ratios)]  # a type's first part has its number
    large = requests * sum(-(-n // r) * w for r, w, n in zip(ratios, widths, held_by, strict=True)) + 1
    index: list[dict[int, int]] = [{} for _ in ratios]
    pool = TwoLevelAllocator(large, ratios, widths=widths, on_evict=lambda group, page: index[group].pop(page, None))
    held: list[list[list[int]]] = []
    groups = range(len(ratios))

    def allocate() -> None:
        for _ in range(requests):
            held.append([pool.allocate(g, held_by[g]) for g in groups])
            for g in groups:
                pool.parts(g, held[-1][g])

    def runs(g: int, pages: Iterable[int]) -> Iterator[list[int]]:
        ratio, run = ratios[g], list[int]()
        for page in pages:
            if run and page // ratio != run[0] // ratio:
                yield run
                run = []
            run.append(page)
        yield run

    def free() -> None:
        pool.tick()
        for pages in held:
            for g in groups:
                for run in runs(g, reversed(pages[g])):
                    pool.release_run(g, run, True)

    def revive() -> None:
        for pages in held:
            for g in groups:
                for run in runs(g, pages[g]):
                    pool.revive_run(g, run)

    def admit() -> None:
        for _ in range(requests):
            pool.fits(held_by)

    def look_up() -> None:
        for _ in range(requests):
            longest_common_hit(prompt, PROMPT - 1)

    figures = {"allocate": seconds(allocate)}
    for pages in held:
        for g in groups:
            index[g].update(dict.fromkeys(pages[g], 0))
    prompt = [
        GroupCache(place.group.policy, place.group.page_tokens, known.__contains__)
        for place, known in zip(planned.layout.groups, index, strict=True)
    ]
    figures["free (kept)"] = seconds(free)
    figures["admit"] = seconds(admit)
    figures["hit rule"] = seconds(look_up)
    figures["revive"] = seconds(revive)
    free()
    held.clear()
    figures["evict and allocate"] = seconds(allocate)
    assert sum(pool.counters().evicted_pages) > 0
    return {name: value / requests * 1e6 for name, value in figures.items()}


def operation_times(planner: Planner, model: ModelSpec, requests: int, seed: int) -> dict[str, Times]:
    stock, jenga = (planner.plan(model, requests, side)[1] for side in (False, True))
    assert isinstance(jenga, JengaKVCacheConfig)
    tokens = PROMPT // max(pages_held(stock))
    stream = Engine(planner.scheduler(model, requests, jenga=False)[0], tokens, requests, seed)
    prompts = [stream.request() for _ in range(requests)]
    return {"vllm": stock_operations(stock, requests, prompts), "jenga": jenga_operations(jenga, requests)}


def seconds(operation: Callable[[], None]) -> float:
    gc.collect()
    gc.disable()
    begin = time.thread_time()
    operation()
    spent = time.thread_time() - begin
    gc.enable()
    return spent


# -- 3. growing pools ---------------------------------------------------------------------------------------------


def pool_times(large_pages: int, seed: int) -> Times:
    """Nanoseconds per small page in a pool of `large_pages` with all of it in use, then all of it cached."""
    rng = random.Random(seed)
    ratios = (3, 2)
    evicted = [0]

    def count(group: int, page: int) -> None:
        evicted[0] += 1

    pool = TwoLevelAllocator(large_pages, ratios, reserved=0, on_evict=count)
    pages = [pool.allocate(0, large_pages // 2 * 3), pool.allocate(1, (large_pages - large_pages // 2) * 2)]
    picks = [rng.sample(p, min(10_000, len(p) // 2)) for p in pages]
    touched = sum(map(len, picks))

    def release() -> None:
        for g, row in enumerate(picks):
            for page in row:
                pool.release(g, page, True)

    def revive() -> None:
        for g, row in enumerate(picks):
            for page in row:
                pool.revive(g, page)

    def grow() -> None:
        for g, row in enumerate(picks):
            for _ in row:
                pool.allocate(g, 1)

    def admit() -> None:
        for _ in range(touched):
            pool.fits((7, 5))

    figures = {"release": seconds(release), "revive": seconds(revive)}
    release()
    figures["allocate"] = seconds(grow)  # each takes the place of a cached page
    figures["admit"] = seconds(admit)
    for g in (0, 1):
        for page in pages[g]:
            if pool.state(g, page).name == "LIVE":
                pool.release(g, page, True)
    before = evicted[0]
    figures["evict"] = seconds(grow)
    assert evicted[0] > before
    per_page = {name: value / touched * 1e9 for name, value in figures.items()}
    return per_page | vllm_pool_times(large_pages, rng) | yardstick(large_pages, rng)


def vllm_pool_times(blocks: int, rng: random.Random) -> Times:
    """The same random pages in vLLM's pool."""
    pool = BlockPool(blocks + 1, enable_caching=True, hash_block_size=16)
    picks = rng.sample(pool.get_new_blocks(blocks), min(10_000, blocks // 2))

    def free() -> None:
        for block in picks:
            pool.free_blocks([block])

    def touch() -> None:
        for block in picks:
            pool.touch([block])

    figures = {"vLLM: free": seconds(free), "vLLM: touch": seconds(touch)}
    return {name: value / len(picks) * 1e9 for name, value in figures.items()}


def yardstick(size: int, rng: random.Random) -> Times:
    """Plain Python: a list of `size` dicts."""
    cells: list[dict[int, int]] = [{} for _ in range(size)]
    picks = rng.sample(range(size), min(10_000, size // 2))

    def put() -> None:
        for n in picks:
            cells[n][n] = 1

    def take() -> None:
        for n in picks:
            del cells[n][n]

    figures = {"dicts: put": seconds(put), "dicts: take": seconds(take)}
    return {name: value / len(picks) * 1e9 for name, value in figures.items()}


# -- report -------------------------------------------------------------------------------------------------------


def sides(runs: list[dict[str, Times]]) -> dict[str, dict[str, Any]]:
    return {
        side: {call: vars(Figure.of([run[side][call] for run in runs])) for call in runs[0][side]} for side in SIDES
    }


def comparison(title: str, models: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> Table:
    table = Table("model", "requests", "call", "vLLM 0.32", "Jenga", "Jenga / vLLM", title=title)
    for model, rows in models.items():
        for requests, both in rows.items():
            for call, figure in both["jenga"].items():
                other = both["vllm"].get(call)
                ratio = f"{figure['median'] / other['median']:.2f}" if other else ""
                texts = (Figure(**f).text(1) if f else "" for f in (other, figure))
                table.add_row(model, requests, call, *texts, ratio)
            table.add_section()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gemma-3-27b", "falcon-h1-34b"], metavar="NAME")
    parser.add_argument("--requests", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--pools", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("results/allocator.json"))
    arguments = parser.parse_args()
    init_none_hash(sha256)
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "repeats": arguments.repeats,
        "scheduler_step_us": {},
        "operations_us": {},
        "pools_ns": {},
    }
    work = (("scheduler_step_us", step_times), ("operations_us", operation_times))
    with tempfile.TemporaryDirectory() as folder, Progress(transient=True) as progress:
        planner = Planner(Path(folder))
        jobs = 2 * len(arguments.models) * len(arguments.requests) + len(arguments.pools)
        bar = progress.add_task("", total=jobs * arguments.repeats)

        def repeated(what: str, measure: Callable[[int], Any]) -> list[Any]:
            runs = []
            for seed in range(arguments.repeats):
                progress.update(bar, description=what)
                runs.append(measure(seed))
                progress.advance(bar)
            return runs

        for part, measure in work:
            for name in arguments.models:
                model = planner.model(name)
                report[part][name] = {
                    str(n): sides(
                        repeated(f"{name}, {n} requests", lambda seed, m=measure, n=n, x=model: m(planner, x, n, seed))
                    )
                    for n in arguments.requests
                }
        for pages in arguments.pools:
            runs = repeated(f"{pages:,} large pages", lambda seed, pages=pages: pool_times(pages, seed))
            report["pools_ns"][str(pages)] = {name: vars(Figure.of([r[name] for r in runs])) for name in runs[0]}
    console = Console(width=160)
    console.print(comparison("The memory manager in a scheduler step, microseconds", report["scheduler_step_us"]))
    console.print(comparison(f"Microseconds per request of {PROMPT:,} tokens", report["operations_us"]))
    flat = Table("large pages", *next(iter(report["pools_ns"].values())), title="Growing pools, nanoseconds per page")
    for pages, row in report["pools_ns"].items():
        flat.add_row(f"{int(pages):,}", *(f"{figure['median']:,.0f}" for figure in row.values()))
    console.print(flat)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"saved as {arguments.json}")


if __name__ == "__main__":
    main()
