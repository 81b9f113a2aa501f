"""Every model of the zoo under every strategy, on short chat and on Mooncake's conversations, with memory short.

python benchmarks/zoo.py --trace mooncake_conversation.jsonl [--models a,b] [--strategies a,b] [--jobs 2] [--update]

Each model gets the memory in which exact bytes would hold `--resident` Mooncake requests (short chat: at most 400
requests, or as many as those with images).  Prints the tables, every target that is missed, and the report
vLLM #54458; writes all results to --json.

The rules of caching are Jenga's for all strategies (prompt ends and shared prefixes are kept): only geometry and
allocation differ, so `vllm` stands better than the engine of that name, which keeps other states and windows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jenga.bound import RequestSize, residency_bound
from jenga.layers import LayerType
from jenga.models import known_models, load_model
from jenga.simulate import (
    Limits,
    StepCost,
    dense_bytes_per_token,
    exact_plan,
    hit_bound,
    plan_for,
    simulate,
)
from jenga.strategies import STRATEGIES, PlanError, make_plan
from jenga.traces import TraceRequest, arrivals, chat, read_mooncake

CONTROL = "llama-3.1-8b"
CHAT_RESIDENT = 400

PARAMETERS: dict[str, tuple[float, float]] = {
    "character-70b": (70, 70),
    "falcon-h1-34b": (34, 34),
    "gemma-2-27b": (27, 27),
    "gemma-2-27b-2b": (29, 29),
    "gemma-3-1b": (1, 1),
    "gemma-3-27b": (27, 27),
    "glm-5.3-flash": (30, 3),
    "gpt-oss-120b": (117, 5.1),
    "granite-4-small": (32, 9),
    "jamba-1.5-mini": (52, 12),
    "kimi-linear-48b": (48, 3),
    "llama-3.1-8b": (8, 8),
    "llama-3.1-8b-pyramidkv": (8, 8),
    "llama-3.2-11b-vision": (11, 11),
    "llama-4-scout": (109, 17),
    "mimo-v2-flash": (309, 15),
    "ministral-8b": (8, 8),
    "nemotron-h-8b": (8, 8),
    "qwen3-next-80b": (80, 3),
}
"""Billions of parameters: all, and those active for one token (rounded; they only set the time of a step)."""

PAPER_GAINS: dict[str, tuple[float, float, float | None]] = {
    "llama-3.2-11b-vision": (2.67 / 1.56, 2.67 / 1.75, 2.67 / 1.60),
    "gemma-3-27b": (0.25 / 0.18, 0.25 / 0.19, 0.25 / 0.20),
    "ministral-8b": (0.304 / 0.202, 0.304 / 0.198, None),
    "llama-4-scout": (1.16 / 0.67, 1.16 / 0.76, 1.16 / 0.81),
    "jamba-1.5-mini": (10.38 / 7.47, 10.38 / 9.52, 10.38 / 7.47),
    "character-70b": (1.95 / 1.2, 1.95 / 1.3, 1.95 / 1.73),
    "llama-3.1-8b-pyramidkv": (0.21 / 0.14, 0.21 / 0.21, 0.21 / 0.14),
    "llama-3.1-8b": (9.21 / 9.23, 9.21 / 9.24, 9.21 / 9.23),
}
"""JENGA, SOSP'25, H100: requests per second over PagedAttention, MAX and static."""


LEFT_OUT = ("samples", "model", "strategy", "memory_bytes", "requests", "prompt_tokens", "output_tokens")
"""Of a result: too much, or the same for all strategies of a case."""


@dataclass(frozen=True)
class Case:
    """One model on one trace."""

    model: str
    trace: str
    strategies: tuple[str, ...]
    resident: int
    requests: int
    mooncake: Path | None
    growth_pages: int = 0


