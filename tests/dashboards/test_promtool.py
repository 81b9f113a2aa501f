"""Prometheus' own checker on configuration, rules and queries; alerts fire and are silent when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dashboards import check, rules
from dashboards.build import RULES, dashboards, rule_files
from dashboards.source import Source

PROGRAM = check.promtool() or "promtool"


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False)


def test_configuration_and_alerts() -> None:
    for arguments in (
        ("check", "config", str(RULES / "prometheus.yml")),
        ("test", "rules", str(RULES / "alerts.test.yml")),
    ):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("fault", "seen"), [("vector(1) > 2", "exp"), ("vector(1)", "got")])
def test_the_alert_tests_see_alerts_that_never_or_always_fire(tmp_path: Path, fault: str, seen: str) -> None:
    for name in ("recording.yml", "alerts.test.yml"):
        shutil.copy(RULES / name, tmp_path)
    content = yaml.safe_load((RULES / "alerts.yml").read_text())
    for rule in content["groups"][0]["rules"]:
        rule["expr"] = fault
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(content))
    done = promtool("test", "rules", str(tmp_path / "alerts.test.yml"))
    assert done.returncode == 1
    said = " ".join(re.findall(rf"{seen}:\s*(.+)", done.stdout + done.stderr))
    missing = [alert.name for alert in rules.alerts(Source()) if alert.name not in said]
    assert not missing, done.stdout + done.stderr


@pytest.mark.parametrize("ray", [True, False])
def test_queries_and_rules_of_both_sources(tmp_path: Path, ray: bool) -> None:
    queries = check.read(dashboards(Source(ray=ray)))
    assert check.promtool_faults(queries, PROGRAM) == ""
    wrong = check.Query("board", "panel", "sum by (x) (rate(up))")
    said = check.promtool_faults([*queries, wrong], PROGRAM)
    assert "board / panel" in said
    assert "expected type range vector" in said
    for name, text in rule_files(Source(ray=ray)).items():
        (tmp_path / name).write_text(text)
        done = promtool("check", "rules", str(tmp_path / name))
        assert done.returncode == 0, done.stdout + done.stderr
