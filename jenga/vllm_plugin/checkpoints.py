"""Which lengths of a running request are kept for later ones: `jenga.checkpoints` applied to vLLM's requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from jenga.checkpoints import Boundaries, SharedPrefixes, boundaries, turn_starts
from jenga.hits import Hit
from jenga.vllm_plugin import settings
from jenga.vllm_plugin.config import CheckpointOptions

logger = init_logger("vllm.jenga")

MOST_TOLD = 4096
"""Junctions that wait to be told of: as many as are remembered."""


def options(config: VllmConfig) -> CheckpointOptions:
    """The options of an engine: its settings, and what its tokenizer says.

    Raises:
        ValueError: a bad setting; the message names it.
    """
    wanted = settings.read(config).checkpoints
    return CheckpointOptions(markers(config) if wanted.turns else frozenset(), wanted.answers, wanted.pass_tokens)


def markers(config: VllmConfig) -> frozenset[int]:
    """Special tokens of the model's tokenizer; none if it has no tokenizer here."""
    if not config.cache_config.enable_prefix_caching:
        return frozenset()
    try:
        tokenizer: Any = cached_tokenizer_from_config(config.model_config)
    except Exception as error:  # it may live elsewhere (token ids in, token ids out); turns are only a hint
        logger.info("Jenga: no checkpoints at turns, since the tokenizer cannot be loaded here: %s", error)
        return frozenset()
    if tokenizer is None:
        return frozenset()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if getattr(t, "special", False)}


class Kept:
    """What is kept of one request; lengths in tokens."""

    __slots__ = ("answer", "boundaries", "computed", "hints", "prompt_end", "request", "states")

    def __init__(self, request: Request, hints: tuple[int, ...]) -> None:
        self.request = request
        self.hints = hints
        self.boundaries = Boundaries((), ())
        self.prompt_end = 0
        """The last boundary of the prompt (of a resumed request: of all it had)."""
        self.computed = 0
        """Tokens for which pages were cached last."""
        self.answer = 0
        """Where the states of `states` lie."""
        self.states: list[tuple[Any, KVCacheBlock, Any]] = []
        """Pool, block and hash of each state kept for the end of the answer."""


class Checkpoints:
    """Lengths to keep, by request."""

    def __init__(self, chosen: CheckpointOptions, alignment: int, hash_tokens: int) -> None:
        self.options = chosen
        self.alignment = alignment
        self.hash_tokens = hash_tokens
        self.shared = SharedPrefixes()
        self._learned: list[BlockHash] = []
        self.requests: dict[str, Kept] = {}

    def learn(self, hashes: Sequence[BlockHash], hit: Hit) -> None:
        """A lookup found that its prompt leaves an earlier one behind `hit.furthest`."""
        if hit.furthest > hit.tokens:
            junction = hashes[hit.furthest // self.hash_tokens - 1]
            if junction not in self.shared:
                self._learned.append(junction)
                del self._learned[:-MOST_TOLD]
            self.shared.learn(junction)

    def take_learned(self) -> list[BlockHash]:
        """Prefixes learned since the last call, of which routers do not know yet."""
        learned, self._learned = self._learned, []
        return learned

    def of(self, request: Request, start: int | None = None) -> Kept:
        """What to keep of `request`; `start`, in tokens, is where it resumes while it is not admitted yet."""
        kept = self.requests.get(request.request_id)
        if kept is None:
            kept = self.requests[request.request_id] = Kept(request, self._hints(request))
        elif start is None:
            return kept
        hit = Hit(start or 0, max(start or 0, request.shared_prefix_boundary), None)
        kept.boundaries = boundaries(hit, request.num_tokens, self.alignment, kept.hints, self.options.pass_tokens)
        kept.prompt_end = (request.num_tokens - 1) // self.alignment * self.alignment
        return kept

    def chunk(self, request: Request, start: int, tokens: int, stock: int) -> int:
        """Tokens of the next chunk of a prefill.

        From `start` on, at most `tokens`; vLLM would pause after `stock` of them: at a block, at the prompt's end, or
        where a shared prefix ends, whatever that spares.
        """
        kept = self.of(request, start if request.num_computed_tokens == 0 else None)
        end = start + stock
        inside = end > kept.prompt_end  # the backend keeps the state of the prompt's end without a pause
        if end in kept.boundaries.lengths and end not in kept.boundaries.pauses and start % self.alignment == 0:
            most = start + tokens
            end = most if most >= request.num_tokens else max(end, most // self.alignment * self.alignment)
        pauses = (b for b in kept.boundaries.pauses if start < b < end and not (inside and b == kept.prompt_end))
        return min(pauses, default=end) - start

    def _hints(self, request: Request) -> tuple[int, ...]:
        size = self.hash_tokens
        known = (pages * size for pages in self.shared.ends(request.block_hashes))
        if not self.options.markers or request.prompt_token_ids is None:
            return tuple(known)
        return (*known, *turn_starts(request.prompt_token_ids, self.options.markers, self.alignment))


def install() -> None:
    """Let the scheduler pause prefills where, and only where, a state is to be kept."""
    original = Scheduler._mamba_block_aligned_split

    def _mamba_block_aligned_split(
        self: Any,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        computed = request.num_computed_tokens
        if computed >= request.num_prompt_tokens and computed >= request.num_tokens - 1:
            return num_new_tokens  # a decode; vLLM says the same, later
        stock: int = original(
            self, request, num_new_tokens, num_new_local_computed_tokens, num_external_computed_tokens
        )
        manager = getattr(self, "kv_cache_manager", None)  # vLLM's tests call this with less than a scheduler
        checkpoints = getattr(manager and manager.coordinator, "checkpoints", None)
        if checkpoints is None or num_new_tokens <= 1:
            return stock
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        return int(checkpoints.chunk(request, start, num_new_tokens, stock))

    setattr(Scheduler, "_mamba_block_aligned_split", _mamba_block_aligned_split)  # noqa: B010
