"""Recurrent states: a state moves on in its page unless what the page holds now is worth keeping.

vLLM's manager gives a running state a new page at every block boundary and copies it there, which at natural block
sizes would take a second page and a copy every few tokens.  Here only a state that is kept (its page has a hash) stays
behind; any other page goes along to the next boundary with its request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import KVCacheGroupRole, KVCacheSpec, MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

ROLE = "jenga_state"
"""Role of layer groups that get a `StateManager`."""


class StateManager(MambaManager):
    """vLLM's manager of recurrent states, for pages on the two-level allocator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keeps: Callable[[str, int], bool] = _keeps_nothing
        """Whether a request's state at a length in tokens is to be kept; the coordinator knows."""
        self._given_up: set[str] = set()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """New pages for a request."""
        moved = self.moves(request_id, num_tokens_main_model)
        if moved and not self.has_prefill_checkpoint_blocks and request_id not in self._partial_hit_reqs:
            return 0  # the usual case, told without vLLM's long sum
        pages: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        # All that vLLM counts beyond the running state's page is for a checkpoint inside the next chunk.
        return pages - 1 if pages and moved else pages

    def moves(self, request_id: str, tokens: int) -> bool:
        """Whether growing to `tokens` tokens takes the running state along in its page."""
        page = self._left_behind(request_id, tokens)
        if page is None:
            return False
        if request_id in self._given_up:
            return True
        # With async scheduling a request grows before vLLM hands over the block that it has completed.
        return page.block_hash is None and not self.keeps(
            request_id, len(self.req_to_blocks[request_id]) * self.block_size
        )

    def can_give_up(self, request_id: str, tokens: int) -> bool:
        """Whether growing to `tokens` tokens would leave a kept state behind that nobody else uses."""
        return self._left_behind(request_id, tokens) is not None and not self.moves(request_id, tokens)

    def give_up(self, request_id: str) -> None:
        """Let the running state be overwritten, once, although hits could use it."""
        self._given_up.add(request_id)
        self.block_pool._maybe_evict_cached_block(self.req_to_blocks[request_id][-1])

    def _left_behind(self, request_id: str, tokens: int) -> KVCacheBlock | None:
        """The running state's page, used by nobody else, if growing to `tokens` tokens leaves its block."""
        if self.mamba_cache_mode != "align" or request_id not in self._allocated_block_reqs:
            return None
        blocks: list[KVCacheBlock] = self.req_to_blocks[request_id]
        page = blocks[-1]
        alone = page.ref_cnt == 1 and not page.is_null
        return page if alone and cdiv(tokens, self.block_size) > len(blocks) else None

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """New entries of the request's block table."""
        if not self.moves(request_id, num_tokens_main_model):
            return list(super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model))
        blocks: list[KVCacheBlock] = self.req_to_blocks[request_id]
        self._given_up.discard(request_id)
        before = len(blocks)
        page, blocks[-1] = blocks[-1], self._null_block
        # The worker writes a checkpoint inside the chunk to the column before the last.
        inside = 1 if request_id in self._checkpoints else 0
        skipped = cdiv(num_tokens_main_model, self.block_size) - 1 - inside
        blocks.extend([self._null_block] * (skipped - before))
        blocks.extend(self.block_pool.get_new_blocks(inside))
        blocks.append(page)
        return blocks[before:]


def _keeps_nothing(request_id: str, tokens: int) -> bool:
    return False


def role_of(spec: KVCacheSpec) -> Any:
    """Role of a layer group with this spec (a plain string: vLLM's own roles are an enumeration of strings)."""
    return ROLE if isinstance(spec, MambaSpec) else KVCacheGroupRole.DEFAULT


def install() -> None:
    """Let vLLM make a `StateManager` for groups with the role `ROLE`."""
    KVCacheSpecRegistry.register_role_manager(ROLE, StateManager)
