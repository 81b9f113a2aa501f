"""Cached pages that no hit can get to are freed at once: `jenga.reach` applied to vLLM's blocks and hashes.

A page is cached while it has a *name*, its block hash with the number of its group.  Several requests that compute the
same at once make copies: pages with one name, of which one is enough for those behind.

Nearly always one group needs every page, and its pages are the unit of hashing.  Then it is noted which of them stands
behind which, by their numbers, when a request ends: until then it holds them all.  Other groups' pages with the hash of
one of these pages end where that ends and stand behind it, so nothing is noted of them.  Otherwise every page is noted
when it is cached, by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import (
    BlockHashWithGroupId,
    KVCacheBlock,
    get_block_hash,
    get_group_id,
    make_block_hash_with_group_id,
    resolve_block_hashes,
)
from vllm.v1.request import Request

from jenga.reach import Reach, page_before

if TYPE_CHECKING:
    from jenga.vllm_plugin.pool import GroupPool

Name = BlockHashWithGroupId


class Chains:
    """Which cached pages stand behind which, over the pools of all groups.

    `dense` lists the groups that a hit needs every page of, as (group, tokens per page), ascending; at least one.
    """

    def __init__(self, pools: Sequence[GroupPool], dense: Sequence[tuple[int, int]]) -> None:
        self._pools = pools
        self._dense = dense
        self._sizes = dict(dense)
        self._pages: Reach[int] = Reach()
        self._names: Reach[Name] = Reach()
        self.lost: list[tuple[int, Name]] = []
        """Pages that have lost their names since the last `sweep`."""
        (first, page_tokens), *more = dense
        self.spine = first if not more and page_tokens == pools[0].hash_block_size else None
        """The only group of which pages are noted; None: all."""
        for group, pool in enumerate(pools):
            pool.chains = self if self.spine is None else None
            pool.lost = self.lost if self.spine in (None, group) else None

    def __len__(self) -> int:
        """Pages of which is noted what they stand behind."""
        return len(self._pages) + len(self._names)

    def ends(self, row: Sequence[KVCacheBlock]) -> None:
        """A request that holds these pages of the `spine` is about to release them."""
        self.sweep()  # what is noted of a page must be of its present contents
        # Any of them may be noted already, and others before them not: a hit takes whichever copy it finds.
        chain = [block.block_id for block in row if block.block_hash]
        if chain:
            self._pages.add_run(chain[1:], chain[0])

    def stored(
        self, request: Request, group: int, blocks: Sequence[KVCacheBlock], first: int, stop: int, page_tokens: int
    ) -> None:
        """Of `blocks`, a request's pages, those from `first` to `stop` that have a name can be found now."""
        for index in range(first, stop):
            if (name := blocks[index].block_hash) is not None:
                self.placed(request, group, name, (index + 1) * page_tokens)

    def placed(self, request: Request, group: int, name: Name, end: int) -> None:
        """The page `name`, which ends behind token `end` of `request`, can be found now."""
        found = page_before(self._dense, group, end)
        if found is not None:
            other, index = found
            hashes = resolve_block_hashes(request.block_hashes, self._pools[other].hash_block_size, self._sizes[other])
            self._names.add(name, make_block_hash_with_group_id(hashes[index], other))

    def sweep(self) -> None:
        """Free what cannot be reached any more.  Not while the allocator evicts: it would find its books changed."""
        while self.lost:
            lost, self.lost[:] = self.lost[:], []
            if self.spine is None:
                self._sweep_names(lost)
            else:
                self._sweep_pages(self._pools[self.spine], lost)

    def clear(self) -> None:
        """Nothing is cached any more."""
        self._pages.clear()
        self._names.clear()
        self.lost.clear()

    def check(self) -> None:
        """Raises: AssertionError: something is cached that no hit can get to."""
        for pool in self._pools:
            for name in pool.names:
                said = f"group {pool.group}: {name.hex()} is cached, the page before it is not"
                if self.spine is not None:
                    beside = make_block_hash_with_group_id(get_block_hash(name), self.spine)
                    assert beside in self._pools[self.spine].names, said
                elif (before := self._names.before(name)) is not None:
                    assert before in self._pools[get_group_id(before)].names, said
        if self.spine is not None:
            blocks = self._pools[self.spine].blocks
            for block in blocks:
                page = self._pages.before(block.block_id)
                assert page is None or blocks[page].block_hash, f"page {block.block_id}: the page before it is gone"

    def _sweep_names(self, lost: Sequence[tuple[int, Name]]) -> None:
        for _, name in lost:
            if name not in self._pools[get_group_id(name)].names:
                for behind in self._names.detach(name):
                    self._pools[get_group_id(behind)].drop_unreachable(behind)

    def _sweep_pages(self, spine: GroupPool, lost: Sequence[tuple[int, Name]]) -> None:
        pages, names, blocks = self._pages, spine.names, spine.blocks
        cut = [(name, pages.detach(page)) for page, name in lost]
        reused = {page for page, _ in lost}
        # Only now: a page may be both gone, and a copy of another one by what was computed in it since.
        for name, found in cut:
            behind = [page for page in found if page not in reused]
            if name not in names:
                for page in behind:
                    spine.uncache(blocks[page], "unreachable")
            elif behind:
                (copy, *_) = spine.cached_block_hash_to_block.copies(name)
                for page in behind:
                    pages.add(page, copy.block_id)
        gone = [get_block_hash(name) for name, _ in cut if name not in names]
        for group, pool in enumerate(self._pools):
            if pool is not spine and gone:
                names = pool.names
                for block_hash in gone:
                    if (beside := make_block_hash_with_group_id(block_hash, group)) in names:
                        pool.drop_unreachable(beside)
