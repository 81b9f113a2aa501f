"""Writes the dashboards, Grafana's provisioning and Prometheus' files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import cache, cluster, memory, requests, rules
from dashboards.source import Source

FOLDER_TITLE, FOLDER_UID = "Jenga", "jenga"
DATASOURCE_NAME, DATASOURCE_UID = "Jenga Prometheus", "jenga-prometheus"
SCHEMA_GRAFANA = (11, 0)
"""Oldest Grafana that the dashboards are for: they are written in the schema of 11.6."""

_PAGES: dict[str, Callable[[Source], Dashboard]] = {
    cluster.UID: cluster.dashboard,
    memory.UID: memory.dashboard,
    cache.UID: cache.dashboard,
    requests.UID: requests.dashboard,
}
_OF_RAY_ALONE = (cluster.UID,)
GENERATED = Path(__file__).parent / "generated"
RULES = Path(__file__).parents[1] / "cluster" / "prometheus"
"""Where the repository keeps the dashboards and the rules for Ray Serve."""


class BuildError(Exception):
    """A folder that cannot be written to; the message is for the user."""


def dashboards(source: Source) -> dict[str, str]:
    """JSON of each dashboard, by uid.

    Raises:
        UnknownMetricError: a panel names a metric that nothing exports.
    """
    return {uid: _json(make(source)) for uid, make in _PAGES.items() if source.ray or uid not in _OF_RAY_ALONE}


def _json(page: Dashboard) -> str:
    data = json.loads(json.dumps(page.build(), cls=JSONEncoder))
    for variable in data["templating"]["list"]:
        # The SDK gives these to every variable; Grafana's schema knows them of none that is used here.
        for name in ("auto", "auto_count", "auto_min"):
            variable.pop(name, None)
    return json.dumps(data, indent=1, sort_keys=True) + "\n"


def datasource(prometheus: str) -> dict[str, Any]:
    """Grafana's description of a Prometheus data source."""
    return {
        "name": DATASOURCE_NAME,
        "uid": DATASOURCE_UID,
        "type": "prometheus",
        "access": "proxy",
        "url": prometheus,
        "jsonData": {"timeInterval": "10s", "httpMethod": "POST"},
    }


def provisioning(folder: Path, prometheus: str) -> dict[str, str]:
    """Files of a Grafana provisioning folder that reads the dashboards in `folder`, by relative path."""
    provider = {
        "name": "jenga",
        "folder": FOLDER_TITLE,
        "folderUid": FOLDER_UID,
        "type": "file",
        "options": {"path": str(folder)},
    }
    return {
        "datasources/jenga.yaml": _yaml({"apiVersion": 1, "datasources": [datasource(prometheus)]}),
        "dashboards/jenga.yaml": _yaml({"apiVersion": 1, "providers": [provider]}),
    }


def rule_files(source: Source) -> dict[str, str]:
    """YAML of Prometheus' rule files, by name."""
    note = "# Made by dashboards/rules.py (jenga dashboards build): do not edit.\n"
    return {name: note + _yaml(content) for name, content in rules.files(source).items()}


def build(folder: Path, source: Source, prometheus: str) -> list[Path]:
    """Write `dashboards/*.json`, `provisioning/` and `prometheus/*.yml` into a folder; returns the files.

    Raises:
        BuildError: the folder cannot be written.
    """
    pages = folder.absolute() / "dashboards"
    files = {pages / f"{uid}.json": text for uid, text in dashboards(source).items()}
    for name, text in provisioning(pages, prometheus).items():
        files[folder.absolute() / "provisioning" / name] = text
    for name, text in rule_files(source).items():
        files[folder.absolute() / "prometheus" / name] = text
    return _write(files)


def build_committed() -> list[Path]:
    """Write what the repository keeps: the dashboards and rules for Ray Serve; returns the files.

    Raises:
        BuildError: this package is not in a checkout of the repository, or it cannot be written.
    """
    if not RULES.is_dir():
        raise BuildError(f"--repository works in a checkout of the repository only; {RULES} does not exist")
    files = {GENERATED / f"{uid}.json": text for uid, text in dashboards(Source()).items()}
    return _write(files | {RULES / name: text for name, text in rule_files(Source()).items()})


def ray_dashboards_folder(session: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the Grafana that Ray sets up looks for dashboards, as Ray 2.60 decides it.

    Raises:
        BuildError: no Ray session wrote its Grafana set-up there.
    """
    root = Path(environment.get("RAY_METRICS_OUTPUT_ROOT") or session / "metrics")
    folder = Path(environment.get("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR") or root / "grafana" / "dashboards")
    if not folder.is_dir():
        raise BuildError(
            f"{folder} does not exist: --ray-session takes the folder of a running Ray head, such as "
            "/tmp/ray/session_latest (Ray writes its Grafana set-up there when it starts)"
        )
    return folder


def build_for_ray(session: Path) -> list[Path]:
    """Write the dashboards beside those of a running Ray session; returns the files.

    Raises:
        BuildError: there is no such session, or it cannot be written to.
    """
    folder = ray_dashboards_folder(session)
    return _write({folder / f"{uid}.json": text for uid, text in dashboards(Source()).items()})


def _write(files: Mapping[Path, str]) -> list[Path]:
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise BuildError(f"cannot write {error.filename}: {error.strerror}") from None
    return list(files)


def _yaml(data: Any) -> str:
    return str(yaml.safe_dump(data, sort_keys=False, width=1_000))
