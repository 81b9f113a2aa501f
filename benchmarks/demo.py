"""The demo model served for a benchmark, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from deployments.local import launch
from deployments.local.ports import free_ports
from deployments.local.record import Record

ROOT = Path(__file__).resolve().parents[1]
MODEL = "gemma3-recall"
_START_S = 500.0


def serve(folder: Path, console: Console, engine: dict[str, Any], **changes: Any) -> Record:
    """Serve configs/demo.yaml on free ports, with settings of the engine and of the application changed.

    `stop` with the same folder ends it.  Raises what `launch.serve` does.
    """
    port, dashboard, metrics = free_ports(3)
    data = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    data["http_options"]["port"] = port
    args = data["applications"][0]["args"]
    args["model"]["path"] = str(ROOT / "var" / "models" / MODEL)
    args["engine"] |= engine
    args |= changes
    file = folder / "serving.yaml"
    file.write_text(yaml.safe_dump(data))
    return launch.serve(file, launch.Options(None, None, dashboard, metrics, True, _START_S), console, folder / "run")


def stop(folder: Path) -> None:
    """End what `serve` started there, if anything runs."""
    launch.stop(folder / "run")
