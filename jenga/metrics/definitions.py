"""Every metric, defined once: all exporters and docs/metrics.md are made from this table.

Names follow Prometheus' conventions: the prefix ``jenga_``, base units (bytes, seconds, ratio), the unit as a word of
the name, ``_total`` at the end of counters.  A definition that breaks one cannot be made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from jenga.allocator import EVICTION_CAUSES
from jenga.metrics.memory import GROUP_CAUSES, POOL_CAUSES

Kind = Literal["gauge", "counter", "histogram"]
Source = Literal["engine", "replica", "router"]

POOL = "(pool)"
"""Value of the label `group` for what belongs to no group."""

MAX_VALUES = 64
"""Most values of a label whose values depend on the model; what is beyond is a fault and not exported."""

_NAME = re.compile(r"jenga(_[a-z][a-z0-9]*)+")
_LABEL = re.compile(r"[a-z][a-z0-9_]*")
_SCALED = {"ms", "us", "ns", "milliseconds", "microseconds", "minutes", "hours", "kb", "mb", "gb", "kib", "mib", "gib"}
_SCALED |= {"kilobytes", "megabytes", "gigabytes", "percent", "percentage"}


class DefinitionError(ValueError):
    """A metric breaks a convention; the message names both."""


@dataclass(frozen=True)
class Label:
    """A label with a closed set of `values`, or with at most `limit` values that `meaning` bounds.

    Raises:
        DefinitionError: the name is none, or nothing bounds the values.
    """

    name: str
    meaning: str
    values: tuple[str, ...] = ()
    limit: int = 0

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.name) or self.name.startswith("__"):
            raise DefinitionError(f"label {self.name!r}: a name is lower case letters, digits and underscores")
        if not self.values and not 0 < self.limit <= MAX_VALUES:
            raise DefinitionError(f"label {self.name!r}: name its values, or a limit of at most {MAX_VALUES}")

    @property
    def most(self) -> int:
        """Most values that it can take."""
        return len(self.values) or self.limit


@dataclass(frozen=True)
class Metric:
    """One metric; times are seconds, sizes bytes.

    Raises:
        DefinitionError: name, unit, labels or buckets break a convention.
    """

    name: str
    kind: Kind
    unit: str
    """A word of the name; base units only."""
    meaning: str
    sums: str
    """Over which labels, and over what else, values may be added."""
    labels: tuple[Label, ...] = ()
    source: Source = "engine"
    """Who measures it: an engine's core, a replica's process, or a router."""
    buckets: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets, ascending and above 0; the last one, infinity, goes without saying."""

    def __post_init__(self) -> None:
        words = self.name.split("_")
        if not _NAME.fullmatch(self.name):
            raise DefinitionError(f"{self.name!r} is no metric name: jenga_, then lower case words")
        if (self.kind == "counter") != (words[-1] == "total"):
            raise DefinitionError(f"{self.name}: counters, and only they, end in _total; this is a {self.kind}")
        if not self.unit or self.unit in _SCALED or self.unit not in words:
            raise DefinitionError(f"{self.name}: its unit {self.unit!r} is not a base unit that the name says")
        if not self.meaning or not self.sums:
            raise DefinitionError(f"{self.name}: say what it means and what may be summed")
        if len({label.name for label in self.labels}) != len(self.labels):
            raise DefinitionError(f"{self.name}: a label is named twice")
        if (self.kind == "histogram") != bool(self.buckets):
            raise DefinitionError(f"{self.name}: histograms, and only they, have buckets")
        if any(b <= a for a, b in zip((0.0, *self.buckets), self.buckets, strict=False)):
            raise DefinitionError(f"{self.name}: buckets must ascend from above 0: {self.buckets}")

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of its labels, in order."""
        return tuple(label.name for label in self.labels)


def _values(name: str, values: tuple[str, ...], meaning: str) -> Label:
    return Label(name, meaning, values)


GROUP = Label("group", "a layer group of the model", limit=MAX_VALUES)
GROUP_OR_POOL = Label("group", f"a layer group of the model, or {POOL}", limit=MAX_VALUES)

EVICTION_BUCKETS = tuple(4.0**n for n in range(-2, 7))
"""Seconds, 1/16 to 4,096; powers of four, so that the allocator finds a bucket without a search."""
CHECKPOINT_CAUSES = ("evicted", "overwritten", "replaced", "reset", "unreachable")
FALLBACKS = ("no tokens", "no index", "index failed", "adapter")
REPAIRS = ("gap", "replay", "snapshot", "restart")
OUTCOMES = ("exact", "over", "under")

_EVERYTHING = "everything"
_REPLICAS = "over replicas"

METRICS: tuple[Metric, ...] = (
    # -- memory ---------------------------------------------------------------------------------------------
    Metric(
        "jenga_memory_bytes",
        "gauge",
        "bytes",
        "KV memory by layer group and cause (docs/memory.md); a replica's sum is exactly its jenga_buffer_bytes",
        _EVERYTHING,
        (GROUP_OR_POOL, _values("state", GROUP_CAUSES + POOL_CAUSES, "cause")),
    ),
    Metric("jenga_buffer_bytes", "gauge", "bytes", "The whole KV buffer", _REPLICAS),
    Metric("jenga_large_page_bytes", "gauge", "bytes", "Size of one large page", "nothing"),
    Metric(
        "jenga_pages",
        "gauge",
        "pages",
        "Small pages of the large pages that a group owns, by state",
        "over state and replicas; pages of unlike groups have unlike sizes",
        (GROUP, _values("state", ("live", "cached", "stranded"), "live: in use; cached: hits only; stranded: free")),
    ),
    Metric(
        "jenga_large_pages",
        "gauge",
        "pages",
        "Large pages by owner; a replica's sum is all of them",
        "everything, between replicas of one model",
        (GROUP_OR_POOL, _values("state", ("owned", "free", "reserved"), "owned by a group, or the pool's")),
    ),
    Metric(
        "jenga_evictable_large_pages",
        "gauge",
        "pages",
        "Owned large pages that hold nothing live: eviction gives them to any group",
        "over replicas; never with jenga_large_pages, which has them already",
    ),
    Metric(
        "jenga_fragmentation_ratio",
        "gauge",
        "ratio",
        "Share of a group's large pages that is free slots, of use to this group only (0 to 1)",
        "nothing: divide sums of jenga_memory_bytes",
        (GROUP,),
    ),
    Metric(
        "jenga_stock_held_bytes",
        "gauge",
        "bytes",
        "KV memory that vLLM 0.32's own plan would hold for the resident requests; prefixes that requests share count "
        "once, in whole blocks of that plan.  Absent if vLLM has no plan for the model",
        _REPLICAS,
    ),
    Metric(
        "jenga_stock_wasted_bytes",
        "gauge",
        "bytes",
        "jenga_stock_held_bytes less what those requests need",
        "over replicas; beside the causes tail, droppable, padding and stranded of jenga_memory_bytes",
    ),
    Metric(
        "jenga_report_timestamp_seconds",
        "gauge",
        "seconds",
        "When the engine core wrote the report that the other values are from (seconds since 1970, its clock)",
        "nothing",
    ),
    # -- requests -------------------------------------------------------------------------------------------
    Metric(
        "jenga_requests",
        "gauge",
        "requests",
        "Requests that hold KV pages (resident), and those that wait for any (waiting)",
        _EVERYTHING,
        (_values("state", ("resident", "waiting"), ""),),
    ),
    Metric(
        "jenga_admitted_requests_total",
        "counter",
        "requests",
        "Requests admitted, again after each preemption",
        _REPLICAS,
    ),
    Metric(
        "jenga_admission_refusals_total",
        "counter",
        "refusals",
        "Requests that had to wait for memory (once per wait), by the group that asked for most of the large pages",
        _EVERYTHING,
        (GROUP,),
    ),
    Metric(
        "jenga_preemptions_total",
        "counter",
        "preemptions",
        "Times that a running request could not grow, for which vLLM preempts one, by the group that asked for most "
        "of the large pages",
        _EVERYTHING,
        (GROUP,),
    ),
    # -- prefix cache ---------------------------------------------------------------------------------------
    Metric(
        "jenga_lookup_tokens_total",
        "counter",
        "tokens",
        "Tokens of admitted requests that were looked up in the prefix cache",
        _REPLICAS,
    ),
    Metric("jenga_hit_requests_total", "counter", "requests", "Admitted requests that skipped a prefix", _REPLICAS),
    Metric(
        "jenga_hit_tokens_total",
        "counter",
        "tokens",
        "Tokens skipped through prefix hits; divided by jenga_lookup_tokens_total: the hit rate",
        _REPLICAS,
    ),
    Metric(
        "jenga_group_hit_tokens_total",
        "counter",
        "tokens",
        "Tokens whose cached contents hits took over in this group: of a window its last pages, of a state one page",
        "over replicas; between groups they are the same tokens",
        (GROUP,),
    ),
    Metric(
        "jenga_reused_pages_total",
        "counter",
        "pages",
        "Cached pages taken over by hits",
        "over replicas; pages of unlike groups have unlike sizes",
        (GROUP,),
    ),
    Metric(
        "jenga_hits_ended_total",
        "counter",
        "hits",
        "Hits that this group ended although another could have gone on",
        _EVERYTHING,
        (GROUP,),
    ),
    Metric(
        "jenga_missed_shared_tokens_total",
        "counter",
        "tokens",
        "Tokens beyond a hit that one group had cached and another could not resume",
        _REPLICAS,
    ),
    Metric(
        "jenga_evicted_pages_total",
        "counter",
        "pages",
        "Cached small pages that lost their contents, by cause",
        "over cause and replicas; pages of unlike groups have unlike sizes",
        (
            GROUP,
            _values(
                "cause",
                EVICTION_CAUSES,
                "large_page: with their whole large page; beside_live: for a page beside live ones; own_oldest: the "
                "oldest of the group's own; forgotten: dropped on request (a reset, a superseded end of an answer); "
                "unreachable: freed, since a page before them was evicted and no hit could get to them",
            ),
        ),
    ),
    Metric(
        "jenga_evicted_large_pages_total",
        "counter",
        "pages",
        "Evictable large pages emptied for another use",
        "over replicas of one model",
    ),
    Metric(
        "jenga_eviction_age_seconds",
        "histogram",
        "seconds",
        "Age at eviction: since what was evicted (one small page, or a large page with all of its) was last in use",
        _EVERYTHING,
        (GROUP,),
        buckets=EVICTION_BUCKETS,
    ),
    Metric(
        "jenga_whole_page_grants_total",
        "counter",
        "grants",
        "Large pages granted whole to one request",
        _REPLICAS,
    ),
    Metric(
        "jenga_kept_checkpoints",
        "gauge",
        "checkpoints",
        "Recurrent states that a hit can resume now (groups of recurrent states only)",
        _REPLICAS,
        (GROUP,),
    ),
    Metric(
        "jenga_checkpoints_made_total",
        "counter",
        "checkpoints",
        "Recurrent states kept for later requests (groups of recurrent states only)",
        _REPLICAS,
        (GROUP,),
    ),
    Metric(
        "jenga_checkpoints_dropped_total",
        "counter",
        "checkpoints",
        "Those that are lost again; made less dropped are the kept ones",
        "over cause and replicas",
        (
            GROUP,
            _values(
                "cause",
                CHECKPOINT_CAUSES,
                "evicted: for other pages; overwritten: by their own request, for want of memory; replaced: by a later "
                "end of the same answer; reset: of the prefix cache; unreachable: a page of attention before them was "
                "evicted",
            ),
        ),
    ),
    # -- router ---------------------------------------------------------------------------------------------
    Metric(
        "jenga_router_predictions_total",
        "counter",
        "predictions",
        "Requests by outcome of the router's prediction of their cached tokens",
        _EVERYTHING,
        (_values("outcome", OUTCOMES, "predicted against actual"),),
        "replica",
    ),
    Metric(
        "jenga_router_predicted_tokens_total",
        "counter",
        "tokens",
        "Cached tokens that routers expected of this replica's requests",
        _REPLICAS,
        (),
        "replica",
    ),
    Metric(
        "jenga_router_actual_tokens_total",
        "counter",
        "tokens",
        "Cached tokens that the same requests then had",
        _REPLICAS,
        (),
        "replica",
    ),
    Metric(
        "jenga_router_prediction_error_tokens",
        "histogram",
        "tokens",
        "Predicted less actual cached tokens of a request, without its sign (0: under)",
        _EVERYTHING,
        (_values("sign", ("over", "under"), "predicted too much, or not"),),
        "replica",
        (0.5, 16, 64, 256, 1024, 4096, 16384, 65536),
    ),
    Metric(
        "jenga_router_decision_seconds",
        "histogram",
        "seconds",
        "Time to place one request by what is cached, hashing included",
        "over routers",
        (),
        "router",
        (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
    ),
    Metric(
        "jenga_router_fallbacks_total",
        "counter",
        "fallbacks",
        "Requests placed by load alone",
        _EVERYTHING,
        (_values("reason", FALLBACKS, "why"),),
        "router",
    ),
    Metric(
        "jenga_router_index_blocks",
        "gauge",
        "blocks",
        "Distinct blocks that the index knows",
        "nothing: every router has an index of its own, of the same blocks",
        (),
        "router",
    ),
    Metric(
        "jenga_router_replicas",
        "gauge",
        "replicas",
        "Engine replicas by state of their event stream",
        "over stream; every router counts the same replicas",
        (_values("stream", ("in_order", "uncertain"), "uncertain: counts as empty until a replay or snapshot came"),),
        "router",
    ),
    Metric(
        "jenga_router_stream_repairs_total",
        "counter",
        "repairs",
        "Event streams: gaps found, replays and snapshots asked for, engine restarts seen",
        "over routers; not over kind",
        (_values("kind", REPAIRS, "what became of a stream"),),
        "router",
    ),
    Metric(
        "jenga_router_event_lag_seconds",
        "gauge",
        "seconds",
        "Longest time, since the last report, from an engine's sending of a batch of events to its place in the index "
        "(by two clocks, if on two nodes)",
        "nothing: take the maximum",
        (),
        "router",
    ),
)

REGISTRY: dict[str, Metric] = {metric.name: metric for metric in METRICS}
"""The table by name."""


@dataclass(frozen=True)
class Foreign:
    """A metric of vLLM's own that belongs to the picture and is not rebuilt here."""

    name: str
    kind: Kind
    unit: str
    meaning: str


