"""What requests on their way will leave in a replica's caches, known before the engine tells of it.

Engines admit requests in the order in which they come, so whoever comes later finds what those before stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jenga.checkpoints import SharedPrefixes, boundaries, kept_pages, turn_starts
from jenga.hits import Hit
from jenga.routing.rule import HitRule


def stored_by(
    rule: HitRule, tokens: Sequence[int], keys: Sequence[int], hit: Hit, shared: SharedPrefixes
) -> list[list[int]]:
    """By group, the keys of the pages that a prompt leaves for others where it resumes behind `hit`.

    `keys` are the `key_of` of the prompt's block hashes; `shared` are the prefixes at whose end requests to this
    replica have parted, this one included.  The lengths at which windows and states are kept are the engine's own
    (`jenga.checkpoints`).
    """
    hints = [blocks * rule.hash_tokens for blocks in shared.ends(keys)]
    if rule.turn_marks:
        hints += turn_starts(tokens, rule.turn_marks, rule.alignment)
    kept = boundaries(hit, len(tokens), rule.alignment, hints, rule.pass_tokens)
    found = []
    for group in rule.groups:
        scale = group.page_tokens // rule.hash_tokens
        mine: list[int] = []
        for pages in kept_pages(group.policy, group.page_tokens, kept, len(tokens), hit.tokens):
            mine += keys[(pages.start + 1) * scale - 1 : pages.stop * scale : scale]
        found.append(mine)
    return found


class Junctions(SharedPrefixes):
    """Prefixes at whose end requests to one replica have parted: those that its engine told of, and those that
    requests on their way will teach it."""

    def __init__(self, told: Iterable[int] = ()) -> None:
        super().__init__()
        self._teachers: dict[int, str] = {}
        self._taught: dict[str, int] = {}
        for key in told:
            self.learn(key)

    def tell(self, keys: Iterable[int]) -> None:
        """The engine knows these."""
        for key in keys:
            self.learn(key)
            self._teachers.pop(key, None)

    def expect(self, request: str, key: int) -> None:
        """`request` will teach the engine this one; of several requests the last counts."""
        if key not in self or key in self._teachers:
            self._teachers[key], self._taught[request] = request, key
        self.learn(key)

    def settle(self, request: str) -> None:
        """`request` is done: what the engine has not told by now it has not learned."""
        key = self._taught.pop(request, None)
        if key is not None and self._teachers.get(key) == request:
            del self._teachers[key]
            self.forget(key)


class Expected:
    """Pages of windows and states that are not stored yet, by the requests that will store them, and prompts' ends.

    A lane is a bit of the index.  Of several requests the last one counts: it comes behind the others, who will have
    stored the page by its end.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        """Lanes by block, as in the index."""
        self._last: dict[int, dict[int, str]] = {}  # lane: block: request
        self._by_request: dict[str, list[tuple[int, Sequence[int]]]] = {}
        self._ends: dict[int, dict[int, list[str]]] = {}  # lane: block: requests whose prompts end with it
        self._end_of: dict[str, tuple[int, int]] = {}
        self._computed: list[str] = []

    def add(self, request: str, lane: int, keys: Sequence[int]) -> None:
        """`request` will store these blocks."""
        blocks = self.blocks
        if blocks.keys().isdisjoint(keys):
            blocks.update(dict.fromkeys(keys, lane))
        else:
            get = blocks.get
            for key in keys:
                blocks[key] = get(key, 0) | lane
        self._last.setdefault(lane, {}).update(dict.fromkeys(keys, request))
        self._by_request.setdefault(request, []).append((lane, keys))

    def ends_with(self, request: str, lane: int, key: int) -> None:
        """This block is the last that `request` stores: then its prompt is computed (`take_computed`)."""
        self._ends.setdefault(lane, {}).setdefault(key, []).append(request)
        self._end_of[request] = lane, key

    def take_computed(self) -> list[str]:
        """Requests whose last block has been stored since the last call."""
        computed, self._computed = self._computed, []
        return computed

    def arrived(self, lane: int, keys: Iterable[int]) -> list[str]:
        """These blocks are stored: what becomes of them is told by events.

        Returns:
            requests whose prompts are computed by that.
        """
        ends, last = self._ends.get(lane), self._last.get(lane)
        computed: list[str] = []
        if ends and not ends.keys().isdisjoint(keys):
            for key in keys:
                computed += ends.pop(key, ())
            for request in computed:
                del self._end_of[request]
            self._computed += computed
        if last and not last.keys().isdisjoint(keys):
            for key in keys:
                if last.pop(key, None) is not None:
                    self._clear(key, lane)
        return computed

    def settle(self, request: str) -> None:
        """`request` is done; what it has not stored by now does not come.  An unknown one is no error."""
        if (end := self._end_of.pop(request, None)) is not None:
            lane, key = end
            ends = self._ends[lane]
            ends[key].remove(request)
            if not ends[key]:
                del ends[key]
        blocks = self.blocks
        for lane, keys in self._by_request.pop(request, ()):
            last = self._last.get(lane, {})
            for key in keys:  # in line: a part of every decision
                if last.get(key) == request:
                    del last[key]
                    if left := blocks[key] & ~lane:
                        blocks[key] = left
                    else:
                        del blocks[key]

    def forget(self, lanes: Iterable[int]) -> None:
        """Nothing is expected of these lanes any more, which may be another replica's next."""
        for lane in lanes:
            for key in self._last.pop(lane, {}):
                self._clear(key, lane)
            for requests in self._ends.pop(lane, {}).values():
                for request in requests:
                    del self._end_of[request]

    def _clear(self, key: int, lane: int) -> None:
        if left := self.blocks[key] & ~lane:
            self.blocks[key] = left
        else:
            del self.blocks[key]
