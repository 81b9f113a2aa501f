"""The event feed over real sockets, with vLLM's own publisher at the other end.

Inter-process sockets in a scratch folder: no port is opened.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq.asyncio
from vllm.distributed.kv_events import BlockRemoved, KVEventBatch, ZmqEventPublisher

from deployments.events import EventFeed, Resting, Source
from jenga.policies import FullAttention
from jenga.routing import BlockIndex, GroupRule, HitRule, Snapshot
from jenga.vllm_plugin.events import PlacedBlockStored, StreamHeader

RULE = HitRule((GroupRule("full", FullAttention(), 16),), 16, 16, "ab")


class Engine:
    """A publisher like an engine's, and what it would have cached."""

    def __init__(self, folder: Path, epoch: int, loss: float = 0.0, buffer: int = 10_000) -> None:
        self.epoch, self.sequence, self.loss = epoch, 0, loss
        self.blocks: list[int] = []
        self.snapshots_served = 0
        self.publisher = ZmqEventPublisher(0, f"ipc://{folder}/pub", f"ipc://{folder}/replay", buffer_steps=buffer)
        self._rng = random.Random(epoch)
        if loss:
            send = self.publisher._pub.send_multipart
            self.publisher._pub.send_multipart = lambda *a, **k: None if self._rng.random() < loss else send(*a, **k)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.bind(f"ipc://{folder}/snapshots")
        self._task = asyncio.create_task(self._answer())
        self.folder = folder

    async def _answer(self) -> None:
        while True:
            client, *_ = await self._socket.recv_multipart()
            self.snapshots_served += 1
            snapshot = Snapshot.of(self.epoch, self.sequence, RULE, [self.blocks]).to_dict()
            await self._socket.send_multipart([client, msgspec.msgpack.encode(snapshot)])

    def store(self, *keys: int) -> None:
        """One batch: these blocks became findable."""
        header: dict[str, Any] = {"epoch": self.epoch} | ({"rule": RULE.to_dict()} if not self.sequence else {})
        stored = PlacedBlockStored(
            block_hashes=list(keys),
            parent_block_hash=None,
            token_ids=[],
            block_size=16,
            lora_id=None,
            medium="GPU",
            lora_name=None,
            group_idx=0,
        )
        self._publish(header, stored)
        self.blocks += keys

    def remove(self, *keys: int) -> None:
        """One batch: these blocks were evicted."""
        self._publish({"epoch": self.epoch}, BlockRemoved(block_hashes=list(keys), medium="GPU", group_idx=0))
        self.blocks = [key for key in self.blocks if key not in keys]

    def _publish(self, header: dict[str, Any], event: Any) -> None:
        first = StreamHeader(block_hashes=[], medium=None, stream=header)
        self.publisher.publish(KVEventBatch(ts=0.0, events=[first, event]))
        self.sequence += 1

    def block(self) -> threading.Event:
        """Hold the publisher's thread, which also answers replays, until the event is set."""
        send, flows = self.publisher._pub.send_multipart, threading.Event()

        def held(*args: Any, **kwargs: Any) -> Any:
            flows.wait()
            return send(*args, **kwargs)

        self.publisher._pub.send_multipart = held
        return flows

    @property
    def source(self) -> Source:
        at = f"ipc://{self.folder}"
        return Source(f"{at}/pub", f"{at}/replay", f"{at}/snapshots", self.epoch, self.sequence)

    def stop(self) -> None:
        self._task.cancel()
        self._socket.close(linger=0)
        self.publisher.shutdown()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:  # short: a socket's path has at most 107 bytes
        yield Path(made)


