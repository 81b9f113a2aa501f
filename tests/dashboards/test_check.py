"""`jenga dashboards check --prometheus`: which panels are empty, against a server that answers like Prometheus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from click.testing import Result
from typer.testing import CliRunner

from dashboards import cluster
from dashboards.cli import app
from tests.dashboards.fake_grafana import serve


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "300"})


def prometheus(series: Any) -> Any:
    """Answers every query with the series that `series(query)` gives."""

    def answer(method: str, path: str, role: str | None, body: Any) -> tuple[int, Any]:
        (query,) = parse_qs(urlsplit(path).query)["query"]
        found = series(query)
        if found is None:
            return 400, {"status": "error", "error": "too many samples"}
        return 200, {"status": "success", "data": {"resultType": "matrix", "result": found}}

    return answer


SOME = [{"metric": {}, "values": [[0, "NaN"], [1, "0"]]}]
NONE = [{"metric": {}, "values": [[0, "NaN"]]}]


def test_empty_panels_are_listed_and_only_gpu_panels_may_be() -> None:
    with serve(prometheus(lambda query: [] if "gpu" in query or "node_gram" in query else SOME)) as port:
        fine = run("--prometheus", f"http://127.0.0.1:{port}", "--minutes", "2")
    assert fine.exit_code == 0, fine.output
    for title in cluster.GPU_ONLY:
        assert f"no data without a GPU: Jenga: Cluster / {title}" in fine.output

    with serve(prometheus(lambda query: NONE if "hits_ended" in query else SOME)) as port:
        empty = run("--prometheus", f"http://127.0.0.1:{port}")
    assert empty.exit_code == 1
    (line,) = [line for line in empty.output.splitlines() if line.startswith("no data:")]
    assert line.startswith("no data: Jenga: Prefix cache and routing / What ended hits: sum by (group)")


def test_a_server_that_is_no_prometheus_is_told() -> None:
    with serve(lambda *_: (200, [1])) as port:
        assert "does not answer like Prometheus" in run("--prometheus", f"http://127.0.0.1:{port}").output
    with serve(prometheus(lambda query: None)) as port:
        assert "too many samples" in run("--prometheus", f"http://127.0.0.1:{port}").output
    assert "no answer from Prometheus" in run("--prometheus", f"http://127.0.0.1:{port}").output
    wrong = run("--prometheus", "localhost:9090")
    assert wrong.exit_code == 1
    assert "not a URL" in wrong.output


def test_files(tmp_path: Path) -> None:
    page = {"title": "T", "panels": [{"title": "P", "targets": [{"expr": 'sum(ray_jenga_pages{group=~"$group"}'}]}]}
    file = tmp_path / "page.json"
    file.write_text(json.dumps(page))
    bad = run(str(file))
    assert bad.exit_code == 1
    assert "T / P: unclosed left parenthesis" in bad.output
    file.write_text("[]")
    assert "page is not a dashboard" in run(str(file)).output
    file.write_bytes(b"\xff\xfe\x00")
    assert "is not text" in run(str(file)).output
    gone = run(str(tmp_path / "gone.json"))
    assert gone.exit_code == 1
    assert "No such file" in gone.output
