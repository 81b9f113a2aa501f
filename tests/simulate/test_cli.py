"""`jenga simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jenga.simulate.cli import add_commands

TRACE = "".join(
    json.dumps(
        {"timestamp": 100 * i, "input_length": 1500 + i, "output_length": 20, "hash_ids": [0, 1 + i // 2, 100 + i]}
    )
    + "\n"
    for i in range(12)
)


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    add_commands(made)
    made.callback()(lambda: None)
    return made


def run(app: typer.Typer, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["simulate", *arguments], env={"COLUMNS": "120"})
    return result.exit_code, result.output


def test_compares_strategies(app: typer.Typer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(TRACE)
    out = tmp_path / "out.json"
    code, text = run(
        app, "--model", "gemma-3-1b", "--memory", "200MiB", "--trace", str(trace), "--strategy", "vllm,jenga",
        "--rate", "trace", "--json", str(out), "--plot", str(tmp_path / "pictures"),
    )  # fmt: skip
    assert code == 0, text
    data = json.loads(out.read_text())
    assert [r["strategy"] for r in data["results"]] == ["vllm", "jenga", "exact"]
    assert all(r["requests"] == 12 and r["rejected"] == 0 for r in data["results"])
    assert all(0 < r["hit_tokens"] <= data["bound"]["limited"] for r in data["results"])
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {"memory.png", "resident.png"}
    for word in ("vllm", "jenga", "exact", "hit tokens", "TTFT"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gemma-3-1c"], ["gemma-3-1c", "gemma-3-1b"]),
        (["--memory", "40Gx"], ["--memory", "40Gx"]),
        (["--memory", "1KiB"], ["give at least"]),
        (["--trace", "chatt"], ["chatt", "documents"]),
        (["--trace", "no/such.jsonl"], ["no/such.jsonl", "Mooncake"]),
        (["--strategy", "jengo"], ["jengo", "jenga"]),
        (["--strategy", ","], ["--strategy", "jenga"]),
        (["--rate", "fast"], ["--rate", "fast", "max"]),
        (["--rate", "-2"], ["-2"]),
        (["--rate", "trace"], ["chat has no times"]),
        (["--kv-dtype", "int3"], ["int3", "fp8"]),
        (["--state-dtype", "int3"], ["--state-dtype", "int3", "bfloat16"]),
        (["--step-cost", "no/such.json"], ["no/such.json"]),
        (["--json", "no/such/out.json"], ["no/such/out.json"]),
    ],
)
def test_errors_name_setting_value_and_remedy(app: typer.Typer, arguments: list[str], words: list[str]) -> None:
    given = {"--model": "gemma-3-1b", "--memory": "1GiB", "--requests": "20"}
    given.update(dict(zip(arguments[::2], arguments[1::2], strict=True)))
    code, text = run(app, *(part for pair in given.items() for part in pair))
    assert code == 1
    assert "Traceback" not in text
    for word in words:
        assert word in text


def test_a_prefill_pauses_for_a_state_only_where_that_spares_a_pass(app: typer.Typer, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    # The same prompt each time: what is spared is up to the state at its end.
    asked = {"input_length": 1500, "output_length": 2, "hash_ids": [0, 1, 2]}
    trace.write_text("".join(json.dumps({"timestamp": 10_000 * i, **asked}) + "\n" for i in range(4)))
    hits = []
    for pass_tokens in ("1400", "1600"):
        code, text = run(
            app, "--model", "granite-4-small", "--memory", "4GiB", "--trace", str(trace), "--strategy", "jenga",
            "--rate", "trace", "--pass-tokens", pass_tokens, "--json", str(out),
        )  # fmt: skip
        assert code == 0, text
        hits.append(json.loads(out.read_text())["results"][0]["hit_tokens"])
    assert hits[0] == 3 * 1488
    # The second asker leaves a state where full attention says that it was asked before.
    assert hits[1] == 2 * 1488


def test_step_costs_can_be_given(app: typer.Typer, tmp_path: Path) -> None:
    costs = tmp_path / "cost.json"
    arguments = ["--model", "gemma-3-1b", "--memory", "1GiB", "--requests", "20", "--strategy", "jenga"]
    seconds = []
    for overhead in (0.001, 10):
        costs.write_text(json.dumps({"overhead_s": overhead}))
        out = tmp_path / "out.json"
        assert run(app, *arguments, "--step-cost", str(costs), "--json", str(out))[0] == 0
        seconds.append(json.loads(out.read_text())["results"][0]["seconds"])
    assert seconds[1] > 100 * seconds[0]
    for bad in ('{"overhead": 1}', '{"overhead_s": -1}', "[]", "{"):
        costs.write_text(bad)
        code, text = run(app, *arguments, "--step-cost", str(costs))
        assert code == 1
        assert "cost.json" in text
