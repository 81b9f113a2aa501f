"""KV events that an index outside the engine can be exact with (docs/events.md).

vLLM's events stay as they are, its wire format too.  Added are fields that its readers ignore: who sends (an epoch per
engine process), the hit rule, the positions of a sparse event's blocks, and whether a stored event adds copies.
Beside the stream, the engine core answers two questions: where the stream is, and what is cached now.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from vllm.distributed.kv_events import (
    BlockRemoved,
    BlockStored,
    EventBatch,
    EventPublisher,
    KVCacheEvent,
    KVEventBatch,
    NullEventPublisher,
)
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator, UnitaryKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import (
    BlockHashList,
    KVCacheBlock,
    get_block_hash,
    get_group_id,
    maybe_convert_block_hash,
    resolve_block_hashes,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import iter_layer_specs
from vllm.v1.request import Request

from jenga.routing import GroupRule, HitRule, Snapshot
from jenga.vllm_plugin import settings
from jenga.vllm_plugin.checkpoints import Checkpoints
from jenga.vllm_plugin.config import CheckpointOptions, JengaKVCacheConfig
from jenga.vllm_plugin.groups import group_name, policy_of


class PlacedBlockStored(BlockStored, tag="BlockStored"):
    """A `BlockStored` that says where in the sequence its blocks lie."""

    block_indices: list[int] | None = None
    """Index of each block in its sequence, in the group's own blocks: sparse groups leave gaps."""
    copies: int = 1
    """Pages that each hash gained; 0 where reused blocks are only reported again."""


class StreamHeader(BlockRemoved, tag="BlockRemoved"):
    """First event of every batch; to readers that do not know it, the removal of nothing."""

    stream: dict[str, Any] | None = None


class StreamPublisher(EventPublisher):
    """Puts the header in front of each batch, and knows the number that the next one will have.

    The number is vLLM's own: its publisher counts the batches that it is given, and only this one gives it any.
    """

    def __init__(self, publisher: EventPublisher, scheduler: Any) -> None:
        self._publisher = publisher
        self._scheduler = scheduler
        self._contents = settings.read(scheduler.vllm_config).events.contents
        self.epoch = secrets.randbits(62)
        """Names this engine process: sequence numbers start anew with each."""
        self.sequence = 0
        """Number of the next batch."""

    @cached_property
    def rule(self) -> HitRule | None:
        """How this engine's cache is hit, None where nobody but vLLM knows."""
        return hit_rule(self._scheduler)  # not before it is asked for: the hash's root is set after the scheduler

    @property
    def _checkpoints(self) -> Checkpoints | None:
        return getattr(self._scheduler.kv_cache_manager.coordinator, "checkpoints", None)

    def publish(self, events: EventBatch) -> None:
        header: dict[str, Any] = {"epoch": self.epoch}
        if self.sequence == 0 and self.rule is not None:
            header["rule"] = self.rule.to_dict()
        if junctions := self._checkpoints.take_learned() if self._checkpoints else ():
            header["junctions"] = [maybe_convert_block_hash(junction) for junction in junctions]
        if not self._contents:
            for event in events.events:
                if isinstance(event, BlockStored):
                    event.token_ids, event.extra_keys = [], None
        events.events = [StreamHeader(block_hashes=[], medium=None, stream=header), *compact(events.events)]
        self._publisher.publish(events)
        self.sequence += 1

    def shutdown(self) -> None:
        self._publisher.shutdown()

    def get_publisher_config(self) -> Any:
        return self._publisher.get_publisher_config()


