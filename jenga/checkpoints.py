"""Where a later request is likely to resume a prompt, so that what a hit there needs is worth keeping.

Full attention keeps every page anyway.  A window, and even more a recurrent state, is useful only at the very length
where another request resumes, and each one kept costs memory.  Four lengths are likely:

- the end of the prompt: the next turn of a conversation, or the same prompt again;
- the *junction* where this prompt leaves what some layer types still have of an earlier one (`Hit.furthest`);
- a junction seen before (`SharedPrefixes`), although nothing of it is cached any more;
- the start of a turn (`turn_starts`), so that a system prompt is resumed by the second request that has it, not
  only by the third: chat templates mark turns by special tokens.

The first two are what vLLM 0.32 keeps (and Marconi, MLSys'25, proposed).  Lengths are tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from jenga.hits import Hit
from jenga.policies import LayerPolicy

TURN_GAP = 8
"""Tokens; special tokens this close together mark one turn (an end, a start, and the role's name between them)."""

ANSWER_CUE = 16
"""Tokens; special tokens this close to a prompt's end ask for the answer and start no turn that others could share."""

PASS_TOKENS = 256
"""Tokens; a recurrent state can be kept only where a forward pass ends, and one more pass takes about as long as
computing this many tokens.  The default, and right where a pass is bound by reading the weights (an H100 does 295
operations in the time it loads a byte of them)."""

GPU_PASS_TOKENS = 2048
"""The default on a GPU, where launching the kernels of a pass with prompt tokens takes longer than reading the weights:
on an H100, 2,800 tokens could be computed meanwhile (docs/benchmarks.md)."""

SHARED_TOKENS = 128
"""Tokens; what several prompts share will be resumed many times: so much is worth a pass whatever that costs."""

MAX_KNOWN_JUNCTIONS = 2
"""Junctions seen before at which one prompt keeps something: the longest ones."""


@dataclass(frozen=True)
class Boundaries:
    """Lengths at which a prompt keeps what a hit needs."""

    lengths: tuple[int, ...]
    """All of them, ascending."""
    pauses: tuple[int, ...]
    """Those where computing should pause, so that recurrent states can be kept there."""


def boundaries(
    hit: Hit, tokens: int, alignment: int, hints: Iterable[int] = (), pass_tokens: int = PASS_TOKENS
) -> Boundaries:
    """What a prompt of `tokens` tokens that resumes behind `hit` keeps.

    `hints` are the lengths of `turn_starts` and `SharedPrefixes`.  All are rounded down to `alignment`: a checkpoint
    never covers tokens of this request beyond the place it was made for.  `pass_tokens` is what one more forward pass
    costs, in tokens.
    """
    # A hit leaves at least one token to compute, so an equal prompt resumes before its last token.
    end = (tokens - 1) // alignment * alignment
    shared = {length // alignment * alignment for length in (hit.furthest, *hints)}
    lengths = tuple(sorted(b for b in shared | {end} if hit.tokens < b <= end))
    pauses: list[int] = []
    start = hit.tokens
    for length in lengths:
        # The end of a prompt will perhaps never be resumed.
        if length - start >= (min(pass_tokens // 2, SHARED_TOKENS) if length in shared else pass_tokens):
            pauses.append(length)
            start = length
    return Boundaries(lengths, tuple(pauses))


def kept_pages(policy: LayerPolicy, page_tokens: int, kept: Boundaries, tokens: int, after: int) -> list[range]:
    """Pages, as indices in the sequence, that a prompt of `tokens` tokens leaves for others in one layer group.

    `after` tokens are stored already: the prompt resumes behind them.  Each page is named once, from the longest
    length down.
    """
    # A state is kept only where computing pauses; pages of tokens are there in any case while the request runs.
    lengths = (*kept.lengths, tokens) if policy.token_pages else kept.pauses
    found = []
    first, before = after // page_tokens, tokens // page_tokens
    for length in sorted(lengths, reverse=True):
        needed = policy.pages_of_hit(length // page_tokens, page_tokens)
        start, stop = max(first, needed.start), min(before, needed.stop)
        if start < stop:
            found.append(range(start, stop))
            before = start
    return found


def turn_starts(tokens: Sequence[int], markers: Collection[int], after: int) -> tuple[int, ...]:
    """Where the first turn from `after` on and the last one of a prompt start; none if no `markers` say so.

    A turn starts behind a run of markers (special tokens at most `TURN_GAP` apart).
    """
    last = _last_run(tokens, markers, after, len(tokens) - ANSWER_CUE)
    if last is None:
        return ()
    first: int | None = None
    for i in range(max(0, after - 1), last):
        if tokens[i] in markers:
            first = i + 1
        elif first is not None and i - first >= TURN_GAP:
            break
    return (last,) if first is None or first == last else (first, last)


def _last_run(tokens: Sequence[int], markers: Collection[int], after: int, before: int) -> int | None:
    """Behind the last run of markers that ends from `after` to `before`."""
    run = len(tokens) + TURN_GAP + 1  # first token of the run that was found last
    for i in range(len(tokens) - 1, after - 2, -1):
        if i >= 0 and tokens[i] in markers:
            if run - i > TURN_GAP and i < before:
                return i + 1
            run = i
    return None


class SharedPrefixes:
    """Prefixes at whose end requests have parted before; the most recently seen ones.

    A prefix is known by a key that names its contents (`jenga.prefix_cache.Keys`, or an engine's block hash).
    """

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._known: OrderedDict[Hashable, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, key: Hashable) -> None:
        """Two requests had the prefix `key` in common, and parted behind it."""
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._known

    def __iter__(self) -> Iterator[Hashable]:
        """From the one seen longest ago to the latest."""
        return iter(self._known)

    def forget(self, key: Hashable) -> None:
        """Nobody parted there.  An unknown one is no error."""
        self._known.pop(key, None)

    def ends(self, keys: Sequence[Hashable], first: int = 0) -> list[int]:
        """The longest known prefixes of a prompt, as numbers of keys; ``keys[:first]`` are passed over."""
        if not self._known:
            return []
        found: list[int] = []
        for i in range(len(keys) - 1, first - 1, -1):
            if keys[i] in self._known:
                self._known.move_to_end(keys[i])
                found.append(i + 1)
                if len(found) == MAX_KNOWN_JUNCTIONS:
                    break
        return found
