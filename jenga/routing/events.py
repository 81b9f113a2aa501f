"""The KV event stream as an index reads it: vLLM's batches with Jenga's optional fields (docs/events.md).

Only what an index needs is decoded.  Token ids, most of a batch's bytes, are skipped by the decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from jenga.routing.rule import HitRule

ON_DEVICE = "GPU"
"""vLLM's name for the memory that the engine computes in, on every platform; other media never serve a prefix hit."""

BlockHash = int | bytes


class StreamHeader(msgspec.Struct):
    """Who sent a batch, and on its first batch by which rule its cache is hit."""

    epoch: int
    rule: dict[str, Any] | None = None
    junctions: list[BlockHash] = []


class BlockStored(msgspec.Struct, tag=True):
    """Blocks of one layer group became findable."""

    block_hashes: list[BlockHash]
    group_idx: int | None = None
    medium: str | None = None
    copies: int = 1
    """Pages that each hash gained; 0 for a report of what was stored before."""


class BlockRemoved(msgspec.Struct, tag=True):
    """One page each with the contents of these blocks is gone."""

    block_hashes: list[BlockHash]
    group_idx: int | None = None
    medium: str | None = None
    stream: StreamHeader | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """Nothing is cached any more, in any group."""


class JunctionsLearned(msgspec.Struct):
    """Prefixes, each named by its last block, at whose end requests have parted: what a hit needs is kept there."""

    block_hashes: list[BlockHash]


WireEvent = BlockStored | BlockRemoved | AllBlocksCleared
Event = WireEvent | JunctionsLearned


class _WireBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[WireEvent]
    data_parallel_rank: int | None = None


_decoder = msgspec.msgpack.Decoder(_WireBatch)


@dataclass(frozen=True, slots=True)
class Batch:
    """One message of the stream."""

    time: float
    """When the engine published it, seconds since 1970 on its clock."""
    epoch: int | None
    """The engine process that sent it; None if that engine runs without Jenga's plugin."""
    rule: HitRule | None
    """Sent with the first batch of an epoch."""
    events: Sequence[Event]
    rank: int | None
    """Data-parallel rank: each has a cache, sequence numbers and an address of its own."""


def decode(payload: bytes) -> Batch:
    """Decode the payload frame of one message.

    Raises:
        ValueError: it is no batch of KV events, or its hit rule is not one of ours.
    """
    try:
        wire = _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ValueError(f"no batch of KV events: {error}") from error
    header = wire.events[0].stream if wire.events and isinstance(wire.events[0], BlockRemoved) else None
    if header is None:
        return Batch(wire.ts, None, None, wire.events, wire.data_parallel_rank)
    rule = None if header.rule is None else HitRule.from_dict(header.rule)
    events: list[Event] = [JunctionsLearned(header.junctions)] if header.junctions else []
    return Batch(wire.ts, header.epoch, rule, [*events, *wire.events[1:]], wire.data_parallel_rank)


def key_of(block_hash: BlockHash) -> int:
    """A block hash as the index files it: its last 64 bits, which is also what vLLM puts into events by default."""
    return block_hash if isinstance(block_hash, int) else int.from_bytes(block_hash[-8:], "big")


def keys_of(hashes: list[BlockHash]) -> list[int]:
    """`key_of` each."""
    if hashes and not isinstance(hashes[0], int):
        return [key_of(block_hash) for block_hash in hashes]
    return hashes  # type: ignore[return-value]  # an engine sends one kind


@dataclass(frozen=True)
class GroupContents:
    """What one layer group has cached."""

    blocks: list[int]
    """Keys of all blocks."""
    copies: Mapping[int, int]
    """Number of pages, for blocks with more than one."""


@dataclass(frozen=True)
class Snapshot:
    """A cache as it was between two batches."""

    epoch: int
    sequence: int
    """Number of the first batch that this does not contain yet."""
    rule: HitRule | None
    groups: tuple[GroupContents, ...]
    junctions: tuple[int, ...] = ()
    """Keys of `JunctionsLearned`, the one seen longest ago first."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the way between processes."""
        return {
            "epoch": self.epoch,
            "sequence": self.sequence,
            "rule": None if self.rule is None else self.rule.to_dict(),
            "groups": [
                {"blocks": group.blocks, "copies": [list(pair) for pair in group.copies.items()]}
                for group in self.groups
            ],
            "junctions": list(self.junctions),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Snapshot:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or the hit rule is not one of ours.
        """
        try:
            return cls(
                epoch=int(data["epoch"]),
                sequence=int(data["sequence"]),
                rule=None if data["rule"] is None else HitRule.from_dict(data["rule"]),
                groups=tuple(
                    GroupContents(list(group["blocks"]), {int(k): int(n) for k, n in group["copies"]})
                    for group in data["groups"]
                ),
                junctions=tuple(map(int, data.get("junctions", ()))),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no snapshot: {type(error).__name__}: {error}") from error

    @classmethod
    def of(
        cls,
        epoch: int,
        sequence: int,
        rule: HitRule | None,
        pages: Iterable[Iterable[BlockHash]],
        junctions: Iterable[BlockHash] = (),
    ) -> Snapshot:
        """From the block hash of every cached page, by group; equal hashes are copies."""
        groups = []
        for hashes in pages:
            counts: dict[int, int] = {}
            for block_hash in hashes:
                key = key_of(block_hash)
                counts[key] = counts.get(key, 0) + 1
            groups.append(GroupContents(list(counts), {key: n for key, n in counts.items() if n > 1}))
        return cls(epoch, sequence, rule, tuple(groups), tuple(map(key_of, junctions)))