def compact(events: Iterable[KVCacheEvent]) -> list[KVCacheEvent]:
    """The same events, fewer: neighbouring removals of a group in one, none that names no block.

    vLLM sends a removal per page, and for sparse groups stored events whose every block was left out.
    """

    def kind(event: KVCacheEvent) -> object:
        if isinstance(event, BlockRemoved):
            return event.group_idx, event.medium, event.locality, event.ownership
        return id(event)

    merged: list[KVCacheEvent] = []
    for _, run in groupby(events, kind):
        first, *others = run
        if isinstance(first, BlockRemoved) and others:
            for event in others:
                assert isinstance(event, BlockRemoved)
                first.block_hashes.extend(event.block_hashes)
        if not isinstance(first, BlockRemoved | BlockStored) or first.block_hashes:
            merged.append(first)
    return merged


def placed(event: BlockStored, hashes: BlockHashList, start: int) -> PlacedBlockStored:
    """`event` with the positions of its blocks.

    `hashes` are those of all the request's blocks, `start` is the index of the first that the event is about.
    """
    indices = []
    index = start
    for block_hash in event.block_hashes:
        while maybe_convert_block_hash(hashes[index]) != block_hash:
            index += 1
        indices.append(index)
        index += 1
    return _with_fields(event, block_indices=indices)


def _with_fields(event: BlockStored, **extra: Any) -> PlacedBlockStored:
    return PlacedBlockStored(**{name: getattr(event, name) for name in event.__struct_fields__}, **extra)


def emit_cached_block_events(
    self: KVCacheCoordinator, request: Request, computed_blocks: tuple[Sequence[KVCacheBlock], ...]
) -> None:
    """Report the blocks of a hit again, for a request that asks for it (``kv_cache_report_mode: full``).

    vLLM lists blocks that a sparse group does not have, and as if they had been stored once more: here are those
    that it has, with ``copies: 0``.
    """
    for group, (manager, row) in enumerate(zip(self.single_type_managers, computed_blocks, strict=True)):
        pool, size = manager.block_pool, manager.block_size
        indices = [index for index, block in enumerate(row) if not block.is_null]
        if not pool.enable_kv_cache_events or not indices:
            continue
        hashes = resolve_block_hashes(request.block_hashes, pool.hash_block_size, size)
        keys, image = [], 0
        for index in indices:
            extra, image = kv_cache_utils.generate_block_hash_extra_keys(
                request, index * size, (index + 1) * size, image
            )
            keys.append(extra)
        start = indices[0]
        event = BlockPool._build_block_stored_event(
            pool,
            request,
            block_hashes=[maybe_convert_block_hash(hashes[index]) for index in indices],
            parent_block_hash=maybe_convert_block_hash(hashes[start - 1]) if start else None,
            start_token_idx=start * size,
            end_token_idx=len(row) * size,
            block_size=size,
            kv_cache_group_id=group,
            extra_keys_list=keys,
        )
        pool.kv_event_queue.append(_with_fields(event, block_indices=indices, copies=0))


def hit_rule(scheduler: Any) -> HitRule | None:
    """How this engine's prefix cache is hit, None where vLLM's own rule for several groups is in charge."""
    manager = scheduler.kv_cache_manager
    coordinator, config = manager.coordinator, manager.kv_cache_config
    chosen = CheckpointOptions()
    if isinstance(config, JengaKVCacheConfig):
        named = [(place.group.name, place.group.policy) for place in config.layout.groups]
        alignment = coordinator.scheduler_block_size
        chosen = coordinator.checkpoints.options
    elif type(coordinator) is UnitaryKVCacheCoordinator and not manager.use_eagle:
        spec = config.kv_cache_groups[0].kv_cache_spec
        spec = next(iter(iter_layer_specs(spec)))
        policy = policy_of(spec)
        if policy is None:
            return None
        named, alignment = [(group_name(spec), policy)], coordinator.single_type_managers[0].block_size
    else:
        return None
    return HitRule(
        groups=tuple(
            GroupRule(name, policy, group.block_size)
            for (name, policy), group in zip(named, coordinator.single_type_managers, strict=True)
        ),
        alignment=alignment,
        hash_tokens=manager.block_pool.hash_block_size,
        root=kv_cache_utils.NONE_HASH.hex() if manager.enable_caching else "",
        turn_marks=chosen.markers,
        pass_tokens=chosen.pass_tokens,
    )


