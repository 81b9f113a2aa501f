"""`make test-vllm` on made-up tests: no network, and every kind of outcome."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HARNESS = ROOT / "scripts" / "vllm_tests"

MADE_UP = """
import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

def manager(**options):
    shape = dict(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    specs = [FullAttentionSpec(**shape), SlidingWindowSpec(sliding_window=32, **shape)]
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    config = KVCacheConfig(num_blocks=10, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(config, max_model_len=64, scheduler_block_size=16, hash_block_size=16, **options)

def test_same():
    assert manager().block_pool.get_num_free_blocks() == 9

def test_left_to_vllm():
    assert type(manager(use_eagle=True).coordinator).__name__ == "HybridKVCacheCoordinator"

def test_own_pool():
    pool = BlockPool(4, enable_caching=True, hash_block_size=16)
    assert [b.block_id for b in pool.get_new_blocks(3)] == [1, 2, 3]

@pytest.mark.parametrize("case", ["a", "b"])
def test_flat(case):
    assert type(manager().coordinator).__name__ == "HybridKVCacheCoordinator"

def test_fails_everywhere():
    raise RuntimeError("no such device")
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("test_vllm_script", ROOT / "scripts" / "test_vllm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(HARNESS))
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outcomes(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, object]]]:
    """Both runs of the made-up file; one of two cases is deselected."""
    folder = tmp_path_factory.mktemp("vllm")
    file = folder / script.TESTS / "test_made_up.py"
    file.parent.mkdir(parents=True)
    file.write_text(MADE_UP)
    listed = folder / "list.yaml"
    listed.write_text(yaml.safe_dump([{"reason": "another class", "tests": ["test_made_up.py::test_flat[a]"]}]))
    script.CACHE = folder
    runs = [script.start(mode, folder, listed, False, ()) for mode in script.MODES]
    for run in runs:
        assert run.process.wait(300) == 1, run.log.read_text()
    return {run.mode: run.outcomes() for run in runs}


def test_the_plugin_is_in_effect_where_it_would_be(outcomes: dict[str, dict[str, dict[str, object]]]) -> None:
    stock, jenga = outcomes["stock"], outcomes["jenga"]
    assert {t.split("::")[1]: o["outcome"] for t, o in stock.items()} == {
        "test_same": "passed",
        "test_left_to_vllm": "passed",
        "test_own_pool": "passed",
        "test_flat[a]": "passed",
        "test_flat[b]": "passed",
        "test_fails_everywhere": "failed",
    }
    found = {t.split("::")[1]: o for t, o in jenga.items()}
    assert found["test_same"]["coordinators"] == 1
    assert found["test_same"]["ratios"] == ["(1, 1)"]
    assert found["test_left_to_vllm"]["left_to_vllm"] == ["speculative decoding is configured"]
    assert found["test_left_to_vllm"]["coordinators"] == 0
    assert found["test_own_pool"]["pools"] == 1
    assert (found["test_flat[a]"]["outcome"], found["test_flat[b]"]["outcome"]) == ("deselected", "failed")


def test_verdict(
    script: ModuleType, outcomes: dict[str, dict[str, dict[str, object]]], capsys: pytest.CaptureFixture[str]
) -> None:
    stock, jenga = outcomes["stock"], outcomes["jenga"]
    case = "test_made_up.py::test_flat[{}]".format
    verdict = script.compare(stock, jenga, {case("a"): "x", "gone.py::test": "x"}, keep=False, whole=True)
    assert verdict.worse == [case("b")]
    assert verdict.failing_in_stock == ["test_made_up.py::test_fails_everywhere"]
    assert verdict.idle == ["gone.py::test"]
    assert script.report(stock, jenga, verdict, script.Console(width=200)) == 1
    printed = capsys.readouterr().out
    assert "tests that pass in stock and fail with Jenga: 1" in printed
    assert "speculative decoding is configured" in printed

    listed = {"test_made_up.py::test_flat": "x"}
    jenga = jenga | {case("b"): {"outcome": "deselected"}}
    fine = script.compare(stock, jenga, listed, keep=False, whole=True)
    assert script.report(stock, jenga, fine, script.Console(width=200)) == 0
    # A test that never reported (its process died) is worse, and a listed one that passes is needless.
    lost = {t: o for t, o in jenga.items() if not t.endswith("test_same")}
    assert script.compare(stock, lost, listed, keep=False, whole=True).worse == ["test_made_up.py::test_same"]
    passing = jenga | {case("a"): {"outcome": "passed"}}
    assert script.compare(stock, passing, listed, keep=True, whole=True).needless == [case("a")]


def test_every_deselected_test_has_a_reason_of_its_own() -> None:
    entries = yaml.safe_load((HARNESS / "deselected.yaml").read_text())
    reasons = [entry["reason"] for entry in entries]
    assert len(set(reasons)) == len(reasons)
    assert all(len(reason.split()) >= 5 for reason in reasons)


def test_no_package_index_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import test_vllm; from pathlib import Path;"
        f"test_vllm.CACHE = Path({json.dumps(str(tmp_path))}); sys.exit(test_vllm.main([]))"
    )
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Fetching the tests' requirements failed; pip says:" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