def sizes(trace: Iterable[TraceRequest]) -> list[RequestSize]:
    """Lengths half way through the answers."""
    return [RequestSize(r.prompt_tokens + r.output_tokens // 2, r.image_tokens) for r in trace]


def mean_bytes(types: Sequence[LayerType], trace: Iterable[TraceRequest]) -> float:
    """Bytes of a request of the trace, spent exactly."""
    return residency_bound(types, sizes(trace), 1).mean_bytes


def run_case(case: Case) -> dict[str, Any]:
    """Simulate one case under all its strategies."""
    spec = load_model(case.model)
    types = spec.layer_types()
    short = list(chat(2000, image_tokens=spec.image_tokens))
    long = list(read_mooncake(case.mooncake, 2000)) if case.mooncake else short
    memory = int(case.resident * mean_bytes(types, long))
    if case.trace == "chat":
        # A prompt with an image fills most of a step, so few requests decode at once.
        most = case.resident if spec.image_tokens else CHAT_RESIDENT
        memory = min(memory, int(most * mean_bytes(types, short)))
        bound = memory / mean_bytes(types, short)
        served = list(chat(max(1000, int(6 * bound)), image_tokens=spec.image_tokens))
    else:
        served = list(islice(long, case.requests))
    served = list(arrivals(served, None))
    billions, active = PARAMETERS.get(case.model, (8.0, 8.0))
    cost = StepCost(weight_bytes=2e9 * billions / spec.tp, active_parameters=1e9 * active / spec.tp)
    results: dict[str, Any] = {}
    for strategy in (*case.strategies, "exact"):
        start = time.perf_counter()
        try:
            plan = (
                exact_plan(spec.name, types, memory)
                if strategy == "exact"
                else plan_for(strategy, spec.name, types, memory, served)
            )
        except PlanError as error:
            results[strategy] = {"error": str(error)}
            continue
        limits = Limits(sequences=4096, growth_pages=case.growth_pages)
        result = simulate(plan, types, served, cost=cost, limits=limits)
        kept = {name: value for name, value in result.to_dict().items() if name not in LEFT_OUT}
        kept["wall_s"] = time.perf_counter() - start
        kept["ratios"] = list(plan.layout.ratios)
        kept["large_page_bytes"] = plan.large_page_bytes
        results[strategy] = kept
    clairvoyant = hit_bound(served, dense_bytes_per_token(types), memory)
    return {
        "model": case.model,
        "trace": case.trace,
        "memory_bytes": memory,
        "bound_requests": residency_bound(types, sizes(served), memory).requests,
        "clairvoyant_hits": clairvoyant.limited,
        "unlimited_hits": clairvoyant.unlimited,
        "requests": len(served),
        "prompt_tokens": sum(r.prompt_tokens for r in served),
        "output_tokens": sum(r.output_tokens for r in served),
        "results": results,
    }


def misses(case: dict[str, Any]) -> list[str]:
    """Targets that `jenga` misses in a case."""
    results = {name: r for name, r in case["results"].items() if "error" not in r}
    jenga, exact, vllm = results["jenga"], results["exact"], results.get("vllm")
    found = []
    if jenga["waste"] > 0.02:
        causes = ", ".join(f"{c} {jenga['steady'][c]:.2%}" for c in ("padding", "stranded", "droppable", "reserved"))
        found.append(f"waste {jenga['waste']:.2%} of the buffer, target 2 % ({causes}; exact {exact['waste']:.2%})")
    if jenga["resident_mean"] < 0.97 * exact["resident_mean"]:
        idle = jenga["steady"]["cached"] - exact["steady"]["cached"]
        found.append(
            f"resident {jenga['resident_mean'] / exact['resident_mean']:.1%} of the bound, target 97 % (cached pages "
            f"beside live ones, which other layer types cannot take: {idle:.1%} of the buffer)"
        )
    # 0.05 % of the buffer is less than one large page.
    less = [n for n in results if n not in ("jenga", "exact") and jenga["waste"] > results[n]["waste"] + 0.0005]
    if less:
        others = ", ".join(f"{n} {results[n]['waste']:.2%}" for n in less)
        found.append(f"waste {jenga['waste']:.2%}, more than {others} (null page {jenga['steady']['reserved']:.2%})")
    if vllm is not None:
        if jenga["resident_mean"] < vllm["resident_mean"] * 0.995:
            found.append(f"resident {jenga['resident_mean']:.1f}, vllm has {vllm['resident_mean']:.1f}")
        if jenga["hit_tokens"] < vllm["hit_tokens"]:
            found.append(f"hit tokens {jenga['hit_tokens']:,}, vllm has {vllm['hit_tokens']:,}")
        if case["model"] == CONTROL and abs(jenga["requests_per_s"] / vllm["requests_per_s"] - 1) > 0.005:
            found.append(f"control: {jenga['requests_per_s']:.3f} requests/s, vllm {vllm['requests_per_s']:.3f}")
    return found


def report_54458(console: Console) -> None:
    """vLLM #54458: a prompt of 12 tokens takes 32.9 % of a pool of 70 blocks."""
    model = load_model("glm-5.3-flash")
    types = model.layer_types()
    memory = 71 * make_plan("vllm", model.name, types, 80 << 30).large_page_bytes  # the null block included
    shown = table(
        f"vLLM #54458: {model.name}, {memory / 2**30:.2f} GiB, prompts of 12 tokens",
        ("strategy", "first takes", "mean", "that fit", "tokens per block", "prefix hits from"),
    )
    for strategy in ("vllm", "jenga"):
        plan = make_plan(strategy, model.name, types, memory)
        pool = plan.pool()
        pages = plan.pages(12)
        shares = [0.0]
        total = pool.available
        while pool.fits(pages):
            pool.expect(pages)
            for group, count in enumerate(pages):
                pool.allocate(group, count)
            shares.append(1 - pool.available / total)
        blocks = sorted({p.group.page_tokens for p in plan.groups if p.group.policy.kind == "mla"})
        shown.add_row(
            strategy,
            f"{shares[1]:.1%} of the pool",
            f"{shares[-1] / (len(shares) - 1):.1%}",
            str(len(shares) - 1),
            ", ".join(map(str, blocks)),
            f"{plan.hit_tokens} tokens",
        )
    console.print(shown)


def table(title: str, names: Sequence[str]) -> Table:
    """A plain table whose first column is text."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        made.add_column(name, justify="right" if i else "left", no_wrap=True)
    return made


def report(console: Console, cases: Sequence[dict[str, Any]], strategies: Sequence[str]) -> None:
    """Print all tables."""

    def each(case: dict[str, Any], show: Any) -> list[str]:
        return ["no plan" if "error" in case["results"][s] else show(case["results"][s]) for s in strategies]

    for trace in dict.fromkeys(c["trace"] for c in cases):
        chosen = [c for c in cases if c["trace"] == trace]
        residency = table(
            f"{trace}: requests resident, % of the bound", ("model", "memory", "bound", *strategies, "bound/vllm")
        )
        waste = table(f"{trace}: waste other than page tails, % of the buffer", ("model", *strategies, "jenga's tails"))
        hits = table(
            f"{trace}: hit tokens, thousands", ("model", "steps: vllm", "jenga", *strategies, "exact", "clairvoyant")
        )
        gains = table(
            f"{trace}: requests/s of jenga over others [JENGA paper, H100]",
            ("model", "paged", "[paper]", "max", "[paper]", "static", "[paper]", "vllm"),
        )
        for case in chosen:
            results = case["results"]
            exact = results["exact"]
            vllm = results.get("vllm", {})
            residency.add_row(
                case["model"],
                f"{case['memory_bytes'] / 2**30:.1f} GiB",
                f"{exact['resident_mean']:.1f}",
                *each(case, lambda r, e=exact: f"{100 * r['resident_mean'] / e['resident_mean']:.1f}"),
                f"{exact['resident_mean'] / vllm['resident_mean']:.2f}" if "resident_mean" in vllm else "-",
            )
            waste.add_row(
                case["model"],
                *each(case, lambda r: f"{100 * r['waste']:.2f}"),
                f"{100 * results['jenga']['steady']['tail']:.2f}",
            )
            hits.add_row(
                case["model"],
                str(vllm.get("hit_granularity", "-")),
                str(results["jenga"]["hit_granularity"]),
                *each(case, lambda r: f"{r['hit_tokens'] / 1000:,.0f}"),
                f"{exact['hit_tokens'] / 1000:,.0f}",
                f"{case['clairvoyant_hits'] / 1000:,.0f}",
            )
            row = [case["model"]]
            paper = PAPER_GAINS.get(case["model"], (None, None, None))
            for other, printed in zip(("paged", "max", "static", "vllm"), (*paper, None), strict=True):
                theirs = results.get(other, {}).get("requests_per_s")
                row.append(f"{results['jenga']['requests_per_s'] / theirs:.2f}" if theirs else "-")
                if other != "vllm":
                    row.append(f"[{printed:.2f}]" if printed else "")
            gains.add_row(*row)
        for made in (residency, waste, hits, gains) if trace != "chat" else (residency, waste, gains):
            console.print(made)
    console.print("Targets missed by jenga:")
    for case in cases:
        for miss in misses(case):
            console.print(f"  {case['model']}, {case['trace']}: {miss}", soft_wrap=True, highlight=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="Mooncake's conversation trace; without it only short chat is run")
    parser.add_argument("--models", default=",".join(known_models()), help="'' simulates nothing, to show --json again")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--resident", type=int, default=24, help="Mooncake requests that exact bytes would hold")
    parser.add_argument("--requests", type=int, default=250, help="Mooncake requests served")
    parser.add_argument("--growth-pages", type=int, default=0, help="pages left at admission for each running request")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--update", action="store_true", help="keep what --json has of other models and strategies")
    parser.add_argument("--markdown", type=Path, help="write the short tables here")
    parser.add_argument("--json", type=Path, default=Path("results/zoo.json"))
    options = parser.parse_args()
    strategies = tuple(options.strategies.split(","))
    cases = [
        Case(model, trace, strategies, options.resident, options.requests, options.trace, options.growth_pages)
        for trace in (("chat", "mooncake") if options.trace else ("chat",))
        for model in filter(None, options.models.split(","))
    ]
    console = Console(width=150)
    known = {(c["model"], c["trace"]): c for c in json.loads(options.json.read_text())} if options.update else {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        done = pool.imap_unordered(run_case, cases)
        for case in track(done, total=len(cases), description="simulating", console=console):
            before = known.get((case["model"], case["trace"]))
            if before is not None and before["memory_bytes"] == case["memory_bytes"]:
                case["results"] = before["results"] | case["results"]
            known[case["model"], case["trace"]] = case
            seconds = sum(r.get("wall_s", 0.0) for r in case["results"].values())
            console.print(f"{case['model']}, {case['trace']}: {seconds:.0f} s, {len(misses(case))} targets missed")
    ordered = sorted(known.values(), key=lambda c: (c["trace"], c["model"]))
    shown = [s for s in STRATEGIES if all(s in c["results"] for c in ordered)]
    report(console, ordered, shown)
    report_54458(console)
    if options.markdown is not None:
        options.markdown.write_text(markdown(ordered))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(rounded(case), separators=(",", ":")) for case in ordered)
    options.json.write_text(f"[\n{lines}\n]\n")
    console.print(f"wrote {options.json}")


TRACES = {"chat": "Short chat", "mooncake": "Mooncake's conversations"}

MARKDOWN_HEAD = """# The zoo: 19 models under six strategies

Written by `python benchmarks/zoo.py --trace FILE --markdown docs/zoo.md`, which also writes all figures to
`results/zoo.json`. Simulated with the real allocators, policies and prefix cache; only the time of a step is modelled
(a roofline). Every model gets the memory in which exact bytes would hold 24 of Mooncake's requests (short chat: at
most 400), and all requests wait from the start, so memory is short. *Bound*: a pool counted in bytes, where any free
byte can become any page (it evicts by age alone, so a better order can pass it by a little). *Resident*: mean number
of requests that hold memory while others wait, in % of the bound. *Waste*: padding, stranded slots, droppable and
reserved pages, in % of the buffer; page tails apart. *Hits*: thousands of prompt tokens found cached. *Clairvoyant*:
no cache of this memory can have more, whatever it knows (running requests take no memory from it, so it is generous).

All strategies keep what Jenga keeps (windows and states at the ends of prompts and of shared prefixes), so `vllm`
stands better here than the engine of that name, whose checkpoints and windows are others. `jenga` alone frees what no
hit can reach (`jenga.reach`); such pages beside live ones count as stranded, where the others count them as cached.
A pause for a state's sake is taken to cost 256 tokens (the plugin's default on a GPU is 2,048: it keeps fewer states).