def flush(scheduler: Any) -> None:
    """Free what no hit can get to any more; publish what has happened since the last step, instead of with the next."""
    coordinator = scheduler.kv_cache_manager.coordinator
    if hasattr(coordinator, "sweep"):  # Jenga's
        coordinator.sweep()
    if isinstance(scheduler.kv_event_publisher, StreamPublisher) and (
        events := scheduler.kv_cache_manager.take_events()
    ):
        scheduler.kv_event_publisher.publish(KVEventBatch(ts=time.time(), events=events))


def jenga_event_stream(self: EngineCore) -> dict[str, Any] | None:
    """Where the stream is: endpoints, epoch, number of the next batch and hit rule; None if events are off."""
    publisher = _publisher(self)
    if publisher is None:
        return None
    flush(self.scheduler)
    rule = None if publisher.rule is None else publisher.rule.to_dict()
    config = publisher.get_publisher_config()
    return {
        "events": config and config.endpoint,
        "replay": config and config.replay_endpoint,
        "epoch": publisher.epoch,
        "sequence": publisher.sequence,
        "rule": rule,
    }


def jenga_cache_snapshot(self: EngineCore) -> dict[str, Any] | None:
    """Everything cached at this point of the stream, as `jenga.routing.Snapshot`; None if events are off."""
    publisher = _publisher(self)
    if publisher is None:
        return None
    flush(self.scheduler)
    manager: Any = self.scheduler.kv_cache_manager  # type: ignore[attr-defined]  # of vLLM's scheduler class
    managers = manager.coordinator.single_type_managers
    pages: list[list[Any]] = [[] for _ in managers]
    for pool in dict.fromkeys(m.block_pool for m in managers):
        for key, found in pool.cached_block_hash_to_block._cache.items():
            copies = len(found) if isinstance(found, dict) else 1
            pages[get_group_id(key)] += [get_block_hash(key)] * copies
    checkpoints = getattr(manager.coordinator, "checkpoints", None)
    junctions = checkpoints.shared if checkpoints else ()
    return Snapshot.of(publisher.epoch, publisher.sequence, publisher.rule, pages, junctions).to_dict()


def _publisher(core: EngineCore) -> StreamPublisher | None:
    publisher = getattr(core.scheduler, "kv_event_publisher", None)
    return publisher if isinstance(publisher, StreamPublisher) else None


def install() -> None:
    """Give every scheduler that publishes events the stream described here."""
    make, reset, schedule = Scheduler.__init__, Scheduler.reset_prefix_cache, Scheduler.schedule

    def make_with_stream(self: Scheduler, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        publisher: Any = self.kv_event_publisher
        if not isinstance(publisher, NullEventPublisher | StreamPublisher):
            self.kv_event_publisher = StreamPublisher(publisher, self)

    def reset_prefix_cache(self: Scheduler, *args: Any, **kwargs: Any) -> bool:
        done: bool = reset(self, *args, **kwargs)
        # vLLM would send it with the next step, which may be long in coming.
        flush(self)
        return done

    def schedule_and_tell(self: Scheduler, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = schedule(self, *args, **kwargs)
        # vLLM would send it when the step has been computed: a router would promise what is evicted already.
        flush(self)
        return output

    replaced: tuple[tuple[type, str, Any], ...] = (
        (Scheduler, "__init__", make_with_stream),
        (Scheduler, "schedule", schedule_and_tell),
        (Scheduler, "reset_prefix_cache", reset_prefix_cache),
        (KVCacheCoordinator, "emit_cached_block_events", emit_cached_block_events),
        (EngineCore, "jenga_event_stream", jenga_event_stream),
        (EngineCore, "jenga_cache_snapshot", jenga_cache_snapshot),
    )
    for owner, name, function in replaced:
        setattr(owner, name, function)
