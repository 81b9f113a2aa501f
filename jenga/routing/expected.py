"""What requests on their way will leave in a replica's caches, known before the engine tells of it.

Engines admit requests in the order in which they come, so whoever comes later finds what those before stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jenga.checkpoints import SharedPrefixes, boundaries, turn_starts
from jenga.hits import Hit
from jenga.routing.rule import HitRule


def stored_by(
    rule: HitRule, tokens: Sequence[int], keys: Sequence[int], hit: Hit, shared: SharedPrefixes
) -> list[list[int]]:
    """By group, the keys of the pages that a prompt leaves for others where it resumes behind `hit`.

    `keys` are the `key_of` of the prompt's block hashes; `shared` are the prefixes at whose end requests to this
    replica have parted, which learns from this one.  The lengths at which windows and states are kept are the engine's
    own (`jenga.checkpoints`).
    """
    if hit.furthest > hit.tokens:
        shared.learn(keys[hit.furthest // rule.hash_tokens - 1])
    hints = [blocks * rule.hash_tokens for blocks in shared.ends(keys)]
    if rule.turn_marks:
        hints += turn_starts(tokens, rule.turn_marks, rule.alignment)
    kept = boundaries(hit, len(tokens), rule.alignment, hints)
    found = []
    for group in rule.groups:
        size, policy = group.page_tokens, group.policy
        # A state is kept only where computing pauses; pages of tokens are there in any case while the request runs.
        lengths = (*kept.lengths, len(tokens)) if policy.token_pages else kept.pauses
        scale = size // rule.hash_tokens
        mine: list[int] = []
        # From the longest length down, each page once; what lies before the hit is stored already.
        after, before = hit.tokens // size, len(keys) // scale
        for length in sorted(lengths, reverse=True):
            needed = policy.pages_of_hit(length // size, size)
            mine += (keys[(page + 1) * scale - 1] for page in range(max(after, needed.start), min(before, needed.stop)))
            before = min(before, needed.start)
        found.append(mine)
    return found


class Expected:
    """Pages that are not stored yet, by the requests that will store them.  A lane is a bit of the index.

    Of several requests the last one counts: it comes behind the others, who will have stored the page by its end.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        """Lanes by block, as in the index."""
        self._last: dict[int, dict[int, str]] = {}  # lane: block: request
        self._by_request: dict[str, list[tuple[int, list[int]]]] = {}

    def add(self, request: str, lane: int, keys: list[int]) -> None:
        """`request` will store these blocks."""
        get = self.blocks.get
        for key in keys:
            self.blocks[key] = get(key, 0) | lane
        self._last.setdefault(lane, {}).update(dict.fromkeys(keys, request))
        self._by_request.setdefault(request, []).append((lane, keys))

    def arrived(self, lane: int, keys: Iterable[int]) -> None:
        """These blocks are stored: what becomes of them is told by events."""
        if last := self._last.get(lane):
            for key in keys:
                if last.pop(key, None) is not None:
                    self._clear(key, lane)

    def settle(self, request: str) -> None:
        """`request` is done; what it has not stored by now does not come.  An unknown one is no error."""
        for lane, keys in self._by_request.pop(request, ()):
            last = self._last.get(lane, {})
            for key in keys:
                if last.get(key) == request:
                    del last[key]
                    self._clear(key, lane)

    def forget(self, lanes: Iterable[int]) -> None:
        """Nothing is expected of these lanes any more."""
        for lane in lanes:
            for key in self._last.pop(lane, {}):
                self._clear(key, lane)

    def _clear(self, key: int, lane: int) -> None:
        if left := self.blocks[key] & ~lane:
            self.blocks[key] = left
        else:
            del self.blocks[key]
