"""What the router's block index costs: memory, decisions, ingest.  No engine is started.

    python benchmarks/index.py [--blocks 1000000] [--replicas 64] [--decisions 2000] [--json results/index.json]

The model has three layer groups (full attention, a window of 1,024 tokens, recurrent states) with pages of 16 tokens.
Every replica holds prefixes of its own and prefixes of a few hot prompts, each replica to another length, with windows
and states kept at other places: the worst case for a decision, since no two replicas are alike.  A decision is what the
router asks of its index for one request: the hits of all replicas, and booking what the chosen one will store (the
booking of the request before it is settled); `ON_THEIR_WAY` others are booked on each replica meanwhile.

Times are wall clock, beside them processor time of this thread: on a shared machine the tail of the former is the
neighbours'.  Garbage collection is on, as in a server.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jenga.policies import FullAttention, RecurrentState, SlidingWindow
from jenga.routing import BlockIndex, GroupRule, HitRule, decode, key_of
from jenga.routing.events import BlockStored
from jenga.routing.index import NO_HIT

PAGE, WINDOW = 16, 1024
RULE = HitRule(
    (
        GroupRule("full_attention", FullAttention(), PAGE),
        GroupRule("sliding_window_1024", SlidingWindow(WINDOW), PAGE),
        GroupRule("mamba2", RecurrentState(), PAGE),
    ),
    alignment=PAGE,
    hash_tokens=PAGE,
    root="",
    turn_marks=frozenset({0, 1, 2}),
)
TURN = 1500
"""Tokens from one mark to the next."""
ON_THEIR_WAY = 8
TAIL = WINDOW // PAGE
"""Pages of the window group that a resumable position needs."""
OWN_PROMPT, HOT_PROMPT, HOT_PROMPTS, CHECKPOINTS = 256, 2048, 4, 4
"""Blocks of a prompt that one replica has and of one that all have; number of the latter; resumable places in them."""


CACHED_PROMPTS = 1280
"""Prompts that all replicas of the ingest table together hold."""


class Fleet:
    """Replicas and what they store, as decoded events."""

    def __init__(self, replicas: int, blocks: int, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.names = [f"replica-{number}" for number in range(replicas)]
        self.hot = [self.prompt(HOT_PROMPT) for _ in range(HOT_PROMPTS)]
        self.own: list[list[int]] = []
        self._blocks = blocks

    def prompt(self, length: int) -> list[int]:
        return [self.rng.getrandbits(64) for _ in range(length)]

    def batches(self) -> Iterator[tuple[str, list[BlockStored]]]:
        for name in self.names:
            for hot in self.hot:
                reach = self.rng.randrange(TAIL + 1, HOT_PROMPT + 1)
                places = sorted({self.rng.randrange(TAIL, reach + 1) for _ in range(CHECKPOINTS)})
                yield name, self._stored(hot, reach, places)
        left = self._blocks - HOT_PROMPTS * HOT_PROMPT
        while left > 0:
            self.own.append(self.prompt(min(left, OWN_PROMPT)))
            left -= OWN_PROMPT
            yield self.rng.choice(self.names), self._stored(self.own[-1], len(self.own[-1]), [len(self.own[-1])])

    @staticmethod
    def _stored(prompt: list[int], reach: int, places: Sequence[int]) -> list[BlockStored]:
        window = sorted({index for place in places for index in range(max(0, place - TAIL), place)})
        return [
            BlockStored(prompt[:reach], 0, "GPU"),
            BlockStored([prompt[index] for index in window], 1, "GPU"),
            BlockStored([prompt[place - 1] for place in places], 2, "GPU"),
        ]


def filled(fleet: Fleet) -> BlockIndex:
    index = BlockIndex()
    numbers = dict.fromkeys(fleet.names, 0)
    for name, events in fleet.batches():
        index.apply(name, 1, numbers[name], events, RULE if numbers[name] == 0 else None)
        numbers[name] += 1
    return index


def timed(calls: Sequence[Callable[[], Any]], what: str) -> dict[str, float]:
    """Milliseconds of each call: wall clock and this thread's processor time."""
    wall, busy = [], []
    for call in track(calls, what, transient=True):
        begun, begun_busy = time.perf_counter(), time.thread_time()
        call()
        wall.append((time.perf_counter() - begun) * 1e3)
        busy.append((time.thread_time() - begun_busy) * 1e3)
    wall.sort()
    busy.sort()
    return {
        "p50_ms": wall[len(wall) // 2],
        "p99_ms": wall[len(wall) * 99 // 100],
        "max_ms": wall[-1],
        "cpu_p50_ms": busy[len(busy) // 2],
        "cpu_p99_ms": busy[len(busy) * 99 // 100],
    }


def decisions(fleet: Fleet, index: BlockIndex, count: int) -> list[dict[str, Any]]:
    """Look-ups of prompts of 8k and 32k tokens, by how much of them is known."""
    rng = random.Random(2)
    rows = []
    for tokens in (8192, 32768):
        ids = [0 if place % TURN == 0 else rng.randrange(3, 150_000) for place in range(tokens)]

        def decide(keys: list[int], ids: list[int] = ids) -> None:
            hits = index.hits(keys, len(ids))
            best = max(hits, key=lambda replica: hits[replica].tokens)
            index.book(best, "asked", ids, keys, hits[best])

        for number in range(ON_THEIR_WAY * len(fleet.names)):
            own = (rng.choice(fleet.own) + fleet.prompt(tokens // PAGE))[: tokens // PAGE]
            index.book(rng.choice(fleet.names), str(number), ids, own, NO_HIT)
        for kind, prompt in (
            ("hot: another hit on every replica", lambda n: [*rng.choice(fleet.hot)[: n - 1], rng.getrandbits(64)]),
            ("known to one replica", lambda n: (rng.choice(fleet.own) + fleet.prompt(n))[:n]),
            ("unknown", fleet.prompt),
        ):
            prompts = [prompt(tokens // PAGE) for _ in range(min(count, 200))]
            hits = [index.hits(keys, tokens) for keys in prompts[:20]]
            calls = [partial(decide, prompts[number % len(prompts)]) for number in range(count)]
            rng.shuffle(calls)
            rows.append(
                {
                    "tokens": tokens,
                    "prompt": kind,
                    "distinct_hits": max(len(set(hit.values())) for hit in hits),
                    **timed(calls, f"{tokens:,} tokens, {kind}"),
                }
            )
        for request in ("asked", *map(str, range(ON_THEIR_WAY * len(fleet.names)))):
            index.settle(request)
    return rows


def hashing(count: int) -> list[dict[str, Any]]:
    """vLLM's own block hashes of a prompt, in Python, and their conversion into keys."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import hash_block_tokens, init_none_hash

    init_none_hash(sha256)
    rng = random.Random(3)
    rows = []
    for tokens in (8192, 32768):
        prompt = [rng.randrange(150_000) for _ in range(tokens)]

        def run(prompt: list[int] = prompt) -> list[int]:
            parent, keys = None, []
            for start in range(0, len(prompt), PAGE):
                parent = hash_block_tokens(sha256, parent, prompt[start : start + PAGE])
                keys.append(key_of(parent))
            return keys

        rows.append({"tokens": tokens, **timed([run] * min(count, 200), f"hashing {tokens:,} tokens")})
    return rows


def encoded(rng: random.Random, batches: int, capacity: int) -> tuple[list[bytes], int]:
    """Messages as a busy engine sends them: each stores a prompt in all groups, and evicts one when it has `capacity`.

    Returns:
        the messages, token ids and all, and the number of blocks stored and removed in them.
    """
    payloads, blocks = [], 0
    held: list[list[int]] = []
    for number in range(batches):
        keys = [rng.getrandbits(64) for _ in range(rng.randrange(16, 129))]
        held.append(keys)
        rows = [(0, keys), (1, keys[-TAIL:]), (2, keys[-1:])]
        events: list[dict[str, Any]] = [
            {"type": "BlockRemoved", "block_hashes": [], "medium": None, "stream": {"epoch": 1}}
        ]
        if number == 0:
            events[0]["stream"]["rule"] = RULE.to_dict()
        for group, stored in rows:
            events.append(
                {
                    "type": "BlockStored",
                    "block_hashes": stored,
                    "parent_block_hash": keys[0],
                    "token_ids": [rng.randrange(150_000) for _ in range(PAGE * len(keys))],
                    "block_size": PAGE,
                    "lora_id": None,
                    "medium": "GPU",
                    "lora_name": None,
                    "extra_keys": [None] * len(stored),
                    "group_idx": group,
                    "kv_cache_spec_kind": "full_attention",
                    "block_indices": list(range(len(keys) - len(stored), len(keys))),
                }
            )
            blocks += len(stored)
        if len(held) > capacity:
            keys = held.pop(0)
            for group, removed in ((0, keys), (1, keys[-TAIL:]), (2, keys[-1:])):
                events.append({"type": "BlockRemoved", "block_hashes": removed, "medium": "GPU", "group_idx": group})
                blocks += len(removed)
        payloads.append(msgspec.msgpack.encode([time.time(), events, 0]))
    return payloads, blocks


def ingest(replicas: Sequence[int], batches: int) -> list[dict[str, Any]]:
    """Block events per second, decoding included, by number of replicas (as many messages in all)."""
    rows = []
    for count in replicas:
        rng = random.Random(4)
        streams = [encoded(rng, batches // count, CACHED_PROMPTS // count) for _ in range(count)]
        index = BlockIndex()
        begun, begun_busy = time.perf_counter(), time.thread_time()
        for number in range(batches // count):
            for replica, (payloads, _) in enumerate(streams):
                batch = decode(payloads[number])
                index.apply(str(replica), 1, number, batch.events, batch.rule)
        busy, wall = time.thread_time() - begun_busy, time.perf_counter() - begun
        blocks = sum(number for _, number in streams)
        assert index.stats().block_events == blocks
        assert index.stats().inconsistent == 0
        rows.append({"replicas": count, "block_events": blocks, "per_s": blocks / wall, "per_cpu_s": blocks / busy})
    return rows


def restart(fleet: Fleet, index: BlockIndex) -> dict[str, float]:
    """A replica starts anew: how long the router stands still at most, then and while it is swept."""
    begun = time.perf_counter()
    index.apply(fleet.names[0], 2, 0, [], RULE)
    forgotten = time.perf_counter() - begun
    longest, left = 0.0, True
    total = time.perf_counter()
    while left:
        begun = time.perf_counter()
        left = index.sweep(1000)
        longest = max(longest, time.perf_counter() - begun)
    return {
        "forget_ms": forgotten * 1e3,
        "sweep_ms": (time.perf_counter() - total) * 1e3,
        "longest_pause_ms": longest * 1e3,
    }


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(replicas: int, blocks: int) -> dict[str, float]:
    """Bytes per block, in a process that has nothing else: what it grew by while the index was filled."""
    fleet = Fleet(replicas, blocks)
    before = resident()
    index = BlockIndex()
    numbers = dict.fromkeys(fleet.names, 0)
    encoder = msgspec.msgpack.Encoder()
    for name, events in fleet.batches():
        # Through the wire format, so that keys are the index's own and not the fleet's.
        batch = decode(encoder.encode([0.0, events]))
        index.apply(name, 1, numbers[name], batch.events, RULE if numbers[name] == 0 else None)
        numbers[name] += 1
        fleet.own.clear()
    grown = resident() - before
    return {"blocks": index.stats().blocks, "bytes": grown, "bytes_per_block": grown / index.stats().blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=6400)
    parser.add_argument("--json", type=Path, default=Path("results/index.json"))
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_only:
        print(json.dumps(memory(options.replicas, options.blocks)))
        return
    console = Console(width=130)
    size = json.loads(
        subprocess.run(
            [sys.executable, __file__, "--memory-only", f"--blocks={options.blocks}", f"--replicas={options.replicas}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    fleet = Fleet(options.replicas, options.blocks)
    index = filled(fleet)
    results: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load": os.getloadavg()[0],
        },
        "replicas": options.replicas,
        "memory": size,
        "decisions": decisions(fleet, index, options.decisions),
        "hashing": hashing(options.decisions),
        "ingest": ingest([1, 8, 64], options.batches),
        "restart": restart(fleet, index),
    }

    console.print(
        f"{size['blocks']:,} blocks, {options.replicas} replicas, {len(RULE.groups)} groups: "
        f"{size['bytes_per_block']:.0f} bytes per block ({size['bytes'] / 2**20:.0f} MiB); "
        f"load of the machine {results['machine']['load']:.1f} on {os.cpu_count()} cores"
    )
    table = Table(
        "prompt (tokens)", "of which", "unlike hits", "p50", "p99", "max", "cpu p50", "cpu p99", title="Decision (ms)"
    )
    for row in results["decisions"]:
        times = [f"{row[name]:.2f}" for name in ("p50_ms", "p99_ms", "max_ms", "cpu_p50_ms", "cpu_p99_ms")]
        table.add_row(f"{row['tokens']:,}", row["prompt"], str(row["distinct_hits"]), *times)
    for row in results["hashing"]:
        times = [f"{row[name]:.2f}" for name in ("p50_ms", "p99_ms", "max_ms", "cpu_p50_ms", "cpu_p99_ms")]
        table.add_row(f"{row['tokens']:,}", "hashing apart (sha256, vLLM's)", "", *times)
    console.print(table)
    table = Table("replicas", "block events", "per second", "per cpu second", title="Ingest, decoding included")
    for row in results["ingest"]:
        table.add_row(str(row["replicas"]), *(f"{row[name]:,.0f}" for name in ("block_events", "per_s", "per_cpu_s")))
    console.print(table)
    gone = results["restart"]
    console.print(
        f"A replica restarts: forgotten in {gone['forget_ms']:.2f} ms; swept in {gone['sweep_ms']:.0f} ms altogether, "
        f"longest pause {gone['longest_pause_ms']:.1f} ms"
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2))
    console.print(f"saved to {options.json}")


if __name__ == "__main__":
    main()
