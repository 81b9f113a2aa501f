"""Dashboards and alerts on real engines, a real Ray Serve and a real Prometheus: `make test-dashboards`.

Takes a quarter of an hour, most of it because alerts look back for minutes; so not a part of `make test`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashboards import schema_check
from dashboards.build import build_for_ray, dashboards, ray_dashboards_folder
from dashboards.source import Source
from deployments.local import isolation
from tests.dashboards.live import pictures
from tests.dashboards.live.load import Load
from tests.dashboards.live.services import ROOT, Serving, prometheus, require_programs, serving, wait_for

pytestmark = pytest.mark.timeout(1800)
# JengaReplicaDown asks what was wanted for five minutes.
_LOAD_S = 330


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    require_programs()
    folder = tmp_path_factory.mktemp("live")
    with serving(folder) as running, prometheus(running, folder):
        yield running


@pytest.mark.parametrize("ray", [True, False])
def test_grafanas_own_types_accept_the_dashboards_and_refuse_wrong_ones(ray: bool) -> None:
    require_programs()
    pages = dashboards(Source(ray=ray))
    folder = schema_check.default_folder()
    assert schema_check.faults(pages, folder) == []
    text = pages["jenga-memory"]
    for right, wrong in (
        ('"fillOpacity": 10', '"fillOpacity": "10"'),
        ('"displayMode": "list"', '"displayMode": "lisp"'),
        ('"calculate": false', '"calculat": false'),
        ('"graphTooltip": 1', '"graphTooltip": 7'),
        ('"format": "time_series"', '"format": "series"'),
        ('"type": "stat"', '"type": "start"'),
        ('"h": 8', '"h": "8"'),
    ):
        assert right in text
        found = schema_check.faults({"wrong": text.replace(right, wrong)}, folder)
        assert any(fault.startswith("wrong.json line ") for fault in found), (wrong, found)


def test_every_panel_has_data_of_a_plain_vllm_server(tmp_path: Path) -> None:
    require_programs()
    command = [*isolation.network_command(), *isolation.process_command()]
    command += [sys.executable, "-m", "tests.dashboards.live.standalone", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def firing(served: Serving) -> set[str]:
    return set(served.value('ALERTS{alertstate="firing"}'))


def test_every_panel_has_data_and_replica_down_fires_and_clears(served: Serving, tmp_path: Path) -> None:
    with Load(served.record.url) as load:
        time.sleep(_LOAD_S)
        checked = served.check(minutes=4)
        print(checked.stdout)
        assert checked.returncode == 0, checked.stdout + checked.stderr

        # What Prometheus has adds up to the buffer, for both replicas, at every scrape of the last minutes.
        whole = "sum by (replica) (ray_jenga_memory_bytes) == bool sum by (replica) (ray_jenga_buffer_bytes)"
        added_up = served.value(f"avg_over_time(({whole})[4m:5s])")
        print("share of scrapes in which causes add up to the buffer:", added_up)
        assert list(added_up.values()) == [1, 1]

        assert "JengaReplicaDown" not in firing(served)
        victim = served.engine_processes()[0]
        victim.send_signal(signal.SIGKILL)
        fired = wait_for("JengaReplicaDown fires", lambda: "JengaReplicaDown" in firing(served), 300)
        cleared = wait_for("JengaReplicaDown clears", lambda: "JengaReplicaDown" not in firing(served), 600)
        print(f"JengaReplicaDown: fired after {fired:.0f} s, cleared {cleared:.0f} s later")
        assert len(served.engine_processes()) == 2
        time.sleep(60)
        pictures.collect(served, tmp_path, minutes=10)
    print("answers by status:", load.statuses)
    assert load.statuses.get(200, 0) > 100
    drawn = pictures.draw(tmp_path)
    assert drawn
    if target := os.environ.get("JENGA_PICTURES"):
        pictures.keep(drawn, Path(target))


def test_beside_the_dashboards_that_ray_wrote(served: Serving) -> None:
    session = next(Path(served.record.ray_dir).glob("*/session_2*"))
    folder = ray_dashboards_folder(session)
    theirs = set(folder.iterdir())
    assert len(theirs) >= 5
    ours = set(build_for_ray(session))
    assert ours == set(folder.iterdir()) - theirs
