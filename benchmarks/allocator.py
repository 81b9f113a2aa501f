"""Times the memory manager against vLLM's, in one process.

    python benchmarks/allocator.py [--requests 8 64 256] [--repeats 5] [--json results/allocator.json]

Three tables of processor time, every figure the median over repeats with the smallest and largest beside it:

1. a scheduler step: vLLM's `KVCacheManager` on its own coordinator and on Jenga's, same requests, same bytes;
2. single operations: `BlockPool` and `TwoLevelAllocator` alone, both with an index of what is cached;
3. `TwoLevelAllocator` in pools of growing size, random pages: it must stay flat, but for what the processor's caches
   cost, and that shows in vLLM's pool as well.

The model is Gemma-3-27B's shape: 52 layers with a window of 1,024 tokens and 10 of full attention, pages of 16 tokens.
vLLM 0.32 makes seven groups of it, Jenga two.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_coordinator, kv_cache_manager
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus

from jenga.allocator import TwoLevelAllocator
from jenga.hits import GroupCache, longest_common_hit
from jenga.layout import choose_layout
from jenga.policies import FullAttention, SlidingWindow
from jenga.vllm_plugin import coordinator as jenga_coordinator
from jenga.vllm_plugin.config import JengaGroupSpec, JengaKVCacheConfig
from jenga.vllm_plugin.groups import describe

PAGE_TOKENS, WINDOW = 16, 1024
FULL_LAYERS, WINDOW_LAYERS = 10, 52
PROMPT, SHARED, FAMILIES = 1024, 512, 8
OUTPUT = (64, 192)
MAX_LEN = 4096
WARM_STEPS, STEPS = 120, 200

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Figure:
    """Median over repeats, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 2
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


# -- 1. a scheduler step ------------------------------------------------------------------------------------------


def specs() -> tuple[FullAttentionSpec, SlidingWindowSpec]:
    shape: dict[str, Any] = {"block_size": PAGE_TOKENS, "num_kv_heads": 16, "head_size": 128, "dtype": torch.bfloat16}
    return FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=WINDOW)


