"""Cached pages that no hit can get to, because a page of the prefix before them is gone.

A hit needs every page of full attention up to its end.  Once one of them is evicted, all that lies behind it (further
pages, windows, states) would only take memory until it is evicted itself: it is freed at once instead.  Where nothing
but full attention is cached, evicting tails first does that by itself; where large pages go whole and states keep
others beside them alive, about half of what was cached was of no use (docs/routing-simulated.md).

The pages of full attention of one prefix form a chain, ordered by where they end and then by group.  Every cached page
stands behind the last page of that chain which ends no later than itself.  A page is a *node*: any value that names its
group and contents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

Node = TypeVar("Node", bound=Hashable)


def page_before(dense: Sequence[tuple[int, int]], group: int, end: int) -> tuple[int, int] | None:
    """The page that the page of `group` which ends behind token `end` stands behind, as (group, index in the sequence).

    `dense` lists the groups that need every page, as (group, tokens per page), ascending.  None: it is the first.
    """
    best: tuple[int, int, int] | None = None  # end, group, index
    own = any(group == each for each, _ in dense)
    for each, size in dense:
        # Of pages that end at the same token those of earlier groups come first, others behind all of them.
        count = end // size if not own or each < group else (end - 1) // size
        if count and (best is None or (count * size, each) > best[:2]):
            best = count * size, each, count - 1
    return None if best is None else best[1:]


class Reach(Generic[Node]):
    """Which cached pages stand behind which, and what is cut off when one goes."""

    __slots__ = ("_before", "_cut", "_more", "_next", "_pending")

    def __init__(self) -> None:
        self._before: dict[Node, Node] = {}
        # Most pages have one page behind them; a set for each would take more memory than all else here.
        self._next: dict[Node, Node] = {}
        self._more: dict[Node, set[Node]] = {}
        self._cut: set[Node] = set()  # nodes that are gone while others stand behind them
        self._pending: list[Node] = []  # those of them that `sweep` has not seen

    def __len__(self) -> int:
        """Pages that stand behind another one."""
        return len(self._before)

    def __contains__(self, node: object) -> bool:
        """Whether `node` stands behind another one."""
        return node in self._before

    def add(self, node: Node, before: Node | None) -> None:
        """`node` is cached now, behind `before`.  One that is known already is no error."""
        self.add_run((node,), before)

    def add_run(self, nodes: Sequence[Node], before: Node | None) -> None:
        """`add` for each of `nodes`, the first behind `before` and each other behind the one before it."""
        known, following = self._before, self._next
        if self._cut:
            self._cut.difference_update(nodes)
        for node in nodes:
            if before is not None and node not in known:
                known[node] = before
                if following.setdefault(before, node) != node:
                    self._more.setdefault(before, set()).add(node)
            before = node

    def remove(self, node: Node) -> None:
        """`node` is cached no more."""
        before = self._before.pop(node, None)
        if before is not None:
            self._forget(before, node)
        if node in self._next:
            self._cut.add(node)
            self._pending.append(node)

    def detach(self, node: Node) -> list[Node]:
        """`node` is cached no more; what stood directly behind it is returned, and stands behind nothing now.

        For those who see at once to what is returned: in place of `remove` and `sweep`.
        """
        known = self._before
        if (before := known.pop(node, None)) is not None:
            self._forget(before, node)
        if node not in self._next:
            return []
        behind = [self._next.pop(node), *self._more.pop(node, ())]
        for each in behind:
            del known[each]
        return behind

    def before(self, node: Node) -> Node | None:
        """What `node` stands behind, as far as known."""
        return self._before.get(node)

    def reachable(self, node: Node) -> bool:
        """Whether the page before `node` is cached, or `node` is the first."""
        return self._before.get(node) not in self._cut

    def sweep(self, drop: Callable[[Node], object]) -> None:
        """Call `drop` with every cached page that cannot be reached any more.

        It takes the page out of the cache, and calls `remove` for it, unless someone holds the page.
        """
        while self._pending:
            node = self._pending.pop()
            if node not in self._cut:
                continue
            if node not in self._more:  # nearly always
                drop(self._next[node])
                continue
            for behind in list(self.behind(node)):
                drop(behind)

    def behind(self, node: Node) -> Iterator[Node]:
        """Cached pages directly behind `node`."""
        if node in self._next:
            yield self._next[node]
            yield from self._more.get(node, ())

    def clear(self) -> None:
        """Nothing is cached any more."""
        for each in (self._before, self._next, self._more, self._cut, self._pending):
            each.clear()

    def _forget(self, before: Node, node: Node) -> None:
        more = self._more.get(before)
        if self._next[before] != node:
            assert more is not None
            more.remove(node)
        elif more:
            self._next[before] = more.pop()
        else:
            del self._next[before]
            self._cut.discard(before)
        if more is not None and not more:
            del self._more[before]
