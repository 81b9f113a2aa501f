"""Prompts on their way to replicas, as a prefix tree over the names of their blocks.

A block's name stands for all before it, so two prompts share a beginning and never meet again.  Whatever is asked,
added or removed costs one comparison of lists per place where prompts part, not a look-up per block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence


class _Node:
    """Blocks that the same prompts have, behind those of the parent."""

    __slots__ = ("children", "holders", "keys", "lanes")

    def __init__(self, keys: Sequence[int], holders: dict[int, int]) -> None:
        self.keys = keys
        self.holders = holders  # a replica's lanes: its prompts that have these blocks
        self.lanes = 0
        self.children: dict[int, _Node] = {}  # by their first block
        self._look()

    def _look(self) -> None:
        self.lanes = 0
        for lanes in self.holders:
            self.lanes |= lanes

    def enter(self, lanes: int) -> None:
        self.holders[lanes] = self.holders.get(lanes, 0) + 1
        self.lanes |= lanes

    def leave(self, lanes: int) -> bool:
        """Whether other prompts are left."""
        self.holders[lanes] -= 1
        if not self.holders[lanes]:
            del self.holders[lanes]
            self._look()
        return bool(self.holders)

    def split(self, at: int) -> None:
        """Keep the first `at` blocks, and hand the others down."""
        below = _Node(self.keys[at:], dict(self.holders))
        below.children = self.children
        self.keys, self.children = self.keys[:at], {below.keys[0]: below}

    def common(self, keys: Sequence[int], start: int) -> int:
        """How many of its blocks a prompt has from `start` on."""
        size = len(self.keys)
        if keys[start : start + size] == self.keys:
            return size
        most = min(size, len(keys) - start)
        return bisect_left(range(most), True, key=lambda i: self.keys[i] != keys[start + i])


class PromptTree:
    """Prompts by the lanes (bits of the index) that will have all their blocks."""

    def __init__(self) -> None:
        self._top: dict[int, _Node] = {}
        self._prompts: dict[str, tuple[int, Sequence[int]]] = {}

    def add(self, request: str, lanes: int, keys: Sequence[int]) -> None:
        """`request`, a prompt with these blocks, was sent to the replica with these `lanes`."""
        self.settle(request)
        self._prompts[request] = lanes, keys
        at, children = 0, self._top
        while at < len(keys):
            node = children.get(keys[at])
            if node is None:
                children[keys[at]] = _Node(keys[at:], {lanes: 1})
                return
            common = node.common(keys, at)
            if common < len(node.keys):
                node.split(common)
            node.enter(lanes)
            at, children = at + common, node.children

    def settle(self, request: str) -> None:
        """`request` is done.  An unknown one is no error."""
        lanes, keys = self._prompts.pop(request, (0, ()))
        at, children = 0, self._top
        while at < len(keys):
            node = children[keys[at]]
            if not node.leave(lanes):
                del children[keys[at]]  # with all below, which was this prompt's alone
                return
            at, children = at + len(node.keys), node.children

    def forget(self, lanes: int) -> None:
        """Nothing is on its way to these lanes any more."""
        for request in [request for request, (theirs, _) in self._prompts.items() if theirs & lanes]:
            self.settle(request)

    def shared(self, keys: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Lanes with prompts that begin as this one, and how many of its blocks they have; each lane once."""
        at, children, lanes = 0, self._top, 0
        while at < len(keys) and (node := children.get(keys[at])) is not None:
            if parted := lanes & ~node.lanes:
                yield parted, at
            lanes, common = node.lanes, node.common(keys, at)
            at, children = at + common, node.children
            if common < len(node.keys):
                break
        if lanes:
            yield lanes, at
