"""Turns at the ingress: a few requests at a time, and fairly between clients (start-time fair queueing)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Turn:
    """One client's turn; it has come when `granted` is done."""

    client: str
    large: bool
    number: int
    """In the order in which they were asked for."""
    granted: asyncio.Future[None]
    """To be awaited behind a shield: who cancels it has not ended the turn."""
    began: float = 0.0
    ended: bool = False


@dataclass
class _Line:
    """What one client has in progress, and what waits."""

    spent: float
    """Seconds of its turns; at first what the least served of the others had had."""
    running: int = 0
    small: deque[Turn] = field(default_factory=deque)
    large: deque[Turn] = field(default_factory=deque)


class Turns:
    """Grants the next turn to the client that has had the least time; the cost of a turn is measured, not guessed.

    Of large ones a quarter of all turns at a time, at least one: nothing else runs beside them in an ingress.
    """

    def __init__(self, at_once: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.at_once = at_once
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._running = self._large = self._asked = 0

    def queue(self, client: str, *, large: bool = False) -> Turn:
        """Stand in line.  Every turn is to be ended, also one that has not come."""
        line = self._lines.get(client)
        if line is None:
            # Who was away has no claim to the time that was not asked for.
            line = _Line(min((other.spent for other in self._lines.values()), default=0.0))
            self._lines[client] = line
        self._asked += 1
        turn = Turn(client, large, self._asked, asyncio.get_running_loop().create_future())
        (line.large if large else line.small).append(turn)
        self._grant()
        return turn

    def end(self, turn: Turn) -> None:
        """The turn is over, or not wanted any more; a second time means nothing."""
        if turn.ended:
            return
        turn.ended = True
        line = self._lines[turn.client]
        if turn.granted.done():
            line.spent += self._clock() - turn.began
            line.running -= 1
            self._running -= 1
            self._large -= turn.large
        else:
            (line.large if turn.large else line.small).remove(turn)
            turn.granted.cancel()
        if not (line.running or line.small or line.large):
            del self._lines[turn.client]
        self._grant()

    def _grant(self) -> None:
        while self._running < self.at_once and (line := self._next()) is not None:
            turn = self._first(line)
            assert turn is not None
            (line.large if turn.large else line.small).popleft()
            line.running += 1
            self._running += 1
            self._large += turn.large
            turn.began = self._clock()
            turn.granted.set_result(None)

    def _next(self) -> _Line | None:
        waiting = [line for line in self._lines.values() if self._first(line)]
        return min(waiting, key=lambda line: (line.spent, line.running), default=None)

    def _first(self, line: _Line) -> Turn | None:
        """Which of a line's turns may come next: the oldest, unless it is a large one without room."""
        room = self._large < max(1, self.at_once // 4)
        heads = [kind[0] for kind in (line.small, line.large if room else ()) if kind]
        return min(heads, key=lambda turn: turn.number, default=None)
