"""The way of KV events from engines to a router's index: ZeroMQ, vLLM's own publisher at the far end.

A replica tells where its streams are (`Source`) through its routing statistics.  The router subscribes, asks the replay
socket for what it missed, and for a snapshot where a replay cannot help; a replica whose stream is not in order counts
as empty meanwhile (`jenga.routing.BlockIndex`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from jenga.routing import AskReplay, AskSnapshot, BlockIndex, Snapshot, decode

logger = logging.getLogger("ray.serve")

ENGINE_CONFIG = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    # Port 0 of vLLM's publisher: a free port of this node's address, so that replicas share a node.
    "endpoint": "tcp://*:0",
    "replay_endpoint": "tcp://*:0",
}
"""vLLM's `kv_events_config` of every replica."""

_REPLY_S = 5.0
_RETRY_S = 0.5
_SNAPSHOT_S = 1.0
_TOLD_S = 8.0
"""A running stream is told of this often."""
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


@dataclass(frozen=True)
class Source:
    """Where a replica's stream is found, and how far it is."""

    events: str
    """Endpoint of the publisher."""
    replay: str
    """Endpoint that sends past batches again."""
    snapshots: str
    """Endpoint that sends all that is cached."""
    epoch: int
    """The engine process; another one has another cache."""
    sequence: int
    """Number of the next batch, when the stream rested last."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a replica's routing statistics."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Source | None:
        """The inverse of `to_dict`; None for anything else."""
        if not isinstance(data, Mapping):
            return None
        try:
            return cls(**data)
        except TypeError:
            return None


class Resting:
    """Tells how far a stream is when it rests, and seldom while it runs on, since every change is sent to every router.

    While batches come, each tells of those before it; what needs to be told is the loss of the last one, and that
    batches are sent at all to whom none comes any more.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is in seconds."""
        self._clock = clock
        self._seen: Source | None = None
        self._told: Source | None = None
        self._since = 0.0

    def told(self, now: Source) -> Source:
        """The stream as it is, or as it was told last."""
        late = self._clock() - self._since >= _TOLD_S
        if self._told is None or self._seen == now or self._told.epoch != now.epoch or late:
            self._told, self._since = now, self._clock()
        self._seen = now
        return self._told


class SnapshotServer:
    """Answers each message with what the replica's engine has cached."""

    def __init__(self, ask: Callable[[], Awaitable[dict[str, Any] | None]]) -> None:
        self._ask = ask
        self._taken = 0.0
        self._last: bytes | None = None
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER, socket_class=zmq.asyncio.Socket)
        self._socket.setsockopt(zmq.LINGER, 0)

    def start(self, address: str) -> str:
        """Listen on a free port of `address`; returns the endpoint."""
        port = self._socket.bind_to_random_port(f"tcp://{address}")
        self._task = asyncio.create_task(self._serve())
        return f"tcp://{address}:{port}"

    async def _serve(self) -> None:
        while True:
            client, *_ = await self._socket.recv_multipart()
            try:
                await self._socket.send_multipart([client, await self._snapshot()])
            except Exception as error:  # the next client may have more luck
                logger.warning("a snapshot of this engine's cache was not sent: %s", error)

    async def _snapshot(self) -> bytes:
        """What is cached, encoded; at most once a second, since the engine stands still for it."""
        now = time.monotonic()
        if now - self._taken > _SNAPSHOT_S or self._last is None:
            self._taken, self._last = now, None
            try:
                self._last = msgspec.msgpack.encode(await asyncio.wait_for(self._ask(), _REPLY_S))
            except Exception as error:
                logger.warning("no snapshot of this engine's cache: %s", error)
        return self._last or msgspec.msgpack.encode(None)


