"""Order for a numbered stream that may lose, repeat and reorder messages."""

from __future__ import annotations

from typing import Generic, TypeVar

Item = TypeVar("Item")

KEPT = 256
"""Messages kept while an earlier one is missing.  A replay sends them all again, so this only saves asking twice."""


class Sequencer(Generic[Item]):
    """Hands messages out in order, each once, and knows whether one is missing."""

    __slots__ = ("_early", "due", "seen")

    def __init__(self, due: int = 0) -> None:
        self.due = due
        """Number of the message to be handed out next."""
        self.seen = due - 1
        """Largest number known to exist."""
        self._early: dict[int, Item] = {}

    @property
    def complete(self) -> bool:
        """Whether every message known to exist was handed out."""
        return self.due > self.seen

    def exists(self, number: int) -> None:
        """Learn that the stream has reached `number`."""
        self.seen = max(self.seen, number)

    def offer(self, number: int, item: Item) -> list[Item]:
        """Take one message; returns those whose turn it now is, in order."""
        self.exists(number)
        if number < self.due:
            return []
        if number > self.due:
            self._early[number] = item
            if len(self._early) > KEPT:
                del self._early[min(self._early)]
            return []
        ready = [item]
        self.due += 1
        return ready + self._drain() if self._early else ready

    def skip_to(self, due: int) -> list[Item]:
        """Everything before `due` is known by other means; returns what can be handed out after it."""
        self.due = due
        self.seen = max(self.seen, due - 1)
        self._early = {number: item for number, item in self._early.items() if number >= due}
        return self._drain()

    def _drain(self) -> list[Item]:
        ready = []
        while self.due in self._early:
            ready.append(self._early.pop(self.due))
            self.due += 1
        return ready
