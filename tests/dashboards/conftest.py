"""Tests that need Prometheus' own tools run where those are installed; elsewhere the end of the run says so."""

import shutil
from typing import Any

PROMTOOL = shutil.which("promtool")
# The proof starts engines, Prometheus and a browser: `make test-dashboards`.
collect_ignore = [] if PROMTOOL else ["test_promtool.py"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not PROMTOOL:
        terminalreporter.write_line(
            "promtool is not installed (apt-get install prometheus): promql-parser read rules and queries instead, and "
            "tests/dashboards/test_promtool.py was not run; `make test-dashboards` requires it"
        )
