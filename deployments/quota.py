"""What one API key may ask for: requests per minute, requests at the same time."""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from deployments.keyring import Key


@dataclass(frozen=True)
class Excess:
    """A request beyond a limit: which one, and after how many seconds to try again."""

    limit: str
    retry_after_s: int


class Quotas:
    """Counts the requests of every key in this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: Counter[str] = Counter()
        # A token bucket by key: what is left (requests), and when that was so.
        self._left: dict[str, tuple[float, float]] = {}

    def enter(self, key: Key) -> Excess | None:
        """Count a request that begins; one that is refused is not counted, and does not `leave`."""
        if key.concurrent_requests is not None and self._running[key.id] >= key.concurrent_requests:
            return Excess(f"{key.concurrent_requests} requests at the same time", 1)
        if (limit := key.requests_per_minute) is not None:
            now = self._clock()
            left, then = self._left.get(key.id, (float(limit), now))
            left = min(limit, left + (now - then) * limit / 60)
            if left < 1:
                self._left[key.id] = left, now
                return Excess(f"{limit} requests per minute", math.ceil((1 - left) * 60 / limit))
            self._left[key.id] = left - 1, now
        self._running[key.id] += 1
        return None

    def leave(self, key: Key) -> None:
        """A request that had entered is over."""
        self._running[key.id] -= 1
        if self._running[key.id] <= 0:
            del self._running[key.id]