def stock_config(memory: int) -> KVCacheConfig:
    """vLLM 0.32's plan: groups of as many layers as the smallest type has, one pool of equal blocks."""
    full, window = specs()
    groups = [KVCacheGroupSpec([f"full.{i}" for i in range(FULL_LAYERS)], full)]
    count = -(-WINDOW_LAYERS // FULL_LAYERS)
    groups += [KVCacheGroupSpec([f"window.{i}" for i in range(g, WINDOW_LAYERS, count)], window) for g in range(count)]
    return KVCacheConfig(memory // (FULL_LAYERS * full.page_size_bytes), [], groups)


def jenga_config(memory: int) -> JengaKVCacheConfig:
    full, window = specs()
    groups = [
        KVCacheGroupSpec([f"full.{i}" for i in range(FULL_LAYERS)], full),
        KVCacheGroupSpec([f"window.{i}" for i in range(WINDOW_LAYERS)], window),
    ]
    layout = choose_layout(describe(groups), memory)
    placed = [JengaGroupSpec(g.layer_names, g.kv_cache_spec, layout=layout, index=i) for i, g in enumerate(groups)]
    return JengaKVCacheConfig(memory // layout.large_page_bytes, [], list(placed))


def request_memory() -> int:
    """Bytes that one request at its longest needs, both layer types exact."""
    full, window = specs()
    tokens = PROMPT + OUTPUT[1]
    pages = -(-tokens // PAGE_TOKENS)
    return FULL_LAYERS * pages * full.page_size_bytes + WINDOW_LAYERS * (
        min(pages, WINDOW // PAGE_TOKENS + 1) * window.page_size_bytes
    )


class Requests:
    """An endless stream of requests, half of each prompt shared with others of its family."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.hasher = get_request_block_hasher(PAGE_TOKENS, sha256)
        self.families = [self.tokens(SHARED) for _ in range(FAMILIES)]
        self.count = 0

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(100_000) for _ in range(count)]

    def next(self) -> tuple[Request, int]:
        """A request and how many tokens it will generate."""
        self.count += 1
        request = Request(
            request_id=str(self.count),
            prompt_token_ids=self.random.choice(self.families) + self.tokens(PROMPT - SHARED),
            sampling_params=SamplingParams(max_tokens=OUTPUT[1]),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        return request, self.random.randint(*OUTPUT)


def scheduler_steps(config: KVCacheConfig, requests: int, seed: int) -> Samples:
    """Microseconds per step, whole and by call, of a full house of `requests` running requests."""
    manager = kv_cache_manager.KVCacheManager(
        config,
        max_model_len=MAX_LEN,
        scheduler_block_size=PAGE_TOKENS,
        hash_block_size=PAGE_TOKENS,
        max_in_flight_tokens=8192,
        enable_caching=True,
    )
    stream = Requests(seed)
    running: dict[Request, int] = {}
    samples: Samples = defaultdict(list)
    clock = time.thread_time  # other processes of a busy machine do not count
    gc.collect()
    gc.disable()
    for step in range(WARM_STEPS + STEPS):
        spent: dict[str, float] = defaultdict(float)
        # The scheduler creates requests and appends tokens: not timed, the same for both.
        waiting = [stream.next() for _ in range(requests - len(running) if step else requests)]
        begin = clock()
        manager.new_step_starts()
        spent["new step"] += clock() - begin
        if step % 10 == 0:
            begin = clock()
            for request in running:
                manager.coordinator.get_num_blocks_to_allocate(
                    request.request_id,
                    request.num_tokens,
                    manager.empty_kv_cache_blocks.blocks,
                    0,
                    request.num_computed_tokens,
                    request.num_computed_tokens,
                    request.num_tokens,
                )
            admit = clock() - begin
            if running and step >= WARM_STEPS:
                samples["admit, per request"].append(admit / len(running) * 1e6)
        begin = clock()
        grown = [manager.allocate_slots(request, 1) for request in running]
        spent["grow"] += clock() - begin
        assert all(blocks is not None for blocks in grown), "the pool is too small for the requests"
        begin = clock()
        for request, _ in waiting:
            manager.get_computed_blocks(request)
        looked = clock() - begin
        begin = clock()
        for request, _ in waiting:
            blocks, computed, _ = manager.get_computed_blocks(request)
            granted = manager.allocate_slots(request, request.num_tokens - computed, computed, blocks)
            assert granted is not None, "the pool is too small for the requests"
        spent["admission, lookup included"] += clock() - begin
        for request, length in waiting:
            request.status = RequestStatus.RUNNING
            running[request] = length
        for request in running:
            request.num_computed_tokens = request.num_tokens
            request.append_output_token_ids(stream.random.randrange(100_000))
        ended = [r for r, length in running.items() if r.num_output_tokens >= length]
        begin = clock()
        for request in ended:
            manager.free(request)
        spent["free"] += clock() - begin
        for request in ended:
            del running[request]
        if step >= WARM_STEPS:
            samples["whole step"].append(sum(spent.values()) * 1e6)
            for call, seconds in spent.items():
                samples[call].append(seconds * 1e6)
            if waiting:
                samples["hit lookup, per request"].append(looked / len(waiting) * 1e6)
    gc.enable()
    return samples


# -- 2. single operations -----------------------------------------------------------------------------------------

PROMPT_PAGES = PROMPT // PAGE_TOKENS


def stock_operations(requests: int, seed: int) -> dict[str, float]:
    """Microseconds per request of 1,024 tokens, in a pool that holds all of them and no more."""
    groups = 1 + -(-WINDOW_LAYERS // FULL_LAYERS)
    pool = BlockPool(requests * groups * PROMPT_PAGES + 1, enable_caching=True, hash_block_size=PAGE_TOKENS)
    stream = Requests(seed)
    work = [stream.next()[0] for _ in range(requests)]
    held: list[list[Any]] = []

    def allocate() -> None:
        for _ in work:
            held.append([pool.get_new_blocks(PROMPT_PAGES) for _ in range(groups)])

    def free() -> None:
        for blocks in held:
            for row in blocks:
                pool.free_blocks(reversed(row))

    def revive() -> None:
        for blocks in held:
            for row in blocks:
                pool.touch(row)

    figures = {"allocate": seconds(allocate)}
    for request, blocks in zip(work, held, strict=True):
        for group, row in enumerate(blocks):
            pool.cache_full_blocks(request, row, 0, PROMPT_PAGES, PAGE_TOKENS, group)
    figures["free (kept)"] = seconds(free)
    figures["revive"] = seconds(revive)
    free()
    held.clear()
    figures["evict and allocate"] = seconds(allocate)
    return {name: value / requests * 1e6 for name, value in figures.items()}


def jenga_operations(requests: int, seed: int) -> dict[str, float]:
    """The same for `TwoLevelAllocator`, whose evictions take their entry out of a dict of hashes."""
    del seed
    ratios = jenga_config(1 << 40).ratios
    large = requests * sum(-(-PROMPT_PAGES // r) for r in ratios) + 1
    index: list[dict[int, int]] = [{} for _ in ratios]
    pool = TwoLevelAllocator(large, ratios, on_evict=lambda group, page: index[group].pop(page, None))
    held: list[list[list[int]]] = []
    groups = range(len(ratios))

    def allocate() -> None:
        for _ in range(requests):
            held.append([pool.allocate(g, PROMPT_PAGES) for g in groups])

    def free() -> None:
        pool.tick()
        for pages in held:
            for g in groups:
                for page in reversed(pages[g]):
                    pool.release(g, page, True)

    def revive() -> None:
        for pages in held:
            for g in groups:
                for page in pages[g]:
                    pool.revive(g, page)

    def admit() -> None:
        for _ in range(requests):
            pool.fits([PROMPT_PAGES] * len(ratios))

    def look_up() -> None:
        for _ in range(requests):
            longest_common_hit(prompt, PROMPT - 1)

    figures = {"allocate": seconds(allocate)}
    for pages in held:
        for g in groups:
            index[g].update(dict.fromkeys(pages[g], 0))
    prompt = [
        GroupCache(FullAttention(), PAGE_TOKENS, index[0].__contains__),
        GroupCache(SlidingWindow(WINDOW), PAGE_TOKENS, index[1].__contains__),
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


def seconds(operation: Callable[[], None]) -> float:
    gc.collect()
    gc.disable()
    begin = time.thread_time()
    operation()
    spent = time.thread_time() - begin
    gc.enable()
    return spent


# -- 3. growing pools ---------------------------------------------------------------------------------------------


def flatness(large_pages: int, seed: int) -> dict[str, float]:
    """Nanoseconds per small page in a pool of `large_pages` with all of it in use, then all of it cached."""
    rng = random.Random(seed)
    ratios = (3, 2)
    evicted = [0]

    def count(group: int, page: int) -> None:
        evicted[0] += 1

    pool = TwoLevelAllocator(large_pages, ratios, reserved=0, on_evict=count)
    pages = [pool.allocate(0, large_pages // 2 * 3), pool.allocate(1, (large_pages - large_pages // 2) * 2)]
    count_of = min(20_000, large_pages)
    picks = [rng.sample(p, min(count_of // 2, len(p) // 2)) for p in pages]
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
    return per_page | stock_flatness(large_pages, rng)


def stock_flatness(blocks: int, rng: random.Random) -> dict[str, float]:
    """The same random pages in vLLM's pool: what a larger pool costs by missing the processor's caches."""
    pool = BlockPool(blocks + 1, enable_caching=True, hash_block_size=PAGE_TOKENS)
    picks = rng.sample(pool.get_new_blocks(blocks), min(10_000, blocks // 2))

    def free() -> None:
        for block in picks:
            pool.free_blocks([block])

    def touch() -> None:
        for block in picks:
            pool.touch([block])

    figures = {"vLLM: free": seconds(free), "vLLM: touch": seconds(touch)}
    return {name: value / len(picks) * 1e9 for name, value in figures.items()}


# -- report -------------------------------------------------------------------------------------------------------


def repeated(measure: Callable[[int], dict[str, float]], repeats: int) -> dict[str, Figure]:
    runs = [measure(seed) for seed in range(repeats)]
    return {name: Figure.of([run[name] for run in runs]) for name in runs[0]}


def step_figures(config: Callable[[int], KVCacheConfig], requests: int) -> Callable[[int], dict[str, float]]:
    memory = int(1.35 * requests * request_memory()) + (2 << 30)

    def measure(seed: int) -> dict[str, float]:
        return {call: statistics.fmean(v) for call, v in scheduler_steps(config(memory), requests, seed).items()}

    return measure


def comparison(title: str, rows: dict[int, tuple[dict[str, Figure], dict[str, Figure]]]) -> Table:
    table = Table("requests", "call", "vLLM 0.32", "Jenga", "Jenga / vLLM", title=title, min_width=110)
    for requests, (stock, jenga) in rows.items():
        for call, figure in jenga.items():
            other = stock.get(call)
            ratio = f"{figure.median / other.median:.2f}" if other and other.median else ""
            table.add_row(str(requests), call, str(other or ""), str(figure), ratio)
        table.add_section()
    return table


def plain(rows: dict[int, tuple[dict[str, Figure], dict[str, Figure]]]) -> dict[str, Any]:
    names = ("vllm", "jenga")
    return {
        str(n): {who: {call: vars(f) for call, f in side.items()} for who, side in zip(names, sides, strict=True)}
        for n, sides in rows.items()
    }


def measured(arguments: argparse.Namespace) -> Iterator[tuple[str, Table, Any]]:
    with Progress(transient=True) as progress:
        bar = progress.add_task("measuring", total=2 * len(arguments.requests) + len(arguments.pools))
        steps, operations, pools = {}, {}, {}
        for n in arguments.requests:
            progress.update(bar, description=f"scheduler steps, {n} requests")
            steps[n] = (
                repeated(step_figures(stock_config, n), arguments.repeats),
                repeated(step_figures(jenga_config, n), arguments.repeats),
            )
            progress.advance(bar)
        for n in arguments.requests:
            progress.update(bar, description=f"operations, {n} requests")
            operations[n] = (
                repeated(lambda seed, n=n: stock_operations(n, seed), arguments.repeats),
                repeated(lambda seed, n=n: jenga_operations(n, seed), arguments.repeats),
            )
            progress.advance(bar)
        for pages in arguments.pools:
            progress.update(bar, description=f"{pages:,} large pages")
            pools[pages] = repeated(lambda seed, pages=pages: flatness(pages, seed), arguments.repeats)
            progress.advance(bar)
    yield "scheduler_step_us", comparison("Scheduler step, microseconds (mean over steps)", steps), plain(steps)
    title = f"Single operations, microseconds per request of {PROMPT:,} tokens"
    yield "operations_us", comparison(title, operations), plain(operations)
    flat = Table("large pages", *next(iter(pools.values())), title="Growing pools, nanoseconds per small page")
    for pages, figures in pools.items():
        flat.add_row(f"{pages:,}", *map(str, figures.values()))
    yield "flatness_ns", flat, {str(n): {call: vars(f) for call, f in row.items()} for n, row in pools.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--pools", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("results/allocator.json"))
    arguments = parser.parse_args()
    init_none_hash(sha256)
    kv_cache_manager.get_kv_cache_coordinator = jenga_coordinator.replacement(
        kv_cache_coordinator.get_kv_cache_coordinator
    )
    console = Console(width=200)
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "ratios": jenga_config(1 << 40).ratios,
        "repeats": arguments.repeats,
    }
    for name, table, data in measured(arguments):
        console.print(table)
        report[name] = data
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"saved as {arguments.json}")


if __name__ == "__main__":
    main()
