"""Free runs of adjacent chunks: best fit, neighbours merge."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator


class FreeRuns:
    """The free chunks of ``[first, end)``, as maximal runs."""

    def __init__(self, first: int, end: int) -> None:
        self._length_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}  # end of a run -> its start
        self._starts: dict[int, dict[int, None]] = {}  # length -> starts
        self._lengths: list[int] = []  # sorted, each once
        self.free = 0
        if end > first:
            self.give(first, end - first)

    @classmethod
    def copy_of(cls, other: FreeRuns) -> FreeRuns:
        """An independent copy."""
        runs = cls(0, 0)
        runs._length_at = dict(other._length_at)
        runs._start_before = dict(other._start_before)
        runs._starts = {length: dict(starts) for length, starts in other._starts.items()}
        runs._lengths = list(other._lengths)
        runs.free = other.free
        return runs

    def lengths(self) -> Iterator[int]:
        """Length of every run, the shortest first."""
        for length in self._lengths:
            for _ in self._starts[length]:
                yield length

    def take(self, span: int) -> int | None:
        """Take `span` adjacent chunks from the shortest run that has them; their first, or None."""
        at = bisect_left(self._lengths, span)
        if at == len(self._lengths):
            return None
        length = self._lengths[at]
        start = next(iter(self._starts[length]))
        self._remove(start, length)
        if length > span:
            self._add(start + span, length - span)
        self.free -= span
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
        self._length_at[start] = length
        self._start_before[start + length] = start
        starts = self._starts.get(length)
        if starts is None:
            self._starts[length] = {start: None}
            insort(self._lengths, length)
        else:
            starts[start] = None

    def _remove(self, start: int, length: int) -> None:
        del self._length_at[start]
        del self._start_before[start + length]
        starts = self._starts[length]
        del starts[start]
        if not starts:
            del self._starts[length]
            del self._lengths[bisect_left(self._lengths, length)]
