"""What `jenga dashboards build` writes: complete panels, names that exist, and exactly what is committed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dashboards import build, check, cluster, rules
from dashboards.cli import app
from dashboards.source import Source, UnknownMetricError

ROOT = Path(__file__).resolve().parents[2]
BOTH = [Source(ray=True), Source(ray=False)]


def panels(text: str) -> Iterator[dict[str, Any]]:
    for panel in json.loads(text)["panels"]:
        yield from [panel] if panel["type"] != "row" else panel["panels"]


def test_committed_files_are_what_the_code_makes() -> None:
    wanted = {build.GENERATED / f"{uid}.json": text for uid, text in build.dashboards(Source()).items()}
    assert set(build.GENERATED.iterdir()) == set(wanted)
    wanted |= {build.RULES / name: text for name, text in build.rule_files(Source()).items()}
    stale = [str(path) for path, text in wanted.items() if path.read_text() != text]
    assert not stale, "run `jenga dashboards build --repository`"


@pytest.mark.parametrize("source", BOTH)
def test_every_panel_says_what_it_shows_and_what_to_do(source: Source) -> None:
    pages = build.dashboards(source)
    assert len(pages) == (4 if source.ray else 3)
    for text in pages.values():
        page = json.loads(text)
        variables = {variable["name"] for variable in page["templating"]["list"]}
        assert "datasource" in variables
        assert len({panel["title"] for panel in panels(text)}) == len(list(panels(text)))
        for panel in panels(text):
            assert panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            shown, act = panel["description"].split("\n\n**When it looks bad:** ")
            assert len(shown) > 20
            assert len(act) > 20
            assert panel["targets"]
            used = set(re.findall(r"\$\{?(\w+)", json.dumps(panel)))
            assert used - {"__rate_interval"} <= variables, panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        boxes = [panel["gridPos"] for panel in page["panels"]]
        cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])]
        assert len(cells) == len(set(cells)), "panels overlap"
        assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("source", BOTH)
def test_queries_and_rules_parse_and_name_only_what_is_exported(source: Source) -> None:
    queries = check.read(build.dashboards(source))
    assert check.grammar_faults(queries) == []
    recorded = {record.name for record in rules.records(source)}
    found = [*rules.records(source), *rules.alerts(source)]
    for rule in found:
        names = check.metric_names(rule.expr) - recorded
        as_query = check.Query("rules", rule.name, rule.expr)
        unknown = [fault for fault in check.grammar_faults([as_query]) if not any(name in fault for name in recorded)]
        assert not unknown
        assert all(name.startswith("ray_") == source.ray for name in names), names
    for query in queries:
        names = check.metric_names(check.interpolate(query.expr)) - {"ALERTS"}
        assert all(name.startswith("ray_") == source.ray for name in names), names
    used = set().union(*(check.metric_names(rule.expr) for rule in rules.alerts(source)))
    assert {name for name in used if ":jenga" in name} <= recorded


def test_a_name_that_nothing_exports_is_an_error() -> None:
    s = Source()
    for select in (
        lambda: s.ours("jenga_memory_byte"),
        lambda: s.ours("jenga_memory_bytes", part="bucket"),
        lambda: s.ours("jenga_eviction_age_seconds"),
        lambda: s.vllm("vllm:nope"),
        lambda: s.of_ray("ray_nope"),
    ):
        with pytest.raises(UnknownMetricError):
            select()


@pytest.mark.parametrize(
    ("expr", "said"),
    [
        ("sum(ray_jenga_memory_bytes", "unclosed left parenthesis"),
        ("rate(ray_jenga_memory_bytes)", "expected"),
        ("sum(ray_jenga_memory_byte)", "nothing exports ray_jenga_memory_byte"),
        ('max_over_time(up{a="b"}[5m:1m]) / jenga_buffer_bytes', "nothing exports up"),
    ],
)
def test_the_check_of_queries_sees_faults(expr: str, said: str) -> None:
    (fault,) = check.grammar_faults([check.Query("board", "panel", expr)])
    assert fault.startswith("board / panel: ")
    assert said in fault


def test_gpu_panels_are_named_as_they_are_called() -> None:
    titles = {panel["title"] for panel in panels(build.dashboards(Source())[cluster.UID])}
    assert set(cluster.GPU_ONLY) <= titles


def test_each_alert_has_a_section_of_the_manual_and_a_test() -> None:
    manual = (ROOT / rules.RUNBOOK).read_text()
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", manual, re.M)
    }
    tested = (build.RULES / "alerts.test.yml").read_text()
    written = yaml.safe_load((build.RULES / "alerts.yml").read_text())["groups"][0]["rules"]
    assert len(written) == len(rules.alerts(Source())) == 6
    for rule in written:
        place = rule["annotations"]["runbook"].split(": ")[0]
        assert place.removeprefix(f"{rules.RUNBOOK}#") in anchors
        assert f'alertname="{rule["alert"]}"' in tested


def test_provisioning_folder(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["build", str(tmp_path), "--prometheus", "http://prom:9090", "--standalone"])
    assert done.exit_code == 0, done.output
    provider = yaml.safe_load((tmp_path / "provisioning/dashboards/jenga.yaml").read_text())["providers"][0]
    pages = Path(provider["options"]["path"])
    assert pages.is_absolute()
    assert {path.stem for path in pages.iterdir()} == set(build.dashboards(Source(ray=False)))
    (source,) = yaml.safe_load((tmp_path / "provisioning/datasources/jenga.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prom:9090")
    rule = yaml.safe_load((tmp_path / "prometheus/alerts.yml").read_text())
    assert {r["alert"] for r in rule["groups"][0]["rules"]} < {a.name for a in rules.alerts(Source())}
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["build", str(tmp_path / "file" / "x")])
    assert done.exit_code == 1
    assert "cannot write" in done.output
    assert "Traceback" not in done.output


def test_beside_rays_own_dashboards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_METRICS_OUTPUT_ROOT", "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(app, ["build", "--ray-session", str(tmp_path)])
    assert done.exit_code == 1
    assert "/tmp/ray/session_latest" in done.output
    theirs = tmp_path / "metrics" / "grafana" / "dashboards"
    theirs.mkdir(parents=True)
    assert CliRunner().invoke(app, ["build", "--ray-session", str(tmp_path)]).exit_code == 0
    assert {path.stem for path in theirs.iterdir()} == set(build.dashboards(Source()))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(elsewhere))
    assert build.ray_dashboards_folder(tmp_path) == elsewhere
