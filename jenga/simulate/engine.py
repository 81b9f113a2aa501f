"""A simulated engine: continuous batching as vLLM's V1 scheduler does it, on a plan's memory.

Each step, running requests come first, in order of admission: a decoding one gets a token, a prefilling one a chunk of
what is left of the token budget.  A request that finds no page preempts the youngest running one (its pages stay
cached, it waits at the head of the queue and computes again what it cannot find).  If nobody was preempted, waiting
requests are admitted first come, first served, while their whole prompt fits.

Decoding requests are not touched in every step but only when they need a page or end, and steps in which nobody does
are taken together: simulated tokens cost little, pages cost a few microseconds each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from typing import Protocol

from jenga.allocator import OutOfPagesError
from jenga.checkpoints import PASS_TOKENS
from jenga.layers import LayerType
from jenga.prefix_cache import Keys, PrefixCache
from jenga.simulate.cost import StepCost
from jenga.simulate.report import MemorySample, Percentiles, SimulationResult, bytes_by_cause
from jenga.strategies import Plan
from jenga.traces import TraceRequest

MAX_SAMPLES = 256
Progress = Callable[[int], None]
"""Called with the number of requests that are done."""


class Watch(Protocol):
    """Is told of each request, by serial number."""

    def admitted(self, serial: int, hit_tokens: int) -> None:
        """For the first time; it found `hit_tokens` tokens of its prompt."""

    def first_token(self, serial: int, seconds: float) -> None:
        """`seconds` after its arrival."""

    def finished(self, serial: int, rejected: bool) -> None:
        """It holds nothing any more."""


@dataclass(frozen=True)
class Limits:
    """The engine's settings (vLLM's names: max_num_batched_tokens, max_num_seqs)."""

    batched_tokens: int = 8192
    sequences: int = 1024
    prefix_caching: bool = True
    growth_pages: int = 0
    """Pages, per running request and group, that an admission must leave for running requests to grow into.  None in
    vLLM, whose blocks of hundreds of tokens on hybrid models come with such a reserve by accident."""
    pass_tokens: int = PASS_TOKENS
    """What one more forward pass costs, in tokens: computing pauses for a state only where that spares more.  Other
    engines than Jenga's know no such setting, and are left at the default."""


class _Request:
    """A request's progress.  While it decodes, `computed` and `generated` are those at step `since`."""

    __slots__ = ("computed", "first_token_s", "generated", "keys", "lost", "since", "target", "trace", "version")

    def __init__(self, trace: TraceRequest) -> None:
        self.trace = trace
        self.keys: Keys = []
        self.computed = 0
        self.generated = 0
        self.target = trace.prompt_tokens  # tokens to compute before the next one can be sampled
        self.since: int | None = None  # None: prefilling or waiting
        self.version = 0  # counts preemptions, so that events of an earlier life are known as stale
        self.lost = 0  # tokens that were computed when it was preempted
        self.first_token_s: float | None = None

    def computed_at(self, step: int) -> int:
        return self.computed if self.since is None else self.computed + step - self.since


