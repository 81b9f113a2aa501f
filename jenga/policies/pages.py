"""Questions about ranges of pages, for any test of what is cached; quick ones where the pages are the bits of an int.

A policy asks page by page where every answer costs a look-up.  Whoever knows all of a prompt's pages beforehand (the
router, for many replicas at once) hands over `PageBits`, and each question is a few operations on one integer.
"""

from __future__ import annotations

from jenga.policies.base import CachedTest


class PageBits:
    """A `CachedTest` made of an integer: bit ``i`` is set where page ``i`` is cached."""

    __slots__ = ("bits",)

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, page: int) -> bool:
        return bool(self.bits >> page & 1)


def first_missing(cached: CachedTest, stop: int) -> int:
    """First page below `stop` that is not cached; `stop` if all are."""
    if isinstance(cached, PageBits):
        lacking = ~cached.bits & ((1 << stop) - 1)
        return (lacking & -lacking).bit_length() - 1 if lacking else stop
    page = 0
    while page < stop and cached(page):
        page += 1
    return page


def last_missing(cached: CachedTest, start: int, stop: int) -> int:
    """Last page in ``start..stop - 1`` that is not cached; -1 if all are."""
    if isinstance(cached, PageBits):
        page = (~cached.bits & ((1 << stop) - 1)).bit_length() - 1
        return page if page >= start else -1
    return next((page for page in range(stop - 1, start - 1, -1) if not cached(page)), -1)


def last_ending_cached(cached: CachedTest, limit: int, stride: int) -> int:
    """Largest multiple of `stride`, at most `limit`, whose last page (the one before it) is cached; 0 if none is."""
    limit -= limit % stride
    if isinstance(cached, PageBits):
        found = cached.bits & ((1 << limit) - 1)
        if stride > 1:
            found &= ((1 << limit) - 1) // ((1 << stride) - 1) << (stride - 1)
        return found.bit_length()
    return next((pages for pages in range(limit, 0, -stride) if cached(pages - 1)), 0)
