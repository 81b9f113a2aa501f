"""The adapter refuses what it does not know, before anything is replaced."""

from __future__ import annotations

import logging

import pytest

from jenga import vllm_plugin
from jenga.vllm_plugin import adapter


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu"])
def test_known_versions_pass(version: str) -> None:
    adapter.check_version(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "0.32.1", "dev"])
def test_unknown_version_is_refused_with_the_known_ones_and_the_remedy(version: str) -> None:
    with pytest.raises(RuntimeError, match=r"knows vLLM 0\.32\.0.*" + version + r".*JENGA=0"):
        adapter.check_version(version)


def test_changed_signature_is_refused() -> None:
    def seam(a: int, b: int) -> None: ...

    adapter.check_seam(seam, ("a", "b"))
    with pytest.raises(RuntimeError, match=r"takes \('a', 'b'\), Jenga's plugin expects \('a', 'c'\)"):
        adapter.check_seam(seam, ("a", "c"))
    with pytest.raises(RuntimeError, match=r"vLLM's vllm\.there\.seam takes"):
        adapter.check_seam(seam, ("a", "c"), "vllm.there:seam")


def test_installed_vllm_has_every_seam() -> None:
    for name, parameters in (adapter._SEAMS | adapter._CPU_SEAMS).items():
        adapter.check_seam(adapter.find_seam(name), parameters)


@pytest.mark.parametrize("name", ["vllm.v1.core.kv_cache_manager:KVCacheManager.gone", "vllm.v1.gone:KVCacheManager"])
def test_missing_seam_is_refused_before_anything_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[str] = []
    monkeypatch.setattr(adapter, "_SEAMS", {**adapter._SEAMS, name: ("self",)})
    monkeypatch.setattr(adapter, "_replace", lambda module, name, *_, **__: replaced.append(name))
    with pytest.raises(RuntimeError, match=rf"{name.replace(':', '.')}.* cannot be found .*JENGA=0"):
        adapter.install()
    assert not replaced


def test_replacements_take_vllms_own_parameters_by_name() -> None:
    from jenga.vllm_plugin.planning import Planner

    for name, parameters in adapter._PLANNER_SEAMS.items():
        adapter.check_seam(getattr(Planner, name.lstrip("_")), ("self", *parameters))


def test_switch_takes_only_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JENGA", "yes")
    with pytest.raises(ValueError, match=r"JENGA='yes': use 1 .* or 0"):
        vllm_plugin.register()


def test_switched_off_installs_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.jenga"), "info", lambda line, *values: said.append(line % values))
    monkeypatch.setenv("JENGA", "0")
    monkeypatch.setattr(vllm_plugin, "_registered", False)
    monkeypatch.setattr(adapter, "install", lambda: pytest.fail("installed"))
    vllm_plugin.register()
    assert said == ["Jenga is off (JENGA=0): vLLM's own memory manager is in charge"]
