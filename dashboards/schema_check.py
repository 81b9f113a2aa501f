"""Dashboards against Grafana's own types (`@grafana/schema`), by the TypeScript compiler; needs Node.js and npm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from dashboards.check import CheckError

HERE = Path(__file__).parent / "schema"
_OPTIONS = ("--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler")


def default_folder() -> Path:
    """Where the compiler and the types are kept between checks."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jenga" / "grafana-schema"


def prepare(folder: Path) -> None:
    """Install the compiler and Grafana's types into a folder, as locked; does nothing if they are there.

    Raises:
        CheckError: no npm, or it fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise CheckError("--schema needs Node.js 18 or newer with npm, which is not installed (apt-get install npm)")
    wanted, done_mark = (HERE / "package-lock.json").read_bytes(), folder / "installed"
    if done_mark.exists() and done_mark.read_bytes() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"npm cannot install Grafana's schema (does it reach its registry?):\n{done.stderr.strip()}")
    done_mark.write_bytes(wanted)


def faults(texts: Mapping[str, str], folder: Path) -> list[str]:
    """What the compiler says against dashboards (JSON by name).

    Raises:
        CheckError: the compiler cannot be had.
    """
    prepare(folder)
    shutil.copy(HERE / "dashboard.ts", folder)
    head = "import type { OurDashboard } from './dashboard';\nexport const dashboard: OurDashboard =\n"
    files = []
    for name, text in texts.items():
        files.append(f"{name}.check.ts")
        (folder / files[-1]).write_text(f"{head}{text.strip()};\n")
    try:
        compiler = str(folder / "node_modules" / ".bin" / "tsc")
        done = subprocess.run([compiler, *_OPTIONS, *files], cwd=folder, capture_output=True, text=True, check=False)
    finally:
        for file in files:
            (folder / file).unlink()
    shift = head.count("\n")
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    if done.returncode and not lines:
        raise CheckError(f"the TypeScript compiler failed: {done.stderr.strip()}")
    # Lines of the JSON, not of the file made of it.
    place = re.compile(r"^(.+)\.check\.ts\((\d+),\d+\)")
    return [place.sub(lambda m: f"{m[1]}.json line {int(m[2]) - shift}", line) for line in lines]
