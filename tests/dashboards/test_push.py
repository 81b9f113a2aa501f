"""`jenga dashboards push` against a fake of Grafana's API."""

from __future__ import annotations

import socket

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dashboards import build
from dashboards.cli import app
from dashboards.source import Source
from tests.dashboards.fake_grafana import FakeGrafana, running, serve


def push(url: str, *options: str, token: str = "admin-token") -> Result:
    return CliRunner().invoke(app, ["push", "--url", url, *options], env={"GRAFANA_TOKEN": token, "COLUMNS": "200"})


def refused(result: Result) -> str:
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    return result.output


@pytest.mark.parametrize("prefix", ["", "/below/a/path"])
def test_push_creates_everything_and_a_second_one_changes_nothing(prefix: str) -> None:
    with running(prefix=prefix) as grafana:
        first = push(grafana.url, "--prometheus", "http://prom:9090")
        assert first.exit_code == 0, first.output
        assert first.output.count("created") == 6
        assert set(grafana.dashboards) == set(build.dashboards(Source()))
        assert {page["meta"]["folderUid"] for page in grafana.dashboards.values()} == set(grafana.folders)
        assert grafana.datasources[build.DATASOURCE_UID]["url"] == "http://prom:9090"

        grafana.writes.clear()
        second = push(grafana.url, "--prometheus", "http://prom:9090")
        assert second.output.count("unchanged") == 6
        assert grafana.writes == []

        # What somebody changed in Grafana is put right, and nothing else.
        grafana.dashboards["jenga-memory"]["dashboard"]["title"] = "Mine"
        grafana.dashboards["jenga-cache"]["meta"]["folderUid"] = "elsewhere"
        third = push(grafana.url, "--prometheus", "http://other:9090")
        assert third.output.count("updated") == 3
        assert sorted(grafana.writes) == [
            "POST dashboard jenga-cache",
            "POST dashboard jenga-memory",
            f"PUT datasource {build.DATASOURCE_UID}",
        ]


def test_what_a_token_may_do() -> None:
    with running() as grafana:
        assert "GRAFANA_TOKEN" in refused(push(grafana.url, token="wrong"))
        assert "role Editor" in refused(push(grafana.url, token="viewer-token"))
        assert grafana.writes == []
        assert "--no-datasource" in refused(push(grafana.url, token="editor-token"))
        done = push(grafana.url, "--no-datasource", token="editor-token")
        assert done.exit_code == 0, done.output
        assert not grafana.datasources


def test_a_name_that_is_taken_is_told() -> None:
    taken = {"theirs": {"uid": "theirs", "name": build.DATASOURCE_NAME}}
    with running(datasources=taken) as grafana:
        assert "same name already exists" in refused(push(grafana.url))


def test_addresses_where_no_grafana_is() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "nothing answers there (Connection refused)" in refused(
            push(f"http://127.0.0.1:{closed.getsockname()[1]}")
        )
    assert "not a URL" in refused(push("grafana:3000"))
    with running(prefix="/grafana") as grafana:
        assert "below a path" in refused(push(grafana.url.removesuffix("/grafana")))
    with serve(lambda *_: (200, {"hello": "world"})) as port:
        assert "is not Grafana" in refused(push(f"http://127.0.0.1:{port}"))
    with serve(lambda *_: (502, {"message": "no upstream"})) as port:
        assert "no upstream" in refused(push(f"http://127.0.0.1:{port}"))


@pytest.mark.parametrize(("version", "fine"), [("11.0.0", True), ("13.2.1-pre", True), ("10.4.9", False), ("?", False)])
def test_versions(version: str, fine: bool) -> None:
    grafana: FakeGrafana
    with running(version=version) as grafana:
        result = push(grafana.url)
        assert (result.exit_code == 0) == fine
        assert bool(grafana.writes) == fine
        if not fine:
            assert ("too old" if version != "?" else "is not Grafana") in refused(result)