States are in float32; vLLM keeps Mamba-2's and GDN's in the model's type unless told otherwise (`jenga simulate
--state-dtype bfloat16`): on short chat Jenga then holds 1.50 times as many requests as vLLM's plan on Falcon-H1-34B,
1.28 on Kimi-Linear-48B, 1.11 on Qwen3-Next-80B, 1.05 on Nemotron-H-8B, 1.03 on Granite-4-small.
"""


MARKDOWN_CAUSES = """Causes:

- *Cached pages beside live ones.* A large page with one live page cannot change hands, whatever else in it is only
  cached. With large pages of a hundred attention pages beside one state each, that is memory that no new state can
  have. The price falls with the ratio (`jenga.grouping` cuts states for that) and with the order in which slots are
  filled (`jenga.allocator`).
- *Waste above others.* Most of it is stranded: places beside live pages, freed because no hit could reach what they
  held, which other strategies count as cached. Their own group takes them first. `gcd` wastes nothing by these causes:
  it loses free memory to fragments instead, which shows in residency and hits. `paged` and `static` give states a fixed
  region, which is full while memory is short. `jenga` pays one large page as null page, and the padding that keeps
  ratios small.
- *Hits below vllm.* Cached pages of unlike age share a large page and are evicted together. With PyramidKV, `vllm` and
  `paged` keep all tokens, so they can be hit; what a budget has dropped cannot, under any memory manager.
- *Gains smaller than the paper's.* The paper compares throughput on its own engine, with images and shorter answers;
  here all strategies have chunked prefill, one step-cost model and Jenga's caching rules.
"""


def markdown(cases: Sequence[dict[str, Any]]) -> str:
    """The short form of the tables, for the documentation."""
    lines = [MARKDOWN_HEAD]

    def add(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        lines.extend([f"## {title}", "", f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"])
        lines.extend(f"| {' | '.join(row)} |" for row in rows)
        lines.append("")

    def resident(case: dict[str, Any], strategy: str) -> str:
        result, exact = case["results"][strategy], case["results"]["exact"]
        return "-" if "error" in result else f"{100 * result['resident_mean'] / exact['resident_mean']:.1f}"

    def waste(case: dict[str, Any], strategy: str) -> str:
        result = case["results"][strategy]
        return "-" if "error" in result else f"{100 * result['waste']:.2f}"

    others = ("paged", "max", "gcd", "static", "vllm", "jenga")
    for trace, title in TRACES.items():
        chosen = [c for c in cases if c["trace"] == trace]
        if not chosen:
            continue
        names = ("model", "GiB", "bound", *others, "waste: vllm", "jenga", "its tails")
        add(
            f"{title}: requests resident, and waste",
            names,
            (
                (
                    c["model"],
                    f"{c['memory_bytes'] / 2**30:.1f}",
                    f"{c['results']['exact']['resident_mean']:.1f}",
                    *(resident(c, s) for s in others),
                    waste(c, "vllm"),
                    waste(c, "jenga"),
                    f"{100 * c['results']['jenga']['steady']['tail']:.2f}",
                )
                for c in chosen
            ),
        )
    long = [c for c in cases if c["trace"] == "mooncake"]

    def hits(case: dict[str, Any], strategy: str) -> str:
        return f"{case['results'][strategy].get('hit_tokens', 0) / 1000:.0f}"

    add(
        "Mooncake's conversations: prefix hits",
        ("model", "hits are multiples of: vllm", "jenga", "thousand tokens: vllm", "jenga", "exact", "clairvoyant"),
        (
            (
                c["model"],
                *(str(c["results"][s].get("hit_granularity", "-")) for s in ("vllm", "jenga")),
                *(hits(c, s) for s in ("vllm", "jenga", "exact")),
                f"{c['clairvoyant_hits'] / 1000:.0f}",
            )
            for c in long
        ),
    )

    def gain(case: dict[str, Any], other: str) -> str:
        theirs = case["results"].get(other, {}).get("requests_per_s")
        return f"{case['results']['jenga']['requests_per_s'] / theirs:.2f}" if theirs else "-"

    add(
        "Mooncake's conversations: requests per second of jenga over others (in brackets: the JENGA paper on an H100)",
        ("model", "paged", "max", "static", "vllm"),
        (
            (
                c["model"],
                *(
                    gain(c, other) + (f" [{printed:.2f}]" if printed else "")
                    for other, printed in zip(("paged", "max", "static"), PAPER_GAINS[c["model"]], strict=True)
                ),
                gain(c, "vllm"),
            )
            for c in long
            if c["model"] in PAPER_GAINS
        ),
    )
    lines.append("## Targets that jenga misses\n")
    missed = [f"- {c['model']}, {c['trace']}: {m}" for c in cases for m in misses(c)]
    lines.extend([*missed, "", MARKDOWN_CAUSES.rstrip()] if missed else ["None."])
    return "\n".join(lines) + "\n"


def rounded(value: Any) -> Any:
    """Floats with six significant digits, which is all that a simulation has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
