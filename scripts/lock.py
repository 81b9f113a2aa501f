"""Writes requirements/<flavour>.txt: every package pinned, for Python 3.11 to 3.13, with uv's resolver.

The rules (what to leave out, what torch's CPU build needs) stand in pyproject.toml under [tool.uv].
They are the CPU flavour's; the GPU flavour is resolved without them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = "uv>=0.13,<0.14"
FLAVOURS = {"cpu": (), "gpu": ("--no-config",)}


def resolver(folder: Path) -> tuple[Path, dict[str, str]]:
    """uv, installed into a folder with the user's pip, and the environment that gives it pip's index."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin/python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV], check=True)
    index = subprocess.run(
        [python, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return folder / "bin/uv", os.environ | ({"UV_DEFAULT_INDEX": index} if index else {})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Pin the packages of every flavour.")
    parser.add_argument("--upgrade", action="store_true", help="take newer versions where allowed")
    upgrade = ["--upgrade"] if parser.parse_args().upgrade else []
    with tempfile.TemporaryDirectory() as folder:
        uv, environment = resolver(Path(folder))
        for flavour, options in FLAVOURS.items():
            output = f"requirements/{flavour}.txt"
            command = ["pip", "compile", "pyproject.toml", "--extra", flavour, "--extra", "dev", "--universal"]
            command += ["--python-version", "3.11", "--custom-compile-command", "make lock", "--quiet"]
            command += [*options, *upgrade, "--output-file", output]
            result = subprocess.run([uv, *command], cwd=ROOT, env=environment, check=False)
            if result.returncode:
                sys.exit(f"error: no set of versions for {flavour} satisfies pyproject.toml (see above)")
            pins = sum("==" in line for line in (ROOT / output).read_text().splitlines())
            print(f"{output}: {pins} pins")


if __name__ == "__main__":
    main()
