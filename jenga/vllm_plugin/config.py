"""The KV cache configuration that carries Jenga's geometry from the planner to scheduler and workers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor

from jenga import __version__
from jenga.checkpoints import PASS_TOKENS
from jenga.layout import GroupLayout, Layout
from jenga.metrics.stock import StockPlan
from jenga.vllm_plugin import SWITCH, registered


@dataclass(frozen=True)
class CheckpointOptions:
    """How an engine chooses the lengths at which windows and states are kept."""

    markers: frozenset[int] = frozenset()
    """Token ids that mark turns; none if turns are not looked for."""
    answers: bool = True
    """Whether the end of an answer is kept."""
    pass_tokens: int = PASS_TOKENS
    """What one more forward pass costs, in tokens."""


@dataclass
class JengaGroupSpec(KVCacheGroupSpec):
    """A vLLM layer group, which is a part of a layer type's pages, with its place in the two-level geometry.

    Every group repeats the layout, so that a list of groups plans the same way in every process.
    """

    layout: Layout = field(kw_only=True)
    index: int = field(kw_only=True)
    """Number of the layer type in the layout."""
    part: int = field(default=0, kw_only=True)
    """Which part of the type's pages.  In a list of groups the first parts of all types stand first, so that a type
    and its first group have the same number; the other parts follow, type by type."""

    @property
    def place(self) -> GroupLayout:
        """Ratio and stride of this group's pages."""
        return self.layout.groups[self.index]


@dataclass
class JengaKVCacheConfig(KVCacheConfig):
    """vLLM's configuration with `num_blocks` counting large pages.

    Group ``g`` addresses ``num_blocks * ratio`` small pages, page 0 being its null block.
    """

    checkpoints: CheckpointOptions = field(default=CheckpointOptions(), kw_only=True)
    """What is kept for later requests."""
    stock: StockPlan | None = field(default=None, kw_only=True)
    """vLLM's own plan for the same layers, None if it has none; only metrics ask for it."""
    planned_by: str = field(default=__version__, kw_only=True)
    """Version of Jenga Serve that made this."""

    @cached_property
    def ratios(self) -> tuple[int, ...]:
        """Small pages per large page, by vLLM group."""
        return tuple(g.place.ratio for g in self.jenga_groups)

    @property
    def layout(self) -> Layout:
        """The geometry."""
        return self.jenga_groups[0].layout

    @property
    def jenga_groups(self) -> tuple[JengaGroupSpec, ...]:
        """The groups, typed."""
        return tuple(g for g in self.kv_cache_groups if isinstance(g, JengaGroupSpec))

    @cached_property
    def id_offsets(self) -> tuple[int, ...]:
        """Where each group's page ids start in a list that names pages of all groups (the zero list)."""
        return tuple(accumulate((self.num_blocks * r for r in self.ratios[:-1]), initial=0))

    def num_blocks_of(self, tensor: KVCacheTensor) -> int:
        """Small pages that `tensor`'s group addresses (vLLM's workers size each layer's view with this).

        Raises:
            RuntimeError: this worker is not what the scheduler planned for.
        """
        self._check_worker()
        name = tensor.layers[0]
        return self.num_blocks * next(g.place.ratio for g in self.jenga_groups if name in g.layer_names)

    def _check_worker(self) -> None:
        """Refuse a worker that would take page ids for vLLM's: another node's environment may differ."""
        if not registered():
            raise RuntimeError(
                f"the scheduler planned with Jenga's memory manager, but this worker runs without it ({SWITCH}="
                f"{os.environ.get(SWITCH, 'unset')}): install jenga-serve {self.planned_by} and set {SWITCH} alike on "
                "all nodes"
            )
        if self.planned_by != __version__:
            raise RuntimeError(
                f"the scheduler planned with jenga-serve {self.planned_by}, but this worker has {__version__}: "
                "install one version on all nodes"
            )
