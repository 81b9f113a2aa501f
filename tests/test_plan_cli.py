"""`jenga plan` as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from jenga.plan.cli import add_commands
from jenga.strategies import STRATEGIES

app = typer.Typer()
add_commands(app)
app.callback()(lambda: None)  # keeps `plan` a sub-command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_json_carries_everything() -> None:
    result = run("--model", "gemma-3-27b", "--memory", "40GiB", "--tp", "2", "--kv-dtype", "fp8", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["model"], report["tp"], report["memory_bytes"]) == ("Gemma-3-27B", 2, 40 << 30)
    assert [s["strategy"] for s in report["strategies"]] == list(STRATEGIES)
    for strategy in report["strategies"]:
        assert strategy["error"] is None
        assert [x["tokens"] for x in strategy["lengths"]] == [512, 4096, 32768]
        for length in strategy["lengths"]:
            assert sum(length["waste"].values()) == report["memory_bytes"]
            assert 0 < length["sequences"] <= length["bound"]
    # 8 heads of 128 elements on each of two ranks, a byte each, for keys and values.
    paged = report["strategies"][0]
    assert paged["groups"][0]["page_bytes"] == 62 * 16 * 8 * 128 * 2


def test_tables_name_every_strategy() -> None:
    result = run("--model", "falcon-h1-34b", "--memory", "40GiB", "--tokens", "300", "--tokens", "9000")
    assert result.exit_code == 0, result.stderr
    for name in STRATEGIES:
        assert name in result.stdout
    for text in ("Layer groups", "Sequences that fit", "300 tokens", "9,000 tokens", "2,064 tokens", "A full buffer"):
        assert text in result.stdout


def test_models_from_files(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    by_folder = run("--hf-config", str(tmp_path), "--memory", "40GiB", "--strategy", "jenga", "--json")
    by_name = run("--model", "llama-3.1-8b", "--memory", "40GiB", "--strategy", "jenga", "--json")
    (a,), (b,) = (json.loads(r.stdout)["strategies"] for r in (by_folder, by_name))
    assert a["lengths"] == b["lengths"]


def test_picture(tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    result = run("--model", "gemma-3-1b", "--memory", "2GiB", "--strategy", "paged, jenga", "--plot", str(path))
    assert result.exit_code == 0, result.stderr
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in result.stderr
    nowhere = run("--model", "gemma-3-1b", "--memory", "2GiB", "--plot", str(tmp_path / "no" / "plan.png"))
    assert nowhere.exit_code == 2
    assert "cannot be written: No such file or directory" in nowhere.stderr


def test_a_strategy_without_a_plan_does_not_hide_the_others() -> None:
    result = run("--model", "glm-5.3-flash", "--memory", "1.8GB", "--tokens", "12", "--json")
    assert result.exit_code == 0
    strategies = {s["strategy"]: s for s in json.loads(result.stdout)["strategies"]}
    assert "strategy max" in strategies["max"]["error"]
    assert strategies["jenga"]["lengths"][0]["sequences"] == 4
    alone = run("--model", "glm-5.3-flash", "--memory", "1.8GB", "--tokens", "12", "--strategy", "max", "--json")
    assert alone.exit_code == 1
    assert "give at least" in alone.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1GiB"], "give either --model or --hf-config, for example --model gemma-3-27b"),
        (["--memory", "1GiB", "--model", "gemma-3-1b", "--hf-config", "x"], "not both"),
        (["--memory", "1Gx", "--model", "gemma-3-1b"], "--memory '1Gx' is not a size"),
        (["--memory", "1GiB", "--model", "gema-3-1b"], "Did you mean gemma-3-1b?"),
        (["--memory", "1GiB", "--model", "gemma-3-1b", "--strategy", "jnga"], "Did you mean jenga?"),
        (["--memory", "1GiB", "--model", "gemma-3-1b", "--kv-dtype", "fp7"], "--kv-dtype 'fp7' is not known"),
        (["--memory", "1GiB", "--model", "gemma-3-1b", "--plot", "x.pdf"], "only PNG files"),
        (["--memory", "1GiB", "--model", "jamba-1.5-mini", "--tp", "3"], "choose a --tp that divides it"),
        (["--memory", "1GiB", "--hf-config", "/nonexistent"], "cannot be read: No such file or directory"),
    ],
)
def test_errors_name_value_and_remedy(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_starting_costs_little() -> None:
    """The program lists its commands without importing what only `plan` needs."""
    import subprocess
    import sys

    code = "import jenga.plan.cli, sys; assert not {'pydantic', 'yaml', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
