"""Dashboard "Requests": what clients get, from vLLM's own metrics."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards import expressions as e
from dashboards.panels import Line, Text, page, series
from dashboards.source import Source

UID = "jenga-requests"
_QUANTILES = ((0.5, "median"), (0.95, "95 %"), (0.99, "99 %"))


def dashboard(s: Source) -> Dashboard:
    """Build it for one kind of source."""
    replica = f"{{{{{s.vllm_replica}}}}}"
    board = page("Jenga: Requests", UID, "Rates, latencies and preemptions, from vLLM's metrics.", s)

    preempted = e.rate(s.vllm("vllm:num_preemptions"), (s.vllm_replica,))

    def latency(title: str, metric: str, shows: str, if_bad: str) -> Dashboard:
        lines = [Line(e.quantile(q, s.vllm(metric, part="bucket")), name) for q, name in _QUANTILES]
        return board.with_panel(series(Text(title, "s", shows, if_bad), *lines))

    board = board.with_panel(
        series(
            Text(
                "Finished requests",
                "reqps",
                "Requests per second that finished, by reason: stop, length, abort (clients that went away), error.",
                "abort or error rising: latencies above the clients' patience, or a failing engine (its log).",
            ),
            Line(e.rate(s.vllm("vllm:request_success"), ("finished_reason",)), "{{finished_reason}}"),
            stacked=True,
        )
    )
    board = board.with_panel(
        series(
            Text(
                "Requests running and waiting",
                "short",
                "In the batches of all engines, and in their queues.",
                "Waiting grows without end: more load than the replicas can do; add replicas.",
            ),
            Line(e.total(s.vllm("vllm:num_requests_running")), "running"),
            Line(e.total(s.vllm("vllm:num_requests_waiting")), "waiting"),
        )
    )
    board = latency(
        "Time to first token",
        "vllm:time_to_first_token_seconds",
        "From a request's arrival at its engine to its first token.",
        "Long queues (below) or long prompts without hits (Prefix cache and routing).",
    )
    board = latency(
        "Time between tokens",
        "vllm:inter_token_latency_seconds",
        "Between two tokens of one answer.",
        "Batches too large or prefills in between: lower engine.max_num_seqs, or max_num_batched_tokens.",
    )
    board = latency(
        "Time in queue",
        "vllm:request_queue_time_seconds",
        "Waiting for admission by the engine's scheduler.",
        "KV memory is full (Memory: refusals), or max_num_seqs is reached: more replicas.",
    )
    board = latency(
        "Whole request",
        "vllm:e2e_request_latency_seconds",
        "From arrival to the last token.",
        "Compare with the panels above: queue, first token, or many tokens to generate.",
    )
    board = board.with_panel(
        series(
            Text(
                "Tokens",
                "short",
                "Prompt tokens and generated tokens per second, over all engines.",
                "Generated tokens fall while requests wait: engines spend their time on prompts or on preempted work.",
            ),
            Line(e.rate(s.vllm("vllm:prompt_tokens")), "prompt"),
            Line(e.rate(s.vllm("vllm:generation_tokens")), "generated"),
        )
    )
    return board.with_panel(
        series(
            Text(
                "Preemptions",
                "cps",
                "Running requests per second that lost their memory to others and start again, by replica.",
                "More than a few per minute: lower engine.max_num_seqs, or raise kv_memory.",
            ),
            # vLLM's counter through Ray does not exist before the first preemption.
            Line(f"{preempted} or 0 * {e.total(s.vllm('vllm:num_requests_running'), (s.vllm_replica,))}", replica),
        )
    )