class EventFeed:
    """Keeps an index in step with the streams of all replicas.  Lives in one event loop."""

    def __init__(self, index: BlockIndex) -> None:
        self.index = index
        self.replays = 0
        """Times that missed batches were asked for."""
        self._lag = 0.0
        self._context = zmq.asyncio.Context.instance()
        self._followed: dict[str, tuple[int, asyncio.Task[None], asyncio.Event]] = {}

    def follow(self, sources: Mapping[str, Source]) -> None:
        """Follow these replicas' streams, and forget all others."""
        for name in self._followed.keys() - sources.keys():
            self._drop(name)
        for name, source in sources.items():
            known = self._followed.get(name)
            if known is not None and known[0] != source.epoch:
                self._drop(name)
                known = None
            if known is None:
                wake = asyncio.Event()
                task = asyncio.get_running_loop().create_task(self._follow(name, source, wake))
                self._followed[name] = (source.epoch, task, wake)
            elif self.index.epoch(name) == source.epoch and self.index.reached(name, source.epoch, source.sequence):
                known[2].set()

    @property
    def followed(self) -> int:
        """Replicas whose streams are followed, also those that have never answered."""
        return len(self._followed)

    def close(self) -> None:
        """Stop following."""
        for name in list(self._followed):
            self._drop(name)

    def _drop(self, name: str) -> None:
        _, task, _ = self._followed.pop(name)
        task.cancel()
        self.index.forget(name)

    async def _follow(self, name: str, source: Source, wake: asyncio.Event) -> None:
        """One replica's stream, until cancelled; a fault costs trust and is tried again."""
        while True:
            try:
                with self._socket(zmq.SUB, source.events) as stream:
                    stream.setsockopt(zmq.SUBSCRIBE, b"")
                    # What is published before the subscription arrives is missed, and found missing later.
                    await self._satisfy(name, source, AskSnapshot())
                    await self._listen(name, source, stream, wake)
            except Exception as error:  # whatever it was, the replica counts as empty until its stream is in order
                logger.warning("KV events of replica %s: %s: %s; starting over", name, type(error).__name__, error)
                self.index.forget(name)
                await asyncio.sleep(_RETRY_S)

    async def _listen(self, name: str, source: Source, stream: zmq.asyncio.Socket, wake: asyncio.Event) -> None:
        message: asyncio.Future[Any] | None = None
        woken: asyncio.Task[Any] | None = None
        try:
            while True:
                message = message or asyncio.ensure_future(stream.recv_multipart())
                woken = woken or asyncio.create_task(wake.wait())
                await asyncio.wait((message, woken), return_when=asyncio.FIRST_COMPLETED)
                need: AskReplay | AskSnapshot | None = None
                if message.done():
                    _, number, payload = message.result()
                    message = None
                    need = self._apply(name, source, number, payload, timed=True)
                if woken.done():
                    woken = None
                    wake.clear()
                    need = need or self.index.reached(name, source.epoch, self.index.due(name) or 0)
                if need is not None:
                    await self._satisfy(name, source, need)
        finally:
            for waiting in (message, woken):
                if waiting is not None:
                    waiting.cancel()

    def take_lag(self) -> float:
        """Longest time since the last call, in seconds, from an engine's sending of a batch to its being applied.

        By two clocks, where engine and router are on two nodes.
        """
        lag, self._lag = self._lag, 0.0
        return lag

    def _apply(
        self, name: str, source: Source, number: bytes, payload: bytes, timed: bool = False
    ) -> AskReplay | AskSnapshot | None:
        batch = decode(payload)
        if timed:
            self._lag = max(self._lag, time.time() - batch.time)
        epoch = source.epoch if batch.epoch is None else batch.epoch
        return self.index.apply(name, epoch, int.from_bytes(number, "big"), batch.events, batch.rule)

    async def _satisfy(self, name: str, source: Source, need: AskReplay | AskSnapshot | None) -> None:
        while need is not None:
            if isinstance(need, AskReplay):
                self.replays += 1
                await self._replay(name, source, need.first)
                need = self.index.replay_ended(name, source.epoch, need.first)
            else:
                need = await self._load(name, source)

    async def _replay(self, name: str, source: Source, first: int) -> None:
        with self._socket(zmq.DEALER, source.replay) as asked:
            await asked.send_multipart([b"", first.to_bytes(8, "big")])
            while True:
                *_, number, payload = await asyncio.wait_for(asked.recv_multipart(), _REPLY_S)
                if number == _END_OF_REPLAY:
                    return
                self._apply(name, source, number, payload)

    async def _load(self, name: str, source: Source) -> AskReplay | AskSnapshot | None:
        with self._socket(zmq.DEALER, source.snapshots) as asked:
            await asked.send(b"")
            data = msgspec.msgpack.decode(await asyncio.wait_for(asked.recv(), 2 * _REPLY_S))
        if data is None:
            raise ValueError("the engine gives no snapshot")
        return self.index.load(name, Snapshot.from_dict(data))

    @contextlib.contextmanager
    def _socket(self, kind: int, endpoint: str) -> Any:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.connect(endpoint)
            yield socket
        finally:
            socket.close()
