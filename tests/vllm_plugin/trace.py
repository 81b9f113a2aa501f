"""What an engine computed from what: prefill cuts, recurrent states and logits, request by request.

Rounding makes a state depend on how its tokens were cut into chunks.  `Recorder` notes, for every request, the cuts
behind the state it holds, also those that a prefix hit brought with it; `impose_cuts` makes another engine cut in the
same places.  Engines that then differ in one bit differ for another reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from vllm.v1.kv_cache_interface import MambaSpec, iter_layer_specs


class Page(NamedTuple):
    """A block of a group."""

    group: int
    block: int


class Written(NamedTuple):
    """What was last written into a page."""

    cuts: tuple[int, ...]
    digest: str


@dataclass
class Life:
    """A request from its admission or resumption to its end or preemption."""

    hit: int
    """Tokens that it took from the prefix cache."""
    cuts: list[int] = field(default_factory=list)
    """Chunk ends behind its present state, ascending; those of the hit first."""
    mixed: bool = False
    """Whether the hit's pages were computed with unlike cuts, so that no single computation has the same rounding."""
    changed: int = 0
    """Pages of the hit that do not hold what was written into them, or a state of another length."""
    states: dict[int, str] = field(default_factory=dict)
    """By position: digest of the states of all layers after that many tokens."""
    logits: dict[int, str] = field(default_factory=dict)
    """The same of the logits, where a token was sampled."""


