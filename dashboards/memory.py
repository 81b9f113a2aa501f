"""Dashboard "Memory": where each replica's KV memory is, and what stock vLLM would have lost."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from dashboards import expressions as e
from dashboards.panels import CAUSE_COLOURS, Line, Text, heat, number, page, series
from dashboards.source import Source
from jenga.metrics.definitions import POOL
from jenga.metrics.memory import LIVE_CAUSES

UID = "jenga-memory"
_BY_CAUSE = (
    "Take the widest band that is neither needed nor cached: tail and padding want smaller pages "
    "(engine.block_size), stranded wants other groups (jenga plan), droppable is a fault worth reporting."
)


def dashboard(s: Source) -> Dashboard:
    """Build it for one kind of source."""
    memory, large = s.ours("jenga_memory_bytes"), s.ours("jenga_large_pages")
    in_groups = s.ours("jenga_memory_bytes", f'group!="{POOL}"')
    owner = s.engine
    board = page("Jenga: Memory", UID, "KV memory by cause, group and page state, per replica.", s)
    board = board.with_panel(
        number(
            Text(
                "Lost",
                "percentunit",
                "Share of the KV memory that is tail, droppable, padding or stranded: held, but of no use now.",
                "Above a quarter, see which cause and which group below, and jenga plan for the model.",
            ),
            e.waste_ratio(s),
            bad_above=0.25,
        )
    )
    board = board.with_panel(
        number(
            Text(
                "Stock vLLM would lose",
                "percentunit",
                "The same requests under the page plan of vLLM 0.32: held less needed, as a share of the KV memory.",
                "Nothing to mend: below what is lost here, the model gains nothing from Jenga (JENGA=0 turns it off).",
            ),
            e.stock_waste_ratio(s),
        )
    )
    board = board.with_panel(
        number(
            Text(
                "Held by live requests",
                "percentunit",
                "Share of the KV memory that requests hold now.",
                "Near 100 % requests wait and are preempted: more replicas, more kv_memory, or shorter requests.",
            ),
            f"{e.total(s.ours('jenga_memory_bytes', _any(*LIVE_CAUSES)))} / {e.total(s.ours('jenga_buffer_bytes'))}",
            bad_above=0.95,
        )
    )
    board = board.with_panel(
        number(
            Text(
                "Cached",
                "percentunit",
                "Share of the KV memory that only the prefix cache holds; any request may have it.",
                "Small while the hit rate is low: the cache has no room; more kv_memory or more replicas.",
            ),
            f"{e.total(s.ours('jenga_memory_bytes', _any('cached')))} / {e.total(s.ours('jenga_buffer_bytes'))}",
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Memory by cause, replica $replica",
                "bytes",
                "Where every byte of the KV buffer is; the bands add up to the whole buffer (docs/memory.md).",
                _BY_CAUSE,
            ),
            *[Line(e.total(s.ours("jenga_memory_bytes", f'state="{cause}"')), cause) for cause in _ORDER],
            stacked=True,
            colours=CAUSE_COLOURS,
            height=9,
            repeat="replica",
        )
    )
    board = board.with_row(Row("Groups and pages"))
    board = board.with_panel(
        series(
            Text(
                "Lost, against stock vLLM",
                "bytes",
                "Bytes lost here by cause (areas), and what stock vLLM's plan would lose for the same requests (line).",
                "Areas above the line for long: this model and load do better with vLLM's own plan; report it.",
            ),
            *[Line(e.total(s.ours("jenga_memory_bytes", f'state="{cause}"')), cause) for cause in e.WASTE],
            Line(e.total(s.ours("jenga_stock_wasted_bytes")), "stock vLLM"),
            stacked=True,
            line="stock vLLM",
            colours=CAUSE_COLOURS,
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Memory by layer group",
                "bytes",
                "Bytes that each layer group holds: needed, cached or lost. (pool) is free or reserved.",
                "A group that grows while others starve: long contexts (full attention) or many requests (states).",
            ),
            Line(e.total(memory, ("group",)), "{{group}}"),
            stacked=True,
        )
    )
    board = board.with_panel(
        heat(
            Text(
                "States of pages",
                "percentunit",
                "For each group, the share of its small pages that is live, cached or stranded (free, but "
                "of use to this group only).",
                "A stranded row that stays bright: the group's large pages come free in parts only; see jenga plan.",
            ),
            Line(
                f"{e.total(s.ours('jenga_pages'), ('group', 'state'))} / on (group) group_left () "
                f"({e.total(s.ours('jenga_pages'), ('group',))} > 0)",
                "{{group}} {{state}}",
            ),
            maximum=1,
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Large pages by owner",
                "short",
                "Large pages that groups own, that nobody owns (free), and of the owned those that eviction can give.",
                "No free and few evictable ones: requests wait; see admission refusals.",
            ),
            Line(e.total(large, ("group", "state")), "{{group}} {{state}}"),
            Line(e.total(s.ours("jenga_evictable_large_pages")), "of them evictable"),
            legend_right=True,
        )
    )
    board = board.with_row(Row("Pressure"))
    board = board.with_panel(
        series(
            Text(
                "Requests",
                "short",
                "Requests that hold KV memory (resident), and those that wait for it.",
                "Waiting for minutes: add replicas or kv_memory; on one replica only: see the router's dashboard.",
            ),
            Line(e.total(s.ours("jenga_requests"), ("state",)), "{{state}}"),
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Refusals and preemptions",
                "cps",
                "Requests that had to wait for memory, and running ones that could not grow, by the group that asked "
                "for most of it.",
                "Preempted work is done twice: lower engine.max_num_seqs, or raise kv_memory.",
            ),
            Line(e.rate(s.ours("jenga_admission_refusals_total"), ("group",)), "refused: {{group}}"),
            Line(e.rate(s.ours("jenga_preemptions_total"), ("group",)), "preempted: {{group}}"),
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Evictions",
                "cps",
                "Cached pages that lost their contents, by group and cause.",
                "Many, and soon after their last use: the cache is too small for what is asked again.",
            ),
            Line(e.rate(s.ours("jenga_evicted_pages_total"), ("group", "cause")), "{{group}} {{cause}}"),
            legend_right=True,
        )
    )
    board = board.with_panel(
        heat(
            Text(
                "Age at eviction",
                "cps",
                "How long what is evicted had not been used, as evictions per second for each age.",
                "Ages below the pause between two turns of a conversation: their prefixes are gone when they return.",
            ),
            Line(e.rate(s.ours("jenga_eviction_age_seconds", part="bucket"), ("le",)), "{{le}}"),
            buckets="s",
        )
    )
    return board.with_panel(
        series(
            Text(
                "Fragmentation",
                "percentunit",
                "For each replica, the share of its groups' large pages that is free slots, of use to one group only.",
                "Above a third for long: large pages hold too many small ones; jenga plan shows other divisions.",
            ),
            Line(
                f"{e.total(s.ours('jenga_memory_bytes', _any('stranded')), owner)} / ({e.total(in_groups, owner)} > 0)",
                f"{{{{{s.replica}}}}}",
            ),
            maximum=1,
            width=24,
            height=6,
        )
    )


# From the bottom of the stack: what is used, what is lost, what is left.
_ORDER = ("needed", "cached", *e.WASTE, "reserved", "remainder", "free")
assert sorted(_ORDER) == sorted(e.CAUSES)


def _any(*states: str) -> str:
    return f'state=~"{"|".join(states)}"'
