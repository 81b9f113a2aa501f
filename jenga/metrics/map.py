"""The whole buffer page by page, at one moment: what a person looks at (docs/memory-map.md).

Two questions, because the first must be cheap for any pool and the second is asked of one large page: `MemoryMap`
copies who owns each large page and the state of each small one, `LargePage` says what is in a single one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jenga.allocator import PageState, TwoLevelAllocator
from jenga.layout import Layout

VERSION = 1
"""Of what `MemoryMap.encode` writes; raised when a reader of the old form would misread the new one."""
DATA_VERSION = 2
"""Of the JSON of ``/memory/data``, which the page and `jenga top` read; raised when they rely on something new."""

_LENGTH = struct.Struct("<I")

State = Literal["live", "cached", "free", "null"]


@dataclass(frozen=True)
class MapGroup:
    """What a reader needs to know of one layer group."""

    name: str
    kind: str
    """Layer type."""
    ratio: int
    """Small pages in a large page."""
    parts: int
    """Large pages that a small page lies in, a part in each; all of them tell its state."""
    page_tokens: int
    """Tokens that a small page is for; of a state, the tokens between two boundaries where it may be kept."""
    page_bytes: int
    is_state: bool
    """A page is one recurrent state, after all tokens up to its position, instead of a run of tokens."""


@dataclass(frozen=True)
class MemoryMap:
    """Every page of the buffer at one moment."""

    taken: float
    """Seconds since the epoch."""
    large_page_bytes: int
    groups: tuple[MapGroup, ...]
    owners: bytes
    """By large page, a signed byte: the index of the group that owns it, or `jenga.allocator.UNOWNED`, `RESERVED`."""
    states: tuple[bytes, ...]
    """By group, then by small page number (``ratio`` times that of its large page): a `PageState`."""

    @classmethod
    def take(cls, layout: Layout, allocator: TwoLevelAllocator, taken: float) -> MemoryMap:
        """Copy the allocator's books."""
        owners, states = allocator.map()
        return cls(taken, layout.large_page_bytes, map_groups(layout), owners, states)

    def count(self) -> tuple[dict[PageState, int], ...]:
        """Small pages by state, by group; the free ones are those of large pages that the group owns."""
        counts = []
        for index, (group, states) in enumerate(zip(self.groups, self.states, strict=True)):
            live, cached = (states.count(state) // group.parts for state in (PageState.LIVE, PageState.CACHED))
            slots = self.owners.count(index) * group.ratio // group.parts
            counts.append({PageState.LIVE: live, PageState.CACHED: cached, PageState.FREE: slots - live - cached})
        return tuple(counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the way out of the engine core; the arrays stay bytes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryMap:
        """The inverse of `to_dict`; sequences may have become lists on the way."""
        return cls(**{**data, "groups": tuple(MapGroup(**g) for g in data["groups"]), "states": tuple(data["states"])})

    def encode(self, replica: str) -> bytes:
        """The map as a browser reads it: four bytes with the header's length, little-endian; the header, JSON; the
        owners; the states of each group.  Long runs of equal bytes: compress it (gzip: a few per cent)."""
        header = json.dumps(
            {
                "version": VERSION,
                "replica": replica,
                "taken": self.taken,
                "large_pages": len(self.owners),
                "large_page_bytes": self.large_page_bytes,
                "groups": [asdict(group) for group in self.groups],
            }
        ).encode()
        return b"".join((_LENGTH.pack(len(header)), header, self.owners, *self.states))

    @classmethod
    def decode(cls, data: bytes) -> tuple[str, MemoryMap]:
        """The inverse of `encode`: the replica's name and its map.

        Raises:
            ValueError: written in another version, or cut short.
        """
        start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
        header = json.loads(data[_LENGTH.size : start])
        if header["version"] != VERSION:
            raise ValueError(f"memory map of version {header['version']}, this is {VERSION}")
        groups = tuple(MapGroup(**g) for g in header["groups"])
        arrays = []
        for size in (header["large_pages"], *(header["large_pages"] * g.ratio for g in groups)):
            arrays.append(data[start : start + size])
            start += size
        if start != len(data):
            raise ValueError(f"memory map of {len(data)} bytes, its header speaks of {start}")
        return header["replica"], cls(header["taken"], header["large_page_bytes"], groups, arrays[0], tuple(arrays[1:]))


@dataclass(frozen=True)
class SmallPage:
    """One small page."""

    page: int
    """Its number in its group."""
    state: State
    owners: tuple[str, ...] = ()
    """Ids of the requests that hold it: several where they share a prefix, none unless it is live."""
    begin: int | None = None
    """Position in the prefix, in tokens, of the first token stored in it; None if it holds nothing."""
    end: int | None = None
    """Position behind the last token stored in it (of a state: the tokens that it sums up)."""
    unused_s: float | None = None
    """Seconds since a request last held it; 0 while one does, None if it holds nothing."""


@dataclass(frozen=True)
class LargePage:
    """What is in one large page."""

    large: int
    """Its number; where pages lie in several large pages, each of them shows them all."""
    state: Literal["owned", "free", "reserved"]
    group: str | None
    """Name of the group that owns it."""
    pages: tuple[SmallPage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def map_groups(layout: Layout) -> tuple[MapGroup, ...]:
    """The layout's groups, as the map describes them."""
    return tuple(
        MapGroup(
            name=place.group.name,
            kind=place.group.policy.kind,
            ratio=place.ratio,
            parts=place.parts,
            page_tokens=place.group.page_tokens,
            page_bytes=place.group.page_bytes,
            is_state=not place.group.policy.token_pages,
        )
        for place in layout.groups
    )