VLLM_METRICS: tuple[Foreign, ...] = (
    Foreign("vllm:time_to_first_token_seconds", "histogram", "seconds", "From arrival to the first token"),
    Foreign("vllm:inter_token_latency_seconds", "histogram", "seconds", "Between two tokens of a request"),
    Foreign("vllm:request_time_per_output_token_seconds", "histogram", "seconds", "Mean of a request's output tokens"),
    Foreign("vllm:e2e_request_latency_seconds", "histogram", "seconds", "From arrival to the last token"),
    Foreign("vllm:request_queue_time_seconds", "histogram", "seconds", "Waiting for admission"),
    Foreign("vllm:request_prefill_time_seconds", "histogram", "seconds", "Computing the prompt"),
    Foreign("vllm:request_decode_time_seconds", "histogram", "seconds", "Computing the answer"),
    Foreign("vllm:num_requests_running", "gauge", "requests", "Requests in the running batch"),
    Foreign("vllm:num_requests_waiting", "gauge", "requests", "Requests in the queue"),
    Foreign("vllm:kv_cache_usage_perc", "gauge", "ratio", "Share of KV memory in use; with Jenga: of large pages"),
    Foreign("vllm:num_preemptions", "counter", "preemptions", "Requests preempted"),
    Foreign("vllm:prefix_cache_queries", "counter", "tokens", "Tokens looked up in the prefix cache"),
    Foreign("vllm:prefix_cache_hits", "counter", "tokens", "Tokens found there"),
    Foreign("vllm:prompt_tokens", "counter", "tokens", "Prompt tokens computed"),
    Foreign("vllm:generation_tokens", "counter", "tokens", "Tokens generated"),
    Foreign("vllm:request_success", "counter", "requests", "Requests finished, by reason (label finished_reason)"),
)
"""Requests' latencies and counts; a test compares names and kinds with vLLM's."""
