"""The order in which engines take what waits in them: fair between tenants, by vLLM's priority scheduling."""

from __future__ import annotations

import time
from collections.abc import Callable

SPACING_MS = 1000
"""Milliseconds by which each request that a tenant has in progress puts its next one back."""


class Order:
    """Priorities, the lowest first: the time of arrival (ms), later for a tenant that has requests in progress.

    A single request passes all but the first of another tenant's hundred. Since priorities are times, those of several
    ingresses fit together, and what waits is overtaken only for as long as it was put back.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._last: dict[str, int] = {}

    def next(self, tenant: str, running: int) -> int:
        """The priority of a tenant's request, which has `running` others in progress; never before an earlier one."""
        due = round(1000 * self._clock()) + SPACING_MS * running
        self._last[tenant] = due = max(due, self._last.get(tenant, due))
        return due

    def forget(self, tenant: str) -> None:
        """A tenant has nothing in progress any more."""
        self._last.pop(tenant, None)
