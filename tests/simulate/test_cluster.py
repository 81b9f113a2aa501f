"""The simulated cluster and its routers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jenga.hits import Hit
from jenga.layers import LayerType
from jenga.policies import FullAttention, RecurrentState, SlidingWindow
from jenga.simulate import ROUTERS, ClusterResult, Simulation, UnknownRouterError, plan_for, simulate_cluster
from jenga.simulate.cli import add_commands
from jenga.simulate.routers import ByCost, PrefixText, Replica
from jenga.traces import TraceError, TraceRequest, agents, arrivals, scaled, whole_blocks

FULL = LayerType("full", FullAttention(), layers=4, cell_bytes=256)
WINDOW = LayerType("window", SlidingWindow(128), layers=12, cell_bytes=256)
STATE = LayerType("state", RecurrentState(), layers=12, state_bytes=20_000, block_tokens=1)
HYBRID = [STATE, WINDOW, FULL]
MEMORY = 48 << 20


def conversations(requests: int = 120) -> list[TraceRequest]:
    return list(arrivals(agents(requests, seed=3, concurrent=24), 3.0, seed=1))


def run(router: str, trace: Sequence[TraceRequest], replicas: int = 4, seed: int = 0) -> ClusterResult:
    plan = plan_for("jenga", "model", HYBRID, MEMORY, trace)
    return simulate_cluster(plan, HYBRID, trace, replicas=replicas, router=router, seed=seed)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_is_served_once_and_tokens_add_up(router: str) -> None:
    trace = conversations()
    done: list[int] = []
    plan = plan_for("jenga", "model", HYBRID, MEMORY, trace)
    result = simulate_cluster(plan, HYBRID, trace, replicas=4, router=router, progress=done.append)
    assert done == list(range(1, len(trace) + 1))
    assert (result.requests, result.rejected) == (len(trace), 0)
    assert result.prompt_tokens == sum(r.prompt_tokens for r in trace)
    assert result.output_tokens == sum(r.output_tokens for r in trace)
    assert result.hit_tokens + result.computed_prompt_tokens == result.prompt_tokens
    assert 0 < result.recomputed_prompt_tokens < result.computed_prompt_tokens
    assert 0 <= result.elsewhere_prompt_tokens < result.recomputed_prompt_tokens
    assert sum(r.requests for r in result.replicas) == len(trace)
    assert sum(r.hit_tokens for r in result.replicas) == result.hit_tokens
    assert sum(r.preemptions for r in result.replicas) == result.preemptions
    assert (
        sum(r.computed_tokens for r in result.replicas)
        == result.computed_prompt_tokens + result.preempted_tokens + result.output_tokens
    )
    assert result == run(router, trace), "the same seed gives the same run"


def test_routers_rank_as_they_should() -> None:
    """Where conversations come back, whoever knows what is cached computes less than who does not."""
    trace = conversations(250)
    results = {name: run(name, trace) for name in ROUTERS}
    computed = {name: r.computed_prompt_tokens for name, r in results.items()}
    knowing = max(computed[name] for name in ("jenga", "kv_full_only", "prefix_text"))
    assert knowing < 0.8 * min(computed["p2c"], computed["round_robin"])
    exact, full_only = results["jenga"], results["kv_full_only"]
    # What remains: evicted while a request waited for its turn, where all that is younger is in use or as precious.
    assert (exact.exact_share or 0) > 0.99 > 0.5 > (full_only.exact_share or 0)
    assert (exact.overpredicted_tokens or 0) < (full_only.overpredicted_tokens or 0)
    assert results["p2c"].exact_share is None
    elsewhere = {name: r.elsewhere_prompt_tokens for name, r in results.items()}
    assert elsewhere["jenga"] < 0.2 * min(elsewhere["p2c"], elsewhere["round_robin"])


@pytest.mark.parametrize("router", ROUTERS)
def test_a_cluster_of_one_is_the_plain_simulator(router: str) -> None:
    trace = list(arrivals(agents(60, seed=3, concurrent=24), 500.0, seed=1))
    plan = plan_for("jenga", "model", HYBRID, 16 << 20, trace)
    plain = Simulation(plan, HYBRID, trace, sampling=False).run()
    one = simulate_cluster(plan, HYBRID, trace, replicas=1, router=router)
    assert plain.saturated_share > 0.1, "memory must be short"
    assert one.elsewhere_prompt_tokens == 0
    assert (one.hit_tokens, one.preemptions, one.preempted_tokens, one.seconds, one.ttft_s) == (
        plain.hit_tokens,
        plain.preemptions,
        plain.recomputed_tokens,
        plain.seconds,
        plain.ttft_s,
    )


def test_what_is_on_its_way_draws_its_equals() -> None:
    """Indexes of events alone send them elsewhere, since nothing is stored yet."""
    trace = [replace(request(serial, range(100)), output_tokens=40) for serial in range(4)]
    exact, full_only = run("jenga", trace, 2), run("kv_full_only", trace, 2)
    assert [r.requests for r in exact.replicas].count(0) == 1
    assert exact.computed_prompt_tokens < full_only.computed_prompt_tokens
    assert exact.exact_share == 1.0
    assert full_only.elsewhere_prompt_tokens > 0 == exact.elsewhere_prompt_tokens


@dataclass
class Fake:
    """A replica by hand."""

    queue: int = 0
    used: float = 0.0
    found: Hit = field(default_factory=lambda: Hit(0, 0, None))
    dense: int = 0

    def hit(self, dense_only: bool = False) -> Hit:
        return Hit(self.dense, self.dense, None) if dense_only else self.found


def request(serial: int, blocks: Sequence[int]) -> TraceRequest:
    return TraceRequest(serial, 0.0, 16 * len(blocks), 4, tuple(blocks), 16, 16 * len(blocks))


def test_jenga_goes_by_what_can_be_resumed_and_others_by_attention_alone() -> None:
    replicas: list[Replica] = [
        Fake(),
        Fake(found=Hit(0, 960, None), dense=960),
        Fake(found=Hit(640, 640, None), dense=640),
    ]
    asked = request(0, range(100))
    exact, full_only = ByCost("jenga", False, 0), ByCost("kv_full_only", True, 0)
    assert (exact.choose(asked, replicas), exact.predicted) == (2, 640)
    assert (full_only.choose(asked, replicas), full_only.predicted) == (1, 960)


def test_a_prompt_counts_as_work_until_its_first_token() -> None:
    for name in ("first_token", "finished"):
        router = ByCost("jenga", False, 0)
        replicas: list[Replica] = [Fake(found=Hit(800, 800, None)), Fake()]
        sent = 0
        while router.choose(request(sent, range(100)), replicas) == 0:
            sent += 1
        assert sent > 0, "the prefix is worth a short queue, not a long one"
        for serial in range(sent):
            getattr(router, name)(serial, 0)
        assert router.choose(request(99, range(100)), replicas) == 0


def test_prefix_text_follows_what_it_sent() -> None:
    router = PrefixText(3, seed=0, imbalance=5)
    idle: list[Replica] = [Fake(), Fake(), Fake()]
    first = router.choose(request(0, range(10)), idle)
    assert router.choose(request(1, range(20)), idle) == first, "half of it is known"
    second = router.choose(request(2, [0, *range(100, 120)]), idle)
    assert second != first, "a match of less than a tenth goes where least was sent"
    assert router.choose(request(3, range(10)), [Fake(queue=3 * (i == first)) for i in range(3)]) == first
    busy: list[Replica] = [Fake(queue=9 * (i == first)) for i in range(3)]
    assert router.choose(request(4, range(10)), busy) != first, "too unlike: queues alone count"


def test_load_alone() -> None:
    replicas: list[Replica] = [Fake(queue=3), Fake(queue=1), Fake(queue=2)]
    for seed in range(20):
        assert ROUTERS["p2c"](3, seed).choose(request(0, [1]), replicas) != 0, "one of any two is shorter"
    turn = ROUTERS["round_robin"](3, 0)
    assert [turn.choose(request(i, [1]), replicas) for i in range(5)] == [0, 1, 2, 0, 1]


def test_what_cannot_be_run() -> None:
    trace = conversations(5)
    with pytest.raises(UnknownRouterError, match="round_robin"):
        run("random", trace)
    with pytest.raises(ValueError, match="0 replicas"):
        run("p2c", trace, replicas=0)


def test_traces_for_clusters() -> None:
    trace = [replace(request(i, range(i + 1)), arrival_s=100.0 + i * i) for i in range(5)]
    times = [r.arrival_s for r in scaled(trace, 2.0)]
    assert times == pytest.approx([i * i * 2.5 / 16 for i in range(5)])
    with pytest.raises(TraceError, match="not positive"):
        scaled(trace, 0.0)
    with pytest.raises(TraceError, match="at once"):
        scaled(trace[:1], 1.0)
    partial = replace(trace[3], prompt_tokens=60, known_tokens=60)
    short = replace(trace[0], prompt_tokens=9, known_tokens=9)
    cut = whole_blocks([partial, short])
    assert (cut[0].prompt_tokens, cut[0].known_tokens, cut[0].blocks) == (49, 48, (0, 1, 2))
    assert cut[1] == short


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    add_commands(made)
    made.callback()(lambda: None)
    return made


def command(app: typer.Typer, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["simulate", "--model", "gemma-3-1b", *arguments], env={"COLUMNS": "120"})
    return result.exit_code, result.output


def test_the_command_compares_routers(app: typer.Typer, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    lines = [
        {"timestamp": 100 * i, "input_length": 1500, "output_length": 20, "hash_ids": [0, 1 + i % 3, 100 + i]}
        for i in range(24)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ("--memory", "200MiB", "--trace", str(trace), "--strategy", "jenga", "--json", str(out))
    code, text = command(
        app, *given, "--replicas", "3", "--router", "all", "--rate", "50", "--plot", str(tmp_path / "pictures")
    )
    assert code == 0, text
    results = json.loads(out.read_text())["results"]
    assert [r["router"] for r in results] == list(ROUTERS)
    assert all(r["requests"] == 24 and len(r["replicas"]) == 3 for r in results)
    assert (tmp_path / "pictures" / "routers.png").stat().st_size > 1000
    for word in (*ROUTERS, "recomputed", "spread", "exact"):
        assert word in text
    code, text = command(app, *given, "--replicas", "3", "--router", "p2c")
    assert code == 0, text
    assert json.loads(out.read_text())["results"][0]["seconds"] > 2.3, "the file's own times, if no rate is given"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--replicas", "2"], ["--replicas 2", "--router", "round_robin"]),
        (["--router", "jenga"], ["--router jenga", "--replicas"]),
        (["--replicas", "2", "--router", "best"], ["best", "round_robin"]),
        (["--replicas", "2", "--router", ","], ["--router", "names none"]),
        (["--replicas", "2", "--router", "jenga", "--strategy", "all", "--rate", "5"], ["--strategy", "give one"]),
        (["--replicas", "2", "--router", "jenga", "--strategy", "jenga"], ["--rate trace", "give a number"]),
    ],
)
def test_errors_name_setting_and_remedy(app: typer.Typer, arguments: list[str], words: list[str]) -> None:
    code, text = command(app, "--memory", "1GiB", "--requests", "20", *arguments)
    assert code == 1
    assert "Traceback" not in text
    for word in words:
        assert word in text
