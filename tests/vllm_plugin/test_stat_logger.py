"""Plain `vllm serve` has Jenga's report on its own /metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from jenga.demo.catalogue import make
from jenga.metrics.prometheus import Exporter
from jenga.metrics.samples import Sample

RUNNER = Path(__file__).with_name("serve_run.py")
MEMORY = 24 << 20


def test_exporter_sets_gauges_and_follows_totals() -> None:
    registry = CollectorRegistry()
    exporter = Exporter(("engine",), registry)

    def publish(pages: int, total: int, engine: str) -> None:
        exporter.publish(
            [
                Sample("jenga_pages", "gauge", "x", {"group": "g"}, pages),
                Sample("jenga_hits_total", "counter", "x", {}, total),
            ],
            {"engine": engine},
        )

    publish(5, 10, "0")
    publish(7, 3, "1")
    publish(2, 14, "0")
    assert registry.get_sample_value("jenga_pages", {"group": "g", "engine": "0"}) == 2
    assert registry.get_sample_value("jenga_hits_total", {"engine": "0"}) == 14
    assert registry.get_sample_value("jenga_hits_total", {"engine": "1"}) == 3
    publish(2, 6, "0")  # the engine began anew
    assert registry.get_sample_value("jenga_hits_total", {"engine": "0"}) == 20


@pytest.mark.timeout(600)
def test_served_metrics_agree_with_the_requests(tmp_path: Path) -> None:
    model = make("gemma3-recall", tmp_path)
    answer = tmp_path / "answer.json"
    done = subprocess.run(
        [
            *("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *(sys.executable, str(RUNNER), str(model), str(MEMORY), str(answer)),
        ],
        cwd=tmp_path,  # package metadata that an old build left in the working tree would hide the entry point
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(answer.read_text())
    metrics, requests = found["metrics"], found["requests"]

    def total(name: str) -> float:
        return sum(value for key, _, value in metrics if key == name)

    assert total("jenga_memory_bytes") == total("jenga_buffer_bytes")
    assert MEMORY * 0.9 < total("jenga_buffer_bytes") <= MEMORY
    assert total("jenga_admitted_requests_total") == len(requests)
    assert total("jenga_hit_tokens_total") == sum(cached for _, cached in requests) > 0
    assert total("jenga_hit_requests_total") == sum(cached > 0 for _, cached in requests)
    # Nothing runs, so nothing is live, and what was cached stays.
    pages = {(labels["group"], labels["state"]): value for key, labels, value in metrics if key == "jenga_pages"}
    assert {group.split()[0] for group, _ in pages} == {"full_attention", "sliding_window_64"}
    assert all(value == 0 for (_, state), value in pages.items() if state == "live")
    assert pages["full_attention", "cached"] > 0
    vllm = next(labels for key, labels, _ in metrics if key == "vllm:num_requests_running")
    assert all(labels["engine"] == vllm["engine"] for key, labels, _ in metrics if key.startswith("jenga_"))
    assert all(labels["model_name"] == vllm["model_name"] for key, labels, _ in metrics if key.startswith("jenga_"))