def in_loop(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """Run an asynchronous test."""

    def run(folder: Path) -> None:
        asyncio.run(asyncio.wait_for(test(folder), 60))

    run.__name__ = test.__name__
    return run


async def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something to become true."""
    for _ in range(int(seconds / 0.02)):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not become true in time")


def known(index: BlockIndex, keys: list[int]) -> int:
    """Tokens of a prompt of these blocks that replica "r" is believed to have."""
    hit = index.hits(keys, 16 * len(keys) + 1).get("r")
    return hit.tokens if hit else 0


@in_loop
async def test_a_late_router_learns_everything(folder: Path) -> None:
    engine = Engine(folder, epoch=1)
    engine.store(1, 2, 3)
    engine.store(4)
    feed = EventFeed(BlockIndex())
    feed.follow({"r": engine.source})
    await until(lambda: feed.index.trusted("r"))
    assert known(feed.index, [1, 2, 3, 4, 5]) == 64
    engine.store(5)
    await until(lambda: known(feed.index, [1, 2, 3, 4, 5]) == 80)
    feed.follow({})
    assert feed.index.replicas() == ()
    feed.close()
    engine.stop()


@in_loop
async def test_lost_messages_are_found_and_fetched(folder: Path) -> None:
    engine = Engine(folder, epoch=2, loss=0.05)
    feed = EventFeed(BlockIndex())
    feed.follow({"r": engine.source})
    await until(lambda: feed.index.trusted("r"))
    keys = list(range(100, 700))
    for key in keys:
        engine.store(key)
        if key % 50 == 0:
            await asyncio.sleep(0.05)
    # The last message may be lost too: the replica's statistics tell how far the stream is.
    await asyncio.sleep(0.3)
    feed.follow({"r": engine.source})
    await until(lambda: feed.index.trusted("r") and known(feed.index, keys) == 16 * len(keys))
    assert feed.replays > 0
    assert feed.index.stats().inconsistent == 0
    feed.close()
    engine.stop()


@in_loop
async def test_what_cannot_be_replayed_is_taken_from_a_snapshot(folder: Path) -> None:
    engine = Engine(folder, epoch=3, buffer=2)
    feed = EventFeed(BlockIndex())
    feed.follow({"r": engine.source})
    await until(lambda: feed.index.trusted("r"))
    served = engine.snapshots_served
    send = engine.publisher._pub.send_multipart
    engine.publisher._pub.send_multipart = lambda *a, **k: None
    for key in range(10):
        engine.store(key)
    await until(lambda: engine.publisher._event_queue.empty())
    await asyncio.sleep(0.2)
    engine.publisher._pub.send_multipart = send
    engine.store(10)
    await until(lambda: feed.index.trusted("r") and known(feed.index, list(range(11))) == 16 * 11)
    assert engine.snapshots_served > served
    feed.close()
    engine.stop()


@in_loop
async def test_a_stream_blocked_for_ten_seconds_promises_nothing_that_is_gone(folder: Path) -> None:
    engine = Engine(folder, epoch=6)
    feed = EventFeed(BlockIndex())
    feed.follow({"r": engine.source})
    await until(lambda: feed.index.trusted("r"))
    engine.store(1, 2, 3)
    await until(lambda: known(feed.index, [1, 2, 3]) == 48)
    flows = engine.block()
    for gone in (3, 2, 1):  # the replica's statistics still arrive, and tell that the stream has gone on
        engine.remove(gone)
        feed.follow({"r": engine.source})
        await until(lambda: not feed.index.trusted("r"), seconds=2)
        for _ in range(33):
            # A snapshot, which needs no publisher, may bring back what is true; nothing else may.
            assert known(feed.index, [1, 2, 3]) in (0, 16 * (gone - 1))
            await asyncio.sleep(0.1)
    engine.store(1)
    engine.store(2, 7)
    flows.set()
    await asyncio.sleep(0.2)
    feed.follow({"r": engine.source})
    await until(lambda: feed.index.trusted("r") and known(feed.index, [1, 2, 7, 3]) == 48)
    engine.store(3)
    await until(lambda: known(feed.index, [1, 2, 7, 3]) == 64)
    assert feed.index.stats().inconsistent == 0
    feed.close()
    engine.stop()


@in_loop
async def test_a_restarted_engine_has_nothing(folder: Path) -> None:
    engine = Engine(folder, epoch=4)
    feed = EventFeed(BlockIndex())
    feed.follow({"r": engine.source})
    await until(lambda: feed.index.trusted("r"))
    engine.store(1, 2)
    await until(lambda: known(feed.index, [1, 2]) == 32)
    engine.stop()
    again = Engine(folder, epoch=5)  # at the same address
    again.store(1)
    feed.follow({"r": again.source})
    assert known(feed.index, [1, 2]) == 0, "nothing is promised from the moment that the new engine is known"
    await until(lambda: feed.index.trusted("r") and known(feed.index, [1, 2]) == 16)
    feed.close()
    again.stop()


@in_loop
async def test_a_replica_without_an_answer_counts_as_empty(folder: Path) -> None:
    feed = EventFeed(BlockIndex())
    at = f"ipc://{folder}"
    feed.follow({"r": Source(f"{at}/pub", f"{at}/replay", f"{at}/snapshots", 9, 3)})
    await asyncio.sleep(0.2)
    assert not feed.index.trusted("r")
    assert known(feed.index, [1]) == 0
    feed.close()


def test_statistics_carry_sources_and_nothing_else() -> None:
    source = Source("tcp://a:1", "tcp://a:2", "tcp://a:3", 5, 7)
    assert Source.from_dict(source.to_dict()) == source
    assert Source.from_dict(None) is None
    assert Source.from_dict({"events": "x"}) is None


def test_how_far_a_stream_is_is_told_when_it_rests() -> None:
    """Each change is sent to every router; while batches come, each tells of those before it."""

    def at(sequence: int, epoch: int = 1) -> Source:
        return Source("events", "replay", "snapshots", epoch, sequence)

    now = 0.0
    resting = Resting(lambda: now)
    told = []
    # In the statistics' period of 2 s: it runs, rests, runs for long; then another engine process.
    for source in (*map(at, (0, 5, 9, 9, 9, 12, 15, 18, 21, 24)), at(3, epoch=2), at(7, epoch=2), at(7, epoch=2)):
        one = resting.told(source)
        told.append((one.epoch, one.sequence))
        now += 2
    first = [(1, sequence) for sequence in (0, 0, 0, 9, 9, 9, 9, 9, 21, 21)]
    assert told == [*first, (2, 3), (2, 3), (2, 7)]
