"""Dashboard "Prefix cache and routing": what hits, what ends hits, and whether the router foretells it."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from dashboards import expressions as e
from dashboards.panels import Line, Text, heat, number, page, series
from dashboards.source import Source

UID = "jenga-cache"


def dashboard(s: Source) -> Dashboard:
    """Build it for one kind of source; routers exist under Ray Serve only."""
    replica = f"{{{{{s.replica}}}}}"
    board = page("Jenga: Prefix cache and routing", UID, "Hits, what ends them, and the router's predictions.", s)
    board = board.with_panel(
        number(
            Text(
                "Hit rate",
                "percentunit",
                "Share of the prompts' tokens that a cached prefix spared.",
                "See which replica and which group; a change of prompts (a date at their beginning) does it too.",
            ),
            e.hit_ratio(s),
            width=6 if s.ray else 12,
        )
    )
    board = board.with_panel(
        number(
            Text(
                "Missed though shared",
                "percentunit",
                "Share of the tokens looked up that one layer group had cached while another could not resume there.",
                "The group that ends hits (below) drops its windows or states too soon; see docs/checkpoints.md.",
            ),
            e.share(s.ours("jenga_missed_shared_tokens_total"), s.ours("jenga_lookup_tokens_total"), (), e.RATE),
            bad_above=0.3,
            width=6 if s.ray else 12,
        )
    )
    if s.ray:
        board = board.with_panel(
            number(
                Text(
                    "Exact predictions",
                    "percentunit",
                    "Share of requests whose cached tokens the router foretold to the token.",
                    "Below 80 %: look at event streams and lag; with many requests at a time 90 % is usual.",
                ),
                e.exact_ratio(s),
                bad_below=0.8,
            )
        ).with_panel(
            number(
                Text(
                    "Event streams in doubt",
                    "short",
                    "Replicas whose cache some router does not know exactly: they count as empty.",
                    "For more than a minute: the replica's event ports are not reachable from the ingress.",
                ),
                f"max({s.ours('jenga_router_replicas', _stream('uncertain'))})",
                bad_above=1,
            )
        )
    board = board.with_panel(
        series(
            Text(
                "Hit rate by replica",
                "percentunit",
                "Share of each replica's prompt tokens that its cache spared.",
                "One replica far below the others: it is new, its cache was reset, or its event stream is in doubt.",
            ),
            Line(e.hit_ratio(s, s.engine), replica),
            maximum=1,
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Tokens looked up and spared",
                "short",
                "Tokens per second that were looked up, and those that hits spared.",
                "Looked up rises, spared does not: the shared part of the prompts no longer fits the cache.",
            ),
            Line(e.rate(s.ours("jenga_lookup_tokens_total")), "looked up"),
            Line(e.rate(s.ours("jenga_hit_tokens_total")), "spared"),
            Line(e.rate(s.ours("jenga_missed_shared_tokens_total")), "missed though shared"),
        )
    )
    board = board.with_panel(
        series(
            Text(
                "What ended hits",
                "cps",
                "Hits per second that this group ended although another group could have gone on.",
                "A sliding window or a state ends most: its pages go before the others'; see docs/checkpoints.md.",
            ),
            Line(e.rate(s.ours("jenga_hits_ended_total"), ("group",)), "{{group}}"),
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Tokens reused by group",
                "short",
                "Tokens per second whose cached contents hits took over, by group: of a window only its last pages.",
                "A group at zero while others hit: its pages are evicted first; see Evictions (Memory).",
            ),
            Line(e.rate(s.ours("jenga_group_hit_tokens_total"), ("group",)), "{{group}}"),
        )
    )
    return _routing(board, s) if s.ray else board


def _routing(board: Dashboard, s: Source) -> Dashboard:
    board = board.with_row(Row("Routing"))
    board = board.with_panel(
        series(
            Text(
                "Predictions by outcome",
                "reqps",
                "Requests by what became of the router's prediction: exact, over (too much), under (too little).",
                "Over: events come late or evictions race with requests; under: streams in doubt.",
            ),
            Line(e.rate(s.ours("jenga_router_predictions_total"), ("outcome",)), "{{outcome}}"),
            stacked=True,
            colours={"exact": "#0072B2", "over": "#D55E00", "under": "#E69F00"},
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Predicted and actual cached tokens",
                "short",
                "Cached tokens per second that routers expected, and that the same requests then had.",
                "Lines apart: caches forget before the request runs; fewer requests at a time, or more kv_memory.",
            ),
            Line(e.rate(s.ours("jenga_router_predicted_tokens_total")), "predicted"),
            Line(e.rate(s.ours("jenga_router_actual_tokens_total")), "actual"),
        )
    )
    board = board.with_panel(
        heat(
            Text(
                "Error of predictions",
                "reqps",
                "Requests per second by the distance between predicted and actual cached tokens.",
                "Weight in high rows: whole prefixes are lost or unknown; see lag and streams.",
            ),
            Line(e.rate(s.ours("jenga_router_prediction_error_tokens", part="bucket"), ("le",)), "{{le}}"),
            buckets="short",
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Time to place a request",
                "s",
                "Median and 99th percentile of the router's decision, hashing of the prompt included.",
                "Above 10 ms: the ingress lacks CPU, or prompts are very long; add ingress replicas.",
            ),
            *[
                Line(e.quantile(q, s.ours("jenga_router_decision_seconds", part="bucket")), name)
                for q, name in ((0.5, "median"), (0.99, "99 %"))
            ],
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Placed by load alone",
                "reqps",
                "Requests per second that no cache was consulted for, by reason.",
                "no index: engines without the plugin, or streams in doubt; index failed: a fault, see the log.",
            ),
            Line(e.rate(s.ours("jenga_router_fallbacks_total"), ("reason",)), "{{reason}}"),
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Lag of events",
                "s",
                "Longest time from an engine's sending of an event to its place in the index.",
                "Above a second: the ingress is busy, or clocks of two nodes differ.",
            ),
            Line(f"max({s.ours('jenga_router_event_lag_seconds')})", "longest"),
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Event streams",
                "short",
                "Engine replicas by the state of their event stream, as the ingress with the most of them sees it.",
                "In doubt for long: see whether the ports between nodes are open (docs/serving.md).",
            ),
            Line(f"max by (stream) ({s.ours('jenga_router_replicas')})", "{{stream}}"),
        )
    )
    return board.with_panel(
        series(
            Text(
                "Repairs of streams",
                "cps",
                "Gaps found, replays and snapshots asked for, restarts of engines seen.",
                "Steady gaps: the ingress cannot keep up or the network drops; a snapshot after a start is usual.",
            ),
            Line(e.rate(s.ours("jenga_router_stream_repairs_total"), ("kind",)), "{{kind}}"),
        )
    )


def _stream(state: str) -> str:
    return f'stream="{state}"'