class Recorder:
    """Wraps a model runner's `execute_model` and `compute_logits`."""

    def __init__(self, runner: Any, force: dict[str, list[int]] | None = None) -> None:
        """`force`: tokens to sample, by request."""
        self.runner, self.force = runner, force
        self.lives: dict[str, list[Life]] = {}
        """By request: a new life starts when it is admitted and whenever it is resumed after a preemption."""
        self.logits: dict[str, dict[int, torch.Tensor]] = {}
        """By request and position: the logits after that many tokens, where one was sampled."""
        self._written: dict[Page, Written] = {}
        config = runner.kv_cache_config
        specs = [next(iter(iter_layer_specs(g.kv_cache_spec))) for g in config.kv_cache_groups]
        self._sizes = [spec.block_size for spec in specs]
        self._recurrent = [isinstance(spec, MambaSpec) for spec in specs]
        self._layers = [sorted(g.layer_names) for g in config.kv_cache_groups]
        self._blocks = [config.num_blocks * ratio for ratio in getattr(config, "ratios", [1] * len(specs))]
        execute, compute = runner.execute_model, runner.model.compute_logits

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            cached = scheduled.scheduled_cached_reqs
            self._before = {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
            self._before.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            self._count = scheduled.num_scheduled_tokens
            for request in scheduled.scheduled_new_reqs:
                self._begin(request.req_id, request.block_ids)
            for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
                if name in cached.resumed_req_ids:
                    self._begin(name, blocks)
            result = execute(scheduled, *args, **kwargs)
            self._note()
            return result

        def compute_logits(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits = compute(hidden, *args, **kwargs)
            for row, name in enumerate(runner.input_batch.req_ids):
                state = runner.requests[name]
                end = self._before[name] + self._count[name]
                if end < state.num_tokens:
                    continue  # what follows is known: nothing is sampled
                self.logits.setdefault(key(name), {})[end] = logits[row].detach().float().clone()
                if self.force is not None:
                    logits[row, self.force[key(name)][end - state.num_prompt_tokens]] = 1e9
            return logits

        runner.execute_model = execute_model
        runner.model.compute_logits = compute_logits

    def _begin(self, name: str, blocks: Any) -> None:
        """A request comes in with its prefix hit: look at that before anything is computed."""
        hit = self._before[name]
        life = Life(hit)
        self.lives.setdefault(key(name), []).append(life)
        if not hit:
            return
        pages: list[tuple[int, Page]] = []
        for group, (size, recurrent) in enumerate(zip(self._sizes, self._recurrent, strict=True)):
            held = range((hit - 1) // size, hit // size) if recurrent else range(hit // size)
            pages.extend(((i + 1) * size, Page(group, blocks[group][i])) for i in held)
        pages = [(end, page) for end, page in pages if page.block]  # windows start with null blocks
        life.changed = sum(digest(self._contents(page)) != self._written[page].digest for _, page in pages)
        # States come last: what is computed next starts from them.
        _, last = max(pages, key=lambda item: (self._recurrent[item[1].group], item[0]))
        cuts = self._written[last].cuts
        life.cuts = [*before(hit, cuts), hit]
        life.changed += self._recurrent[last.group] and cuts[-1] != hit
        life.mixed = any(before(end, self._written[page].cuts) != before(end, cuts) for end, page in pages)

    def _note(self) -> None:
        """What the requests of a step hold after it."""
        aligned = self.runner.cache_config.mamba_cache_mode == "align"
        for name, count in self._count.items():
            state = self.runner.requests[name]
            start, end = self._before[name], self._before[name] + count
            life = self.lives[key(name)][-1]
            life.cuts.append(end)
            states: dict[str, bytes] = {}
            for group, (size, recurrent) in enumerate(zip(self._sizes, self._recurrent, strict=True)):
                first, last = start // size, (end - 1) // size
                if recurrent:
                    first = last = last if aligned else 0
                for block in state.block_ids[group][first : last + 1]:
                    contents = self._contents(Page(group, block))
                    self._written[Page(group, block)] = Written(tuple(life.cuts), digest(contents))
                    if recurrent:
                        states |= contents
            life.states[end] = digest(states)
            if end >= state.num_tokens:
                life.logits[end] = digest({"": as_bytes(self.logits[key(name)][end])})

    def _contents(self, page: Page) -> dict[str, bytes]:
        """A page's bytes, by layer."""
        context = self.runner.compilation_config.static_forward_context
        contents = {}
        for name in self._layers[page.group]:
            cache = context[name].kv_cache
            if self._recurrent[page.group]:
                contents[name] = b"".join(as_bytes(state[page.block]) for state in cache)
            else:
                # Dimension 0 counts kernel blocks, of which a page may hold several.
                split = cache.shape[0] // self._blocks[page.group]
                contents[name] = as_bytes(cache[page.block * split : (page.block + 1) * split])
        return contents


def as_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's values, bit by bit."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def digest(contents: dict[str, bytes]) -> str:
    """Of bytes by layer, however the layers are grouped."""
    total = hashlib.sha256()
    for name in sorted(contents):
        total.update(contents[name])
    return total.hexdigest()


def before(tokens: int, cuts: Sequence[int]) -> tuple[int, ...]:
    """The cuts that shape what is computed for the first `tokens` tokens: kernels are causal, later ones do not."""
    return tuple(end for end in cuts if end < tokens)


def key(request: str) -> str:
    """vLLM's request id without its random suffix."""
    return request.split("-")[0]


def impose_cuts(scheduler: Any, cuts: dict[str, list[int]]) -> None:
    """Make a scheduler end prefill chunks where `cuts` says, by request."""

    def clip(request: Any, tokens: int, hit: int = 0, external: int = 0) -> int:
        start = request.num_computed_tokens + hit + external
        ahead = [end for end in cuts[key(request.request_id)] if end > start]
        return min(tokens, ahead[0] - start) if ahead else tokens

    scheduler.need_mamba_block_aligned_split = True
    scheduler._mamba_block_aligned_split = clip


def leave_out_copies(layers: int = 1, every: int = 1) -> Callable[[], int]:
    """Negative control: leave out state copies of the last `layers` recurrent layers after prefix hits.

    Returns a function that tells how many copies were left out.
    """
    from vllm.v1.worker import mamba_utils

    original = mamba_utils.collect_mamba_copy_meta
    left = 0

    def collect(buffers: Any, config: Any, functions: Any, groups: Any, source: int, *rest: Any) -> None:
        nonlocal left
        offset = buffers.offset
        original(buffers, config, functions, groups, source, *rest)
        state = rest[2]
        if buffers.offset > offset and state.num_computed_tokens <= state.num_prompt_tokens:
            left += 1
            buffers.offset -= 2 * layers

    mamba_utils.collect_mamba_copy_meta = collect
    return lambda: left


def row_by_row(model: torch.nn.Module) -> None:
    """Multiply by weights one token at a time: the batch and the cuts then change no rounding in linear layers.

    (Matrix kernels add in another order for other numbers of rows.)
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, LinearBase | ParallelLMHead):
            method = module.quant_method
            if id(method) not in done:
                done.add(id(method))
                method.apply = _rows(method.apply, 1)
        elif type(module).__name__.endswith("SparseMoeBlock"):
            module.forward = _rows(module.forward, 0)  # type: ignore[method-assign]
    # Mamba-2's step sizes: vectors and their remainders round differently.
    setattr(torch.nn.functional, "softplus", _rows(torch.nn.functional.softplus, 0))  # noqa: B010


def _rows(function: Callable[..., torch.Tensor], position: int) -> Callable[..., torch.Tensor]:
    """`function` on each row of its argument number `position` alone."""

    def apply(*args: Any, **kwargs: Any) -> torch.Tensor:
        rows = args[position]
        each = (function(*args[:position], row, *args[position + 1 :], **kwargs) for row in rows.split(1))
        return torch.cat(list(each))

    return apply
