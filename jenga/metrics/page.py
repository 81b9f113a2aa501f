"""docs/metrics.md, made from the definitions."""

from __future__ import annotations

from collections.abc import Iterator

from jenga.metrics.definitions import METRICS, VLLM_METRICS, Label, Metric, Source
from jenga.metrics.engine import PERIOD

TITLES: dict[Source, str] = {
    "engine": "Of an engine",
    "replica": "Of a replica: what routers expected of it",
    "router": "Of a router",
}

_INTRO = f"""# Metrics

This page is written by `jenga metrics --markdown > docs/metrics.md` from `jenga/metrics/definitions.py`, from which all
exporters are made too; a test compares them. `jenga metrics` prints the tables.

| | through Ray (`jenga serve`, a cluster) | stand-alone (`vllm serve`) |
|---|---|---|
| where | every node's metrics agent; `jenga serve`: `http://127.0.0.1:8080/metrics` | `/metrics` of the server |
| names | `ray_` in front: `ray_jenga_memory_bytes` | as below |
| more labels | `deployment`, `replica`, `application`; but for routers `model_name` | `model_name`, `engine` |
| vLLM's own | `ray_vllm_...`, labels `model_name`, `ReplicaId` | `vllm:...` |
| router's | of each process that routes (the ingress replicas) | none |

An engine's values are one report, which its core writes between two steps when it is asked, every {PERIOD:g} seconds:
they fit together. Ray's own reporting period (10 s, `RAY_metrics_report_interval_ms`) comes on top. Counters begin at 0
with the first report; of a histogram Ray exports nothing before the first value, and its `_sum` is from the middles of
buckets (counts are exact).

**Dead replicas.** Ray keeps exporting the counters of a process that has died, until its node's agent ends; gauges that
nobody sets any more it drops after two of its reporting periods. `rate` and `increase` of a dead counter are 0, so use
them, or keep to those who live by joining with a gauge:

    sum by (deployment) (ray_jenga_hit_tokens_total and on (replica) ray_jenga_buffer_bytes)

A replica that lives but whose report is old is found by `time() - ray_jenga_report_timestamp_seconds`.

**Sums.** The last column says over which labels values add up. Bytes always do; pages of unlike groups have unlike
sizes and do not; a ratio never does: divide sums.

**Labels are bounded.** A label has the values listed below, or is `group`: the layer groups of the model, at most 64.
An exporter refuses any other value, and says so once in its log.
"""

_STOCK = """## What stock vLLM would waste

`jenga_stock_held_bytes`: at start vLLM's own planner is asked for its groups and blocks for the same layers; a report
adds up the blocks that the present requests would hold there (lengths in steps of 16 tokens; a prefix that requests
share counts once). Beside `jenga_stock_wasted_bytes` stands our own waste, the causes `tail`, `droppable`, `padding`
and `stranded`:

    sum by (replica) (ray_jenga_memory_bytes{state=~"tail|droppable|padding|stranded"})

Neither counts what is cached. The number of requests is what *we* admitted: vLLM may not have had room for them.
"""

_VLLM = """## From vLLM

Latencies and counts of requests are vLLM's own metrics; nothing of it is rebuilt.
"""

_COST = """## Cost

`python benchmarks/metrics.py` measures what reports and counters cost the engine's core, as a share of the scheduler's
processor time. Three models, 16 to 512 running requests, on 4 cores shared with much other work: a report took 151 to
1,357 µs, and the share was 0.05 % to 0.27 % with forward passes of 10 ms, 0.16 % to 0.76 % with 50 ms (fewer steps for
the same reports). The highest shares are those of 16 requests; the target is 1 %.
"""


def markdown() -> str:
    """The page."""
    parts = [_INTRO]
    for source, title in TITLES.items():
        metrics = [m for m in METRICS if m.source == source]
        parts.append(f"## {title}\n\n" + "\n".join(_rows(metrics)) + "\n")
        closed = list(_label_rows(metrics))
        if closed:
            parts.append("| label of | value | |\n|---|---|---|\n" + "\n".join(closed) + "\n")
    vllm = "\n".join(f"| `{m.name}` | {m.kind} | {m.unit} | {m.meaning} |" for m in VLLM_METRICS)
    parts.append(f"{_VLLM}\n| metric | kind | unit | meaning |\n|---|---|---|---|\n{vllm}\n")
    return "\n".join([*parts, _STOCK, _COST])


def _rows(metrics: list[Metric]) -> Iterator[str]:
    yield "| metric | kind | unit | labels | meaning | may be summed |"
    yield "|---|---|---|---|---|---|"
    for m in metrics:
        labels = ", ".join(f"`{name}`" for name in m.label_names)
        yield f"| `{m.name}` | {m.kind} | {m.unit} | {labels} | {m.meaning} | {m.sums} |"


def _label_rows(metrics: list[Metric]) -> Iterator[str]:
    for m in metrics:
        for label in m.labels:
            if label.values:
                yield f"| `{m.name}` | `{label.name}`: {_values(label)} | {label.meaning} |"


def _values(label: Label) -> str:
    return ", ".join(f"`{value}`" for value in label.values)
