"""Async scheduling: with two steps in flight the ends of answers are kept just as with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jenga.demo import make
from tests.vllm_plugin.harness import ENGINE

RUNNER = Path(__file__).with_name("async_run.py")


@pytest.mark.parametrize("name", ["granite-hybrid", "gemma3-recall"])
def test_conversations_hit_the_same_with_steps_in_flight(name: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    line = [sys.executable, str(RUNNER), str(make(name, tmp_path / "models")), str(result)]
    done = subprocess.run(
        line, env={**ENGINE, **os.environ, "JENGA": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(result.read_text())
    # 300 tokens and 100 answered; then 40 and 100 more each turn.  A block of 32 is the most that is computed again.
    ends = [300 + 99 + 140 * turn for turn in range(3)]
    for mode in ("sync", "async"):
        assert found[mode]["live_after"] == 0
        assert [end - hit for end, hit in zip(ends, found[mode]["hits"][1:], strict=True)] == [
            pytest.approx(16, abs=16) for _ in ends
        ], (mode, found)
    assert found["async"]["hits"] == found["sync"]["hits"]
