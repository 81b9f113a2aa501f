"""Free runs of adjacent chunks: best fit, neighbours merge."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence


class FreeRuns:
    """The free chunks of ``[first, end)``, as maximal runs."""

    def __init__(self, first: int, end: int) -> None:
        self._length_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}  # end of a run -> its start
        self._starts: dict[int, dict[int, None]] = {}  # length -> starts
        self._lengths: list[int] = []  # sorted, each once
        self._order: list[int] = []  # starts, sorted
        self.free = 0
        if end > first:
            self.give(first, end - first)

    def _runs(self, least: int) -> Iterator[tuple[int, int]]:
        """(start, length) of every run of at least `least` chunks, the shortest first."""
        for length in self._lengths[bisect_left(self._lengths, least) :]:
            for start in self._starts[length]:
                yield start, length

    def pack(self, wanted: Sequence[tuple[int, int]]) -> tuple[list[list[int]], int]:
        """Places for ``wanted[i] = (span, count)``, spans falling: first chunks by `i`, and the chunks without a place.

        Fills one run after the other, with the longest spans first.  Takes nothing.
        """
        placed: list[list[int]] = [[] for _ in wanted]
        missing = sum(count for _, count in wanted)
        shortest = min((span for span, count in wanted if count), default=0)
        for start, length in self._runs(shortest):
            if not missing:
                break
            for (span, count), starts in zip(wanted, placed, strict=True):
                number = min(count - len(starts), length // span)
                starts.extend(range(start, start + number * span, span))
                start += number * span
                length -= number * span
                missing -= number
        return placed, sum((count - len(starts)) * span for (span, count), starts in zip(wanted, placed, strict=True))

    def claim(self, start: int, span: int) -> None:
        """Take the chunks ``[start, start + span)``, which must be free."""
        first = self._order[bisect_right(self._order, start) - 1]
        length = self._length_at[first]
        self._remove(first, length)
        if start > first:
            self._add(first, start - first)
        if first + length > start + span:
            self._add(start + span, first + length - start - span)
        self.free -= span

    def take(self, span: int) -> int | None:
        """Take `span` adjacent chunks from the shortest run that has them; their first, or None."""
        at = bisect_left(self._lengths, span)
        if at == len(self._lengths):
            return None
        start = next(iter(self._starts[self._lengths[at]]))
        self.claim(start, span)
        return start

    def give(self, start: int, span: int) -> None:
        """Free the chunks ``[start, start + span)``, which must be taken."""
        self.free += span
        after = self._length_at.get(start + span)
        if after is not None:
            self._remove(start + span, after)
            span += after
        before = self._start_before.get(start)
        if before is not None:
            self._remove(before, start - before)
            span += start - before
            start = before
        self._add(start, span)

    def _add(self, start: int, length: int) -> None:
        insort(self._order, start)
        self._length_at[start] = length
        self._start_before[start + length] = start
        starts = self._starts.get(length)
        if starts is None:
            self._starts[length] = {start: None}
            insort(self._lengths, length)
        else:
            starts[start] = None

    def _remove(self, start: int, length: int) -> None:
        del self._order[bisect_left(self._order, start)]
        del self._length_at[start]
        del self._start_before[start + length]
        starts = self._starts[length]
        del starts[start]
        if not starts:
            del self._starts[length]
            del self._lengths[bisect_left(self._lengths, length)]
