"""The commands that README.md names exist and answer."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | environment)


def jenga(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(Path(sys.executable).with_name("jenga"), *arguments)


def test_help() -> None:
    result = jenga("--help")
    assert result.returncode == 0, result.stderr
    for command in ("demo-model", "serve", "stop", "status", "version"):
        assert re.search(rf"\b{command}\b", result.stdout), command


def test_version_names_what_is_installed() -> None:
    result = jenga("version")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in ("jenga-serve", "ray", "torch"):
        assert f"{name} {version(name)}" in lines


def test_unknown_command_is_an_error_without_a_traceback() -> None:
    result = jenga("no-such-command")
    assert result.returncode != 0
    assert "no-such-command" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_documented_make_targets_exist(page: str) -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / page).read_text(), re.MULTILINE))
    assert named
    assert named <= set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


def test_ci_runs_the_documented_test_command_and_nothing_else() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "exec make test"
    assert [line.split()[0] for line in lines[:-1]] == ["set", "cd"]
    assert "make test" in (ROOT / "README.md").read_text()


def test_python_too_old_is_told_with_a_remedy(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    result = run("sh", "scripts/find-python.sh", PYTHON=str(old))
    assert result.returncode == 1
    assert f"{old}: 3.9" in result.stderr
    assert "Remedy" in result.stderr


def test_own_python_is_taken() -> None:
    result = run("sh", "scripts/find-python.sh", PYTHON=sys.executable)
    assert (result.returncode, result.stdout.strip()) == (0, sys.executable)
