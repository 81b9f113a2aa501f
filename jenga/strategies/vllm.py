"""vLLM 0.32: what its planner does, computed without it (tests compare the two).

All blocks of all groups have one size in bytes, that of the widest group, and one pool.  Reached in steps:

1. with recurrent layers, attention blocks grow to as many tokens as one layer's state takes bytes, and states are
   padded to the difference (`Platform._align_hybrid_block_size`);
2. layers of one kind share a block table if that alone covers the model (`get_kv_cache_groups`);
3. otherwise, where kernels want the layers of a block side by side (indexers do), layers of unlike pages are packed
   into groups near the widest one's bytes (`_get_packed_kv_cache_groups`);
4. otherwise pages are made equal, by more tokens or padding, and every kind is cut into groups of as many layers as
   the smallest kind has (`_get_kv_cache_groups_uniform_page_size`): missing layers are padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm

from jenga.layers import LayerType
from jenga.layout import GroupLayout, LayerGroup, Layout
from jenga.policies import (
    ChunkedLocal,
    FullAttention,
    LatentAttention,
    LatentIndexer,
    RecurrentState,
    Scratch,
    SlidingWindow,
    TokenBudget,
)
from jenga.strategies.base import Plan, PlanError, Share, Workload, require_pages
from jenga.strategies.pools import TwoLevel

NAME = "vllm"

MLA_BLOCK_ALIGNMENT = 128
"""Tokens; hybrid models with MLA get blocks of a multiple of this."""


@dataclass(frozen=True)
class _Spec:
    """One layer's pages, as a KVCacheSpec says it."""

    type: LayerType
    block: int
    """Tokens per block."""
    page: int
    """Bytes per block, padding included."""

    @property
    def family(self) -> tuple[object, ...]:
        """Layers of one family can share a block table (`UniformTypeKVCacheSpecs`)."""
        policy = self.type.policy
        if isinstance(policy, FullAttention):  # MLA, indexers and token budgets are kinds of it
            return ("full", self.block)
        if isinstance(policy, SlidingWindow):
            return ("sliding", policy.window, self.block)
        if isinstance(policy, ChunkedLocal):
            return ("chunked", policy.chunk, self.block)
        if isinstance(policy, RecurrentState):
            return ("state", self.page, self.block)
        return (policy.kind, self.block)

    @property
    def identity(self) -> tuple[object, ...]:
        """Layers of equal identity have equal specs."""
        kind = "full_attention" if isinstance(self.type.policy, TokenBudget) else self.type.policy.kind
        return (kind, *self.family, self.page, self.type.shape)

    @property
    def is_mla(self) -> bool:
        return isinstance(self.type.policy, LatentAttention | LatentIndexer)


@dataclass(frozen=True)
class _Group:
    layers: tuple[tuple[_Spec, int], ...]

    @property
    def bytes(self) -> int:
        return sum(spec.page * count for spec, count in self.layers)


def plan(model: str, types: Sequence[LayerType], memory_bytes: int, workload: Workload) -> Plan:
    """See `jenga.strategies.base.Strategy`."""
    states = [t for t in types if isinstance(t.policy, RecurrentState)]
    drafts = [t for t in types if isinstance(t.policy, Scratch) and t.copies > 1]
    block = _attention_block(types, states)
    specs = [_spec(t, block, types) for t in types if t not in drafts]
    packed = any(isinstance(t.policy, LatentIndexer) for t in types)
    groups, how = _groups(model, specs, packed)
    block_bytes = max(g.bytes for g in groups)
    units = memory_bytes // block_bytes
    places: list[GroupLayout] = []
    contents: list[tuple[Share, ...]] = []
    for number, group in enumerate(groups):
        shares = tuple(Share(spec.type, count) for spec, count in group.layers)
        places.append(_place(number, group, shares, block_bytes))
        contents.append(shares)
        for copy, share in _draft_copies(shares, drafts):
            place = _place(number, group, (share,), block_bytes)
            places.append(
                replace(place, group=replace(place.group, name=f"{place.group.name} draft {copy}", policy=Scratch()))
            )
            contents.append((share,))
    require_pages(NAME, model, memory_bytes, block_bytes, units, len(places) + 1)
    return Plan(
        strategy=NAME,
        model=model,
        memory_bytes=memory_bytes,
        layout=Layout(block_bytes, tuple(places), 0.0, 0.0, "one block size for all groups"),
        contents=tuple(contents),
        shape=TwoLevel(units, (1,) * len(places)),
        explanation=f"attention blocks of {block} tokens; {how}; every block takes {block_bytes} bytes",
    )


