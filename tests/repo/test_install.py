"""Decisions of scripts/install.py that need no network, and its view of an environment."""

import importlib.util
import json
import subprocess
import sys
import threading
import venv
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = load("install")
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
PAGE = f'<a href="/whl/cpu/torch-2.13.0%2Bcpu-{TAG}-{TAG}-manylinux_2_28_x86_64.whl#sha256=0">torch</a>'


@pytest.fixture(autouse=True)
def _x86_64_and_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JENGA_TORCH_INDEX", raising=False)
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")


def unreachable(url: str) -> str:
    raise OSError(f"no route to {url}")


def test_torch_comes_from_pytorchs_index_when_it_answers() -> None:
    assert install.torch_index("2.13.0", lambda url: PAGE)[0] == install.TORCH_CPU_INDEX


@pytest.mark.parametrize(
    "page",
    [
        PAGE.replace("2.13.0", "2.13.1"),
        PAGE.replace("%2Bcpu", "%2Bcu130"),
        PAGE.replace(TAG, "cp310"),
        PAGE.replace("x86_64", "aarch64"),
        "<html>please log in to this network</html>",
    ],
)
def test_an_index_without_the_right_build_is_not_used(page: str) -> None:
    index, why = install.torch_index("2.13.0", lambda url: page)
    assert index is None
    assert "no CPU build" in why


def test_an_unreachable_index_is_not_used() -> None:
    index, why = install.torch_index("2.13.0", unreachable)
    assert index is None
    assert "does not answer" in why


def test_a_hanging_index_costs_only_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:

    release = threading.Event()
    monkeypatch.setattr(install, "PROBE_SECONDS", 0.05)

    def hang(url: str) -> str:
        release.wait(30)
        return PAGE

    assert install.torch_index("2.13.0", hang)[0] is None
    release.set()


@pytest.mark.parametrize(("setting", "index"), [("none", None), ("file:///wheels", "file:///wheels")])
def test_the_setting_goes_before_the_probe(monkeypatch: pytest.MonkeyPatch, setting: str, index: str | None) -> None:
    monkeypatch.setenv("JENGA_TORCH_INDEX", setting)
    assert install.torch_index("2.13.0", lambda url: PAGE)[0] == index


def test_excluded_packages_are_refused_with_a_remedy() -> None:
    install.refuse_bad_neighbours({"torch": "2.13.0+cpu", "numpy": "2.3.5"})
    with pytest.raises(install.InstallError, match="pip uninstall torchvision"):
        install.refuse_bad_neighbours({"torch": "2.13.0+cpu", "torchvision": "0.28.0"})


def test_the_gpu_flavour_refuses_the_cpu_build() -> None:
    install.refuse_cpu_build({"torch": "2.13.0"})
    with pytest.raises(install.InstallError, match=r"gave 2\.13\.0\+cpu"):
        install.refuse_cpu_build({"torch": "2.13.0+cpu"})


def test_the_locked_torch_is_read() -> None:
    assert install.locked_torch(install.lock_of("cpu").read_text()) == "2.13.0"
    with pytest.raises(install.InstallError, match="make lock"):
        install.locked_torch("numpy==2.3.5\n")


def test_fingerprint_follows_lock_and_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    (tmp_path / "requirements").mkdir()
    files = [tmp_path / "requirements/cpu.txt", tmp_path / "requirements/gpu.txt", tmp_path / "pyproject.toml"]
    for file in files:
        file.write_text("a")
    cpu, gpu = install.fingerprint("cpu"), install.fingerprint("gpu")
    assert cpu != gpu
    assert install.fingerprint("cpu") == cpu
    files[0].write_text("b")
    assert install.fingerprint("cpu") != cpu
    assert install.fingerprint("gpu") == gpu
    files[2].write_text("b")
    assert install.fingerprint("gpu") != gpu


def test_another_folder_is_not_taken_for_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "VENV", tmp_path)
    (tmp_path / "precious").touch()
    with pytest.raises(install.InstallError, match="no virtual environment"):
        install.reason_to_recreate("cpu")


def make_distribution(site: Path, name: str, body: str, recorded: int) -> None:
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (site / f"{name}.py").write_text(body)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "RECORD").write_text(f"{name}.py,,{recorded}\n{metadata.name}/METADATA,,\n{metadata.name}/RECORD,,\n")


def test_inspection_finds_what_a_kill_cut_short(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    (site,) = (tmp_path / "env/lib").glob("python3*/site-packages")
    make_distribution(site, "whole", "x = 1\n", 6)
    make_distribution(site, "Cut_Short", "x =", 6)
    make_distribution(site, "missing", "", 0)
    (site / "missing.py").unlink()
    make_distribution(site, "unrecorded", "", 0)
    (site / "unrecorded-1.0.dist-info/RECORD").unlink()
    make_distribution(site, "scriptless", "", 0)
    (site / "scriptless-1.0.dist-info/entry_points.txt").write_text("[console_scripts]\nscriptless = scriptless:x\n")

    command = [str(python), "-I", str(ROOT / "scripts/inspect_venv.py")]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["versions"] == dict.fromkeys(["whole", "cut-short", "missing", "unrecorded", "scriptless"], "1.0")
    assert set(report["damaged"]) == {"cut-short", "missing", "unrecorded", "scriptless"}
    assert report["damaged"]["missing"] == str(site / "missing-1.0.dist-info")
