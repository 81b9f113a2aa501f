"""A replica that has just come takes load gradually.  Pure Python without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

Replica = TypeVar("Replica", bound=Hashable)


class SlowStart(Generic[Replica]):
    """For its first `window` seconds a replica may have, of the requests that others have in progress on average, the
    part of the window that has passed; one at least.

    Empty caches and an empty queue make it look best to every router at once, while its first steps are its slowest.
    Those that this router met first are not new: there is nobody whose load they could take gradually.
    """

    def __init__(self, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`window` and `clock` are in seconds; a window of 0 limits nothing."""
        self._window = window
        self._clock = clock
        self._since: dict[Replica, float] = {}

    def keep(self, replicas: Iterable[Replica]) -> None:
        """These are there now, and no others."""
        new = self._clock() if self._since else float("-inf")
        self._since = {replica: self._since.get(replica, new) for replica in replicas}

    def open(self, queues: Mapping[Replica, int]) -> list[Replica]:
        """Those of `queues` (requests in progress) that may be given one more; all, if none may."""
        now = self._clock()
        ages = {replica: now - self._since.get(replica, float("-inf")) for replica in queues}
        warm = [queue for replica, queue in queues.items() if ages[replica] >= self._window]
        if not warm:
            return list(queues)
        usual = sum(warm) / len(warm)
        return [
            replica
            for replica, queue in queues.items()
            if ages[replica] >= self._window or queue < max(1.0, usual * ages[replica] / self._window)
        ]