def _attention_block(types: Sequence[LayerType], states: Sequence[LayerType]) -> int:
    """Tokens per attention block, after growing it for the largest state."""
    attention = [t for t in types if not t.is_state]
    if not attention:
        return 16
    main = next((t for t in attention if isinstance(t.policy, FullAttention)), attention[0])
    block = max(16, main.block_tokens)
    if not states:
        return block
    step = max(block, MLA_BLOCK_ALIGNMENT) if isinstance(main.policy, LatentAttention) else block
    token = main.page_bytes(main.cell_tokens) // main.cell_tokens
    grown = step * -(-max(t.state_bytes for t in states) // (step * token))
    every = lcm(*(t.block_tokens for t in attention))
    return max(block, every * -(-grown // every))


def _spec(kind: LayerType, block: int, types: Sequence[LayerType]) -> _Spec:
    if isinstance(kind.policy, Scratch):
        return _Spec(kind, 1, kind.state_bytes)
    if kind.is_state:
        main = next((t for t in types if isinstance(t.policy, FullAttention)), None)
        main = main or next((t for t in types if not t.is_state), None)
        page = kind.state_bytes if main is None else main.page_bytes(block)
        return _Spec(kind, block, max(page, kind.state_bytes))
    if isinstance(kind.policy, SlidingWindow) and kind.max_block_tokens is not None and kind.max_block_tokens < block:
        block = kind.max_block_tokens
    return _Spec(kind, block, kind.page_bytes(block))


def _groups(model: str, specs: list[_Spec], packed: bool) -> tuple[list[_Group], str]:
    if len({s.family for s in specs}) == 1:
        return [_Group(tuple((s, s.type.layers) for s in specs))], "one group"
    if packed and len({s.page for s in specs}) > 1:
        groups = _packed(specs)
        return groups, f"{len(groups)} groups, packed block by block"
    equal = _equal_pages(specs)
    if equal is None:
        return _full_allocation(model, specs), "one group: sliding windows kept as full attention"
    groups = _equal_groups(equal)
    return groups, f"{len(groups)} groups of equal pages"


def _equal_pages(specs: Sequence[_Spec]) -> list[_Spec] | None:
    """Specs with the page of the largest (`unify_kv_cache_spec_page_size`); None if MLA stands in the way."""
    largest = max(s.page for s in specs)
    equal = []
    for spec in specs:
        if spec.type.is_state or spec.page == largest:
            equal.append(replace(spec, page=largest))
        elif largest % spec.page == 0:
            equal.append(replace(spec, block=spec.block * (largest // spec.page), page=largest))
        elif spec.is_mla:
            return None
        else:
            equal.append(replace(spec, page=largest))
    return equal


def _full_allocation(model: str, specs: Sequence[_Spec]) -> list[_Group]:
    """MLA beside sliding windows whose pages cannot be made equal: the windows keep everything."""
    blocks = {s.block for s in specs if s.is_mla}
    fits = all(isinstance(s.type.policy, FullAttention | SlidingWindow) for s in specs)
    if not fits or len(blocks) != 1:
        raise PlanError(
            f"{model}: vLLM 0.32 has no plan for it (MLA pages that do not divide the largest page, beside "
            "other types); leave strategy vllm out"
        )
    block = blocks.pop()
    promoted = [s if s.block == block else _Spec(s.type, block, s.type.page_bytes(block)) for s in specs]
    return [_Group(tuple((s, s.type.layers) for s in promoted))]


def _equal_groups(specs: Sequence[_Spec]) -> list[_Group]:
    buckets: dict[tuple[object, ...], list[_Spec]] = {}
    for spec in specs:
        buckets.setdefault(spec.identity, []).append(spec)
    counts = [sum(s.type.layers for s in bucket) for bucket in buckets.values()]
    size = max(counts) if max(counts) < min(counts) * 1.5 else min(counts)
    parts = [-(-count // size) for count in counts]
    return [group for bucket, n in zip(buckets.values(), parts, strict=True) for group in _cut(bucket, n)]


def _cut(bucket: Sequence[_Spec], groups: int) -> list[_Group]:
    """Every `groups`-th layer of a bucket into one group; a bucket of several types is cut type after type."""
    cut: list[list[tuple[_Spec, int]]] = [[] for _ in range(groups)]
    first = 0
    for spec in bucket:
        for i in range(groups):
            count = len(range((i - first) % groups, spec.type.layers, groups))
            if count:
                cut[i].append((spec, count))
        first += spec.type.layers
    return [_Group(tuple(layers)) for layers in cut]


def _packed(specs: Sequence[_Spec]) -> list[_Group]:
    buckets: dict[tuple[object, ...], list[_Spec]] = {}
    for spec in specs:
        buckets.setdefault(spec.family, []).append(spec)
    by_page = []
    for bucket in buckets.values():
        pages: Counter[int] = Counter()
        for spec in bucket:
            pages[spec.page] += spec.type.layers
        by_page.append(pages)
    balanced = [len(set(pages.values())) == 1 for pages in by_page]
    least = max((max(p.values()) for p, even in zip(by_page, balanced, strict=True) if even and len(p) > 1), default=0)
    repeats = None
    if least:
        repeats = _approximate_divisor(
            [max(p.values()) for p, even in zip(by_page, balanced, strict=True) if even], least
        )

    def groups_for(pages: Counter[int], even: bool) -> int:
        return -(-max(pages.values()) // repeats) if even and repeats is not None else 1

    def is_state(bucket: Sequence[_Spec]) -> bool:
        return bucket[0].type.is_state or (repeats is None and isinstance(bucket[0].type.policy, SlidingWindow))

    def widest(pages: Counter[int], groups: int) -> int:
        return sum(-(-count // groups) * page for page, count in pages.items())

    anchor = max(
        widest(pages, sum(pages.values()) if is_state(bucket) else groups_for(pages, even))
        for bucket, pages, even in zip(buckets.values(), by_page, balanced, strict=True)
    )
    groups: list[_Group] = []
    for bucket, pages, even in zip(buckets.values(), by_page, balanced, strict=True):
        number = groups_for(pages, even)
        if is_state(bucket):
            number = max(number, -(-sum(pages.values()) // max(1, anchor // bucket[0].page)))
        groups.extend(_cut_each(bucket, number))
    return groups


def _cut_each(bucket: Sequence[_Spec], groups: int) -> list[_Group]:
    """Like `_cut`, but every page size on its own, so that groups repeat the same pattern of sizes."""
    sizes: dict[int, list[_Spec]] = {}
    for spec in bucket:
        sizes.setdefault(spec.page, []).append(spec)
    cuts = [_cut(specs, groups) for specs in sizes.values()]
    return [_Group(tuple(layer for cut in cuts for layer in cut[i].layers)) for i in range(groups)]


def _approximate_divisor(values: Sequence[int], least: int) -> int:
    """The largest d from `least` to the largest value that pads the values least when each is rounded up to it."""
    candidates = range(least, max(values) + 1)
    return min(candidates, key=lambda d: (sum(-v % d for v in values), -d), default=least)


def _draft_copies(shares: Sequence[Share], drafts: Sequence[LayerType]) -> list[tuple[int, Share]]:
    """A block more per draft token for every group of recurrent layers."""
    if not shares or not isinstance(shares[0].type.policy, RecurrentState):
        return []
    state = shares[0].type
    mine = [d for d in drafts if d.state_bytes == state.state_bytes and d.layers == state.layers]
    return [
        (copy + 1, Share(replace(draft, copies=1), shares[0].layers)) for draft in mine for copy in range(draft.copies)
    ]


def _place(number: int, group: _Group, shares: Sequence[Share], block_bytes: int) -> GroupLayout:
    spec = group.layers[0][0]
    policy = spec.type.policy
    # vLLM drops no tokens by their content, and windows beside MLA only if their pages can be made equal.
    promoted = isinstance(policy, TokenBudget) or (
        isinstance(policy, SlidingWindow) and any(s.is_mla for s, _ in group.layers)
    )
    names = " + ".join(dict.fromkeys(s.type.name for s in shares))
    made = LayerGroup(
        name=f"{number}: {names}",
        policy=FullAttention() if promoted else policy,
        layers=sum(s.layers for s in shares),
        page_tokens=spec.block,
        page_bytes=sum(s.type.page_bytes(spec.block) * s.layers for s in shares),
        alignment=gcd(*(s.type.alignment for s in shares)),
    )
    return GroupLayout(made, 1, block_bytes)
