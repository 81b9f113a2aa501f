"""A million random operations on the two-level allocator, its books recounted on the way.

python benchmarks/soak_allocator.py [--operations 1000000] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import time
from itertools import groupby

from rich.progress import track

from jenga.allocator import TwoLevelAllocator

RATIOS = (17, 1, 5)
LARGE_PAGES = 400
CHECKS = 200


class Soak:
    """Random requests that come, grow, drop pages, end and are hit again."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pool = TwoLevelAllocator(LARGE_PAGES, RATIOS, on_evict=self.evicted)
        self.live: list[list[int]] = [[] for _ in RATIOS]
        self.cached: list[dict[int, None]] = [{} for _ in RATIOS]
        self.refused = 0

    def evicted(self, group: int, page: int) -> None:
        del self.cached[group][page]  # KeyError: evicted what was not cached

    def step(self) -> int:
        """One request-sized action; returns how many pages it touched."""
        kind, group = self.random.random(), self.random.randrange(len(RATIOS))
        live, cached = self.live[group], self.cached[group]
        if kind < 0.4:
            return self.admit()
        if kind < 0.85 and live:
            self.pool.tick()
            count = min(len(live), self.random.randint(1, 40))
            pages = []
            for _ in range(count):
                at = self.random.randrange(len(live))
                live[at], live[-1] = live[-1], live[at]
                pages.append(live.pop())
            if kind < 0.6:  # a request that ends: page after page of the same large page
                pages.sort(reverse=True)
            for _, run in groupby(pages, RATIOS[group].__rfloordiv__):
                released, keep = list(run), self.random.random() < 0.7
                self.pool.release_run(group, released, keep)
                if keep:
                    cached.update(dict.fromkeys(released))
            return count
        if cached:
            page = next(iter(cached))
            del cached[page]
            if kind < 0.97:
                self.pool.revive(group, page)
                live.append(page)
            else:
                self.pool.forget(group, page)
        return 1

    def admit(self) -> int:
        """A request with prefix hits: if it fits it must be granted, whatever the order of its groups."""
        wants = [self.random.randint(0, 3 * ratio) for ratio in RATIOS]
        pins = [
            list(cached)[-self.random.randint(0, 4) :] if self.random.random() < 0.2 else [] for cached in self.cached
        ]
        if not self.pool.fits(wants, pins):
            self.refused += 1
            return 1
        for group, pages in enumerate(pins):
            for page in pages:
                del self.cached[group][page]
                self.pool.revive(group, page)
                self.live[group].append(page)
        self.pool.expect(wants)
        for group in self.random.sample(range(len(RATIOS)), len(RATIOS)):
            self.live[group] += self.pool.allocate(group, wants[group])
        return sum(wants)

    def check(self) -> None:
        """Recount.

        Raises:
            AssertionError: the allocator's books differ from themselves or from ours.
        """
        self.pool.check()
        for group, usage in enumerate(self.pool.usage().groups):
            assert len(self.live[group]) == len(set(self.live[group])) == usage.live, (
                f"group {group}: live pages differ"
            )
            assert len(self.cached[group]) == usage.cached, f"group {group}: cached pages differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000, help="page operations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    soak, done, start = Soak(arguments.seed), 0, time.perf_counter()
    for part in track(range(1, CHECKS + 1), description="operations"):
        while done < arguments.operations * part / CHECKS:
            done += soak.step()
        soak.check()
    counters = soak.pool.counters()
    print(
        f"{done:,} page operations in {time.perf_counter() - start:.1f} s, {CHECKS} recounts, all in balance; "
        f"{sum(counters.evicted_pages):,} pages evicted, {counters.whole_page_grants:,} large pages granted whole, "
        f"{soak.refused:,} requests refused"
    )


if __name__ == "__main__":
    main()
