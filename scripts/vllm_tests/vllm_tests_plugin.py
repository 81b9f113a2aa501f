"""pytest plugin of one run of vLLM's tests: records every outcome, and with VLLM_TESTS_MODE=jenga runs them on Jenga.

`scripts/test_vllm.py` starts it and says where things are, in the environment.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

MODE = os.environ.get("VLLM_TESTS_MODE", "stock")
RECORD = Path(os.environ.get("VLLM_TESTS_RECORD", os.devnull))
LIST = Path(os.environ.get("VLLM_TESTS_DESELECTED", os.devnull))
MARKERS = ("skip_global_cleanup", "cpu_test", "slow_test", "core_model", "optional")
IMAGE_TOKENS = 576
"""Of LLaVA 1.5, the image model that the tests name."""
KEEP = os.environ.get("VLLM_TESTS_KEEP") == "1"


def reasons(file: Path) -> dict[str, str]:
    """Pattern of test ids, as `*`-wildcards, to why vLLM's test does not apply to Jenga."""
    return {pattern: entry["reason"] for entry in yaml.safe_load(file.read_text()) or [] for pattern in entry["tests"]}


def reason_for(test: str, listed: dict[str, str]) -> str | None:
    """Why `test` (``file.py::name[parameters]``) is deselected, None if it is not."""
    plain = test.split("[")[0]
    for pattern, reason in listed.items():
        # Brackets are parts of ids here, not sets of characters.
        if pattern in (test, plain) or fnmatchcase(test, pattern.replace("[", "[[]")):
            return reason
    return None


def short(nodeid: str) -> str:
    """A test's id without the folders above it."""
    path, _, name = nodeid.partition("::")
    return f"{path.rsplit('/', 1)[-1]}::{name}"


def record(**fields: Any) -> None:
    """Append one line to the record."""
    with RECORD.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Install the plugin and the conversion before any test module is imported."""
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: one of vLLM's markers")
    stand_in_for_images()
    if MODE != "jenga":
        return
    import convert
    import flat_view

    from jenga import vllm_plugin

    vllm_plugin.register()
    convert.install()
    flat_view.install()


def stand_in_for_images() -> None:
    """Say what an image costs the encoder: vLLM would ask the model's processor, whose files are not here."""
    from vllm.v1.core.encoder_cache_manager import compute_mm_encoder_budget
    from vllm.v1.core.sched import scheduler

    class Budget:
        mm_max_toks_per_item: ClassVar = {"image": IMAGE_TOKENS}

        def __init__(self, config: Any, registry: Any) -> None:
            limits = compute_mm_encoder_budget(config.scheduler_config, self.mm_max_toks_per_item)
            self.encoder_compute_budget, self.encoder_cache_size = limits

    scheduler.MultiModalBudget = Budget


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the list names, and the clean-up of GPU memory (half a second a test)."""
    listed = reasons(LIST)
    keep: list[pytest.Item] = []
    for item in items:
        item.add_marker("skip_global_cleanup")
        reason = reason_for(short(item.nodeid), listed) if MODE == "jenga" else None
        if reason is None or KEEP:
            keep.append(item)
        else:
            record(test=short(item.nodeid), outcome="deselected", reason=reason)
    config.hook.pytest_deselected(items=[i for i in items if i not in keep])
    items[:] = keep


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep the collector from walking through what stays for good, for every pool of 10,000 blocks anew."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Gather the reports of one test into one line."""
    if MODE == "jenga":
        import convert
        import flat_view

        facts = convert.fresh()
        flat_view.seen_pools.clear()
    outcomes[item.nodeid] = []
    result = yield
    phases = outcomes.pop(item.nodeid)
    worst = next((o for o in ("failed", "skipped") if any(p[0] == o for p in phases)), "passed")
    line: dict[str, Any] = {"test": short(item.nodeid), "outcome": worst}
    line["message"] = next((m for o, m in phases if o == worst and m), "")
    if MODE == "jenga":
        line["coordinators"], line["pools"] = len(facts.coordinators), len(flat_view.seen_pools)
        line["ratios"] = sorted({str(c.allocator.ratios) for c in facts.coordinators})
        line["left_to_vllm"] = sorted(facts.left_to_vllm)
    record(**line)
    return result


outcomes: dict[str, list[tuple[str, str]]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note one phase's outcome."""
    message = str(report.longrepr)[-2000:] if report.longrepr is not None else ""
    outcomes[report.nodeid].append((report.outcome, message))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A test file that cannot be imported counts as one failed test."""
    if report.failed:
        record(test=f"{short(report.nodeid)}(collection)", outcome="failed", message=str(report.longrepr)[-2000:])
