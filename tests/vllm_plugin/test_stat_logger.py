"""Plain `vllm serve` has Jenga's report on its own /metrics."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jenga.demo.catalogue import make
from jenga.metrics.definitions import REGISTRY

RUNNER = Path(__file__).with_name("serve_run.py")
MEMORY = 24 << 20


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

    bases = {base for name in REGISTRY for base in (name, name.removesuffix("_total"))}
    for key, _, _ in metrics:
        if key.startswith("jenga_"):
            assert key in REGISTRY or re.sub("_(bucket|count|sum|created)$", "", key) in bases, (
                f"{key} is not in the table"
            )
    # Present from the start, although nothing of the kind has happened.
    for name in ("jenga_preemptions_total", "jenga_admission_refusals_total", "jenga_evicted_pages_total"):
        assert name in {key for key, _, _ in metrics}
        assert total(name) == 0
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
