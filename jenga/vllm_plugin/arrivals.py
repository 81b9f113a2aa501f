"""What a request will find in the cache stays there until its turn comes, if anything can stay.

Eviction takes what was used longest ago.  That a waiting request is about to use some pages counts as a use of them.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


def install() -> None:
    """Let every scheduler whose coordinator can do so look at what a request will find, as it arrives."""
    add = Scheduler.add_request

    @wraps(add)
    def add_request(self: Any, request: Request) -> None:
        add(self, request)
        manager = self.kv_cache_manager
        refresh = getattr(manager.coordinator, "refresh", None)
        if refresh is not None and manager.prefix_cache_lookup_enabled(request):
            refresh(request.block_hashes, request.num_tokens - 1)

    setattr(Scheduler, "add_request", add_request)  # noqa: B010