class Simulation:
    """One trace under one plan: `run` once, or `submit` requests in order of arrival, each after `advance` to it."""

    def __init__(
        self,
        plan: Plan,
        types: Sequence[LayerType],
        trace: Iterable[TraceRequest] = (),
        *,
        cost: StepCost | None = None,
        limits: Limits | None = None,
        progress: Progress | None = None,
        watch: Watch | None = None,
        sampling: bool = True,
    ) -> None:
        self._plan = plan
        self._types = types
        self._cost = cost or StepCost()
        self._limits = limits or Limits()
        self._progress = progress
        self._watch = watch
        self._trace = sorted(trace, key=lambda t: t.arrival_s)
        self._total = 0
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}  # by serial, in order of admission
        self._prefilling: dict[int, _Request] = {}
        self._decoding = 0
        self.cache = PrefixCache(
            [place.group for place in plan.groups],
            plan.pool,
            plan.counts,
            free_unreachable=plan.free_unreachable,
            pass_tokens=self._limits.pass_tokens if plan.weighs_passes else PASS_TOKENS,
        )
        self._all_pages = self.cache.pool.available

        self._step = 0
        self._now = self._busy = 0.0
        self._horizon = inf  # the next request arrives then
        self._order = 0
        self._wakes: list[tuple[int, int, int, _Request]] = []  # step, tie-break, version: it needs a page then
        self._ends: list[tuple[int, int, int, _Request]] = []
        self._context = 0  # tokens computed of all running requests
        self._read_bytes: dict[int, int] = {}
        self._blocked: tuple[int, list[int]] | None = None  # releases when the head did not fit, and its needs
        self._short = False  # memory was short in this step

        self._done = self._rejected = self._preemptions = self._peak = 0
        self._hits = self._resumed_hits = self._recomputed = self._prompts = self._outputs = 0
        self._ttft: list[float] = []
        self._resident_time = self._short_time = self._all_resident_time = 0.0
        self._samples: list[MemorySample] = []
        self._sample_every = 1
        self._next_sample: float = 0 if sampling else inf

    def run(self) -> SimulationResult:
        """Serve the whole trace."""
        for trace in self._trace:
            self.advance(trace.arrival_s)
            self.submit(trace)
        self.advance()
        return self.result()

    def advance(self, until: float = inf) -> None:
        """Take steps until nothing is left to do, or one ends at `until` seconds or later."""
        self._horizon = until
        while (self._waiting or self._running) and self._now < until:
            self._one_step()
            self._skip_steps()

    def submit(self, trace: TraceRequest, keys: Keys = ()) -> None:
        """A request arrives; `keys` are those of `keys`, if they are known already."""
        if not self.queue:
            self._now = max(self._now, trace.arrival_s)
        request = _Request(trace)
        request.keys = keys
        # Before the first step nothing can be found, and keys of many that wait from the start take memory.
        if self._plan.refresh_waiting and self._step and self._cacheable(trace):
            request.keys = keys or self.keys(trace)
            self.cache.refresh(request.keys, trace.prompt_tokens - 1)
        self._total += 1
        self._waiting.append(request)

    def keys(self, trace: TraceRequest) -> Keys:
        """A request's contents, as the cache names them."""
        sizes = [g.page_tokens if shared else 0 for g, shared in zip(self.cache.groups, self.cache.shared, strict=True)]
        by_size = {size: trace.keys(size) if size else [] for size in sizes}
        return [by_size[size] for size in sizes]

    def _cacheable(self, trace: TraceRequest) -> bool:
        return self._limits.prefix_caching and not trace.image_tokens

    @property
    def queue(self) -> int:
        """Requests that run or wait."""
        return len(self._waiting) + len(self._running)

    @property
    def waiting(self) -> int:
        """Requests of `queue` that do not run, preempted ones included."""
        return len(self._waiting)

    @property
    def used(self) -> float:
        """Part of the large pages that live requests hold, 0 to 1."""
        return 1 - self.cache.pool.available / self._all_pages

    @property
    def preemptions(self) -> int:
        """Requests preempted so far."""
        return self._preemptions

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return self._now

    @property
    def busy_s(self) -> float:
        """Seconds spent in steps so far."""
        return self._busy

    # -- one step -------------------------------------------------------------------------------------------

    def _one_step(self) -> None:
        before = self._preemptions
        self._short = False
        self._wake_decoders()
        computed = self._decoding
        budget = self._limits.batched_tokens - self._decoding
        for request in list(self._prefilling.values()):
            if budget <= 0:
                break
            if request.trace.serial in self._prefilling:
                used = self._prefill(request, budget)
                budget -= used
                computed += used
        if self._preemptions == before:
            while self._waiting and budget > 0 and len(self._running) < self._limits.sequences:
                admitted = self._admit(self._waiting[0], budget)
                if admitted is None:
                    break
                budget -= admitted
                computed += admitted
        else:
            self._short = True
        self._peak = max(self._peak, len(self._running))
        self._take_time(computed, 1)
        if self._step >= self._next_sample:
            self._sample()
        self.cache.end_step()
        self._end_prefills()
        self._step += 1
        self._end_requests()

    def _wake_decoders(self) -> None:
        while self._wakes and self._wakes[0][0] <= self._step:
            _, _, version, request = heappop(self._wakes)
            if request.version != version:
                continue
            tokens = request.computed_at(self._step) + 1
            if self._grow(request, tokens):
                self._plan_wake(request, tokens)

    def _plan_wake(self, request: _Request, computed: int) -> None:
        """`computed` tokens will be there at the start of the next step."""
        wake = self._step + 1 + self.cache.room(request.trace.serial) - computed
        self._order += 1
        heappush(self._wakes, (wake, self._order, request.version, request))

    def _prefill(self, request: _Request, budget: int) -> int:
        """Compute a chunk; returns its tokens (0 if it was preempted for want of pages)."""
        serial = request.trace.serial
        tokens = self.cache.next_stop(serial, min(request.target, request.computed + budget))
        if not self._grow(request, tokens):
            return 0
        used = tokens - request.computed
        request.computed = tokens
        self._context += used
        return used

    def _admit(self, request: _Request, budget: int) -> int | None:
        """Start the head of the queue; returns the tokens of its first chunk, None if it does not fit."""
        trace, cache = request.trace, self.cache
        if self._blocked is not None and self._running:
            releases, needs = self._blocked
            # Asking what it needed last, without pins, spares most of the lookups of a request that waits.
            if cache.releases == releases or not cache.pool.fits(needs):
                self._blocked = (cache.releases, needs)
                self._short = True
                return None
        if not request.keys:
            request.keys = self.keys(trace)
        match = cache.lookup(request.keys, request.target - 1) if self._cacheable(trace) else cache.no_match()
        growth = self._limits.growth_pages * len(self._running)
        if not cache.fits(match, request.target, self._limits.batched_tokens, trace.image_tokens, growth):
            if not self._running:
                self._reject(request)
                return 0
            needs = cache.needs(match, request.target, self._limits.batched_tokens, trace.image_tokens)
            self._blocked = (cache.releases, needs)
            self._short = True
            return None
        self._waiting.popleft()
        self._blocked = None
        cache.admit(trace.serial, request.keys, match, request.target, trace.image_tokens)
        request.computed = match.hit.tokens
        self._context += match.hit.tokens
        if request.version:
            self._resumed_hits += match.hit.tokens
            self._recomputed += max(0, request.lost - match.hit.tokens)
        else:
            self._hits += match.hit.tokens
            self._prompts += trace.prompt_tokens
            if self._watch is not None:
                self._watch.admitted(trace.serial, match.hit.tokens)
        self._running[trace.serial] = self._prefilling[trace.serial] = request
        return self._prefill(request, budget) + trace.image_tokens

    def _grow(self, request: _Request, tokens: int) -> bool:
        """Give `request` pages for `tokens` tokens, preempting the youngest until they are there.

        False: it was itself the youngest.
        """
        while True:
            try:
                self.cache.grow(request.trace.serial, tokens)
                return True
            except OutOfPagesError:
                victim = next(reversed(self._running.values()))
                alone = len(self._running) == 1
                self._preempt(victim)
                if victim is request:
                    if alone:
                        self._reject(request)
                    return False

    def _preempt(self, request: _Request) -> None:
        serial = request.trace.serial
        computed = request.computed_at(self._step)
        if request.since is not None:
            if computed > self.cache.computed(serial):
                self.cache.advance(serial, computed)
            request.generated += computed - request.computed
            self._decoding -= 1
        self.cache.release(serial)
        del self._running[serial]
        self._prefilling.pop(serial, None)
        self._context -= computed
        request.version += 1
        request.since = None
        request.lost = computed
        request.computed = 0
        request.target = request.trace.prompt_tokens + request.generated
        self._preemptions += 1
        self._blocked = None
        self._waiting.appendleft(request)

    def _reject(self, request: _Request) -> None:
        """It does not fit into the empty buffer; `request` is the head of the queue."""
        self._waiting.popleft()
        self._blocked = None
        self._rejected += 1
        self._finish_one(request.trace.serial, rejected=True)

    def _end_prefills(self) -> None:
        for serial, request in list(self._prefilling.items()):
            if request.computed < request.target:
                continue
            del self._prefilling[serial]
            self._decoding += 1
            request.since = self._step + 1
            request.generated += 1
            if request.first_token_s is None:
                request.first_token_s = self._now
                self._ttft.append(self._now - request.trace.arrival_s)
                if self._watch is not None:
                    self._watch.first_token(serial, self._ttft[-1])
            self._plan_wake(request, request.computed)
            self._order += 1
            last = self._step + request.trace.output_tokens - request.generated
            heappush(self._ends, (last, self._order, request.version, request))

    def _end_requests(self) -> None:
        """Requests whose last token the step just taken gave."""
        while self._ends and self._ends[0][0] < self._step:
            _, _, version, request = heappop(self._ends)
            if request.version != version:
                continue
            serial = request.trace.serial
            computed = request.computed_at(self._step)
            if computed > self.cache.computed(serial):
                self.cache.advance(serial, computed)
            self.cache.release(serial)
            del self._running[serial]
            self._decoding -= 1
            self._context -= computed
            self._outputs += request.trace.output_tokens
            request.version += 1
            request.keys = []
            self._finish_one(serial)

    def _finish_one(self, serial: int, rejected: bool = False) -> None:
        self._done += 1
        if self._watch is not None:
            self._watch.finished(serial, rejected)
        if self._progress is not None:
            self._progress(self._done)

    # -- time -----------------------------------------------------------------------------------------------

    def _skip_steps(self) -> None:
        """Take the steps together in which every running request only gets a token."""
        if self._prefilling or not self._decoding:
            return
        if self._waiting:
            full = len(self._running) >= self._limits.sequences
            blocked = self._blocked is not None and self._blocked[0] == self.cache.releases
            if not full and not blocked:
                return
            self._short = blocked
        else:
            self._short = False
        until = min(self._ends[0][0] if self._ends else self._step, self._wakes[0][0] if self._wakes else self._step)
        steps = until - self._step
        if steps > 0 and self._horizon < inf:
            ahead = self._horizon - self._now
            steps = min(steps, max(0, int(ahead / self._step_seconds(self._decoding))))
        if steps > 0:
            self._take_time(self._decoding, steps)
            self._step += steps

    def _step_seconds(self, tokens: int) -> float:
        running = len(self._running)
        if not running:
            return self._cost.step(tokens, 0.0, prefills=tokens > 0)
        length = self._context // running // 64 * 64
        read = self._read_bytes.get(length)
        if read is None:
            read = self._read_bytes[length] = sum(t.needed_bytes(length) for t in self._types)
        prefills = tokens > self._decoding
        return self._cost.step(tokens, float(running * read), running=running, prefills=prefills)

    def _take_time(self, tokens: int, steps: int) -> None:
        """`steps` equal steps of `tokens` tokens each; decoders gain one token in each."""
        seconds = self._step_seconds(tokens) * steps
        self._context += self._decoding * steps
        self._now += seconds
        self._busy += seconds
        self._all_resident_time += seconds * len(self._running)
        if self._short:
            self._short_time += seconds
            self._resident_time += seconds * len(self._running)

    # -- reports --------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        for serial, request in self._running.items():
            tokens = request.computed_at(self._step + 1)
            if request.since is not None and tokens > self.cache.computed(serial):
                self.cache.advance(serial, tokens)
        self._samples.append(
            MemorySample(
                time_s=self._now,
                running=len(self._running),
                waiting=len(self._waiting),
                saturated=self._short,
                bytes_by_cause=bytes_by_cause(self._plan, self.cache),
            )
        )
        if len(self._samples) > MAX_SAMPLES:
            del self._samples[::2]
            self._sample_every *= 2
        self._next_sample = self._step + self._sample_every

    def result(self) -> SimulationResult:
        """What has happened so far."""
        short = self._short_time > 0
        weight = self._short_time if short else self._now
        return SimulationResult(
            strategy=self._plan.strategy,
            model=self._plan.model,
            memory_bytes=self._plan.memory_bytes,
            hit_granularity=self.cache.alignment,
            requests=self._total,
            rejected=self._rejected,
            seconds=self._now,
            prompt_tokens=self._prompts,
            output_tokens=self._outputs,
            hit_tokens=self._hits,
            resumed_hit_tokens=self._resumed_hits,
            recomputed_tokens=self._recomputed,
            preemptions=self._preemptions,
            resident_peak=self._peak,
            resident_mean=(self._resident_time if short else self._all_resident_time) / weight if weight else 0.0,
            saturated_share=self._short_time / self._now if self._now else 0.0,
            ttft_s=Percentiles.of(self._ttft),
            samples=tuple(self._samples),
        )


def simulate(
    plan: Plan,
    types: Sequence[LayerType],
    trace: Iterable[TraceRequest],
    *,
    cost: StepCost | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> SimulationResult:
    """Serve `trace` with the memory of `plan`, the plan of a model of layer `types`."""
    return Simulation(plan, types, trace, cost=cost, limits=limits, progress=progress).run()
