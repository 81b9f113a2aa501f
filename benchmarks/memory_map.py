"""What the memory map costs an engine core: time of a map and of a look into one large page, bytes on the way out.

    python benchmarks/memory_map.py --large-pages 100000

A full buffer in random order (the worst for compression): half of it live, in 300 requests; the rest cached.  And looks
into one large page of a hybrid with many small pages, all of one request among 512.
"""

from __future__ import annotations

import argparse
import gzip
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from jenga.allocator import TwoLevelAllocator
from jenga.layout import GroupLayout, LayerGroup, Layout
from jenga.metrics.map import LargePage, MemoryMap
from jenga.policies import FullAttention, SlidingWindow
from jenga.vllm_plugin.memory_map import large_page

REQUESTS = 300
RATIOS = (5, 1)
PAGE_TOKENS = 32
HYBRID_REQUESTS, HYBRID_PAGES = 512, 1024
HYBRID_RATIOS = (98, 364)
"""Of hybrids in docs/zoo.md: full attention beside large recurrent states."""


def fill(large_pages: int, seed: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A coordinator and a scheduler as `large_page` reads them: half the pages live, the other half cached."""
    policies = (FullAttention(), SlidingWindow(64))
    places = tuple(
        GroupLayout(LayerGroup(policy.kind, policy, 1, PAGE_TOKENS, 5120 // ratio), ratio, 5120 // ratio)
        for policy, ratio in zip(policies, RATIOS, strict=True)
    )
    allocator, rng = TwoLevelAllocator(large_pages, RATIOS), random.Random(seed)
    pools, managers = [], []
    for group, ratio in enumerate(RATIOS):
        blocks = [KVCacheBlock(number) for number in range(large_pages * ratio)]
        granted = allocator.allocate(group, (large_pages - 1) // 2 * ratio)
        rng.shuffle(granted)
        tables: dict[str, list[KVCacheBlock]] = {f"cmpl-{who:08x}-0": [] for who in range(REQUESTS)}
        rows = list(tables.values())
        for index, number in enumerate(granted[: len(granted) // 2]):
            blocks[number].ref_cnt = 1
            rows[index % REQUESTS].append(blocks[number])
        for number in granted[len(granted) // 2 :]:
            allocator.release(group, number, keep=True)
        pools.append(SimpleNamespace(blocks=blocks))
        managers.append(SimpleNamespace(req_to_blocks=tables, block_size=PAGE_TOKENS))
    layout = Layout(5120, places, 0.0, 0.0, "by hand")
    config = SimpleNamespace(layout=layout)
    coordinator = SimpleNamespace(
        allocator=allocator, pools=pools, single_type_managers=managers, kv_cache_config=config
    )
    return coordinator, SimpleNamespace(requests={})


def hybrid(ratio: int) -> Callable[[], LargePage]:
    """A look into a large page whose `ratio` pages can be found and belong to the middle one of many requests."""
    group = GroupLayout(LayerGroup("full", FullAttention(), 1, PAGE_TOKENS, 64), ratio, 64)
    large_pages = HYBRID_REQUESTS * -(-HYBRID_PAGES // ratio) + 1
    allocator = TwoLevelAllocator(large_pages, (ratio,))
    blocks = [KVCacheBlock(number) for number in range(large_pages * ratio)]
    tables: dict[str, list[KVCacheBlock]] = {}
    for who in range(HYBRID_REQUESTS):
        row = tables[f"cmpl-{who:08x}-0"] = [blocks[page] for page in allocator.allocate(0, HYBRID_PAGES)]
        for block in row:
            block.ref_cnt = 1
    manager = SimpleNamespace(req_to_blocks=tables, block_size=PAGE_TOKENS)
    name_pages(manager)
    coordinator: Any = SimpleNamespace(
        allocator=allocator,
        pools=[SimpleNamespace(blocks=blocks)],
        single_type_managers=[manager],
        kv_cache_config=SimpleNamespace(layout=Layout(64 * ratio, (group,), 0.0, 0.0, "by hand")),
    )
    large = list(tables.values())[HYBRID_REQUESTS // 2][HYBRID_PAGES // 2].block_id // ratio
    return lambda: large_page(coordinator, SimpleNamespace(requests={}), large, time.monotonic())


def name_pages(manager: Any) -> None:
    """Let every live page know its place in the prefix, as pages that can be found do."""
    for row in manager.req_to_blocks.values():
        for index, block in enumerate(row):
            block.set_block_hash(b"", (index + 1) * PAGE_TOKENS)


def median_ms(function: Callable[[], Any], times: int = 15) -> float:
    """Median time of a call."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return 1e3 * sorted(found)[times // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large-pages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    coordinator, scheduler = fill(options.large_pages, options.seed)
    allocator, layout = coordinator.allocator, coordinator.kv_cache_config.layout
    live = sum(group.live for group in allocator.usage().groups)
    manager = coordinator.single_type_managers[0]
    large = list(manager.req_to_blocks.values())[REQUESTS // 2][0].block_id // RATIOS[0]

    def look() -> None:
        large_page(coordinator, scheduler, large, time.monotonic())

    encoded = MemoryMap.take(layout, allocator, time.time()).encode("replica")
    table = Table("figure", "value", title=f"{options.large_pages:,} large pages, {live:,} live small pages")
    table.columns[1].justify = "right"
    takes = median_ms(lambda: MemoryMap.take(layout, allocator, time.time()).to_dict())
    table.add_row("engine core: a map", f"{takes:.2f} ms")
    table.add_row("engine core: a large page that only block tables know", f"{median_ms(look):.2f} ms")
    name_pages(manager)
    table.add_row("engine core: a large page whose pages can be found", f"{median_ms(look):.2f} ms")
    for ratio in HYBRID_RATIOS:
        what = f"engine core: the same, {ratio} pages, {HYBRID_REQUESTS} requests"
        table.add_row(what, f"{median_ms(hybrid(ratio)):.2f} ms")
    table.add_row("replica: compress a map", f"{median_ms(lambda: gzip.compress(encoded, 1)):.2f} ms")
    table.add_row("bytes between engine core and replica", f"{len(encoded):,}")
    table.add_row("bytes to the browser", f"{len(gzip.compress(encoded, 1)):,}")
    Console().print(table)


if __name__ == "__main__":
    main()
