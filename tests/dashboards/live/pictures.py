"""Pictures of the dashboards: Grafana's published panel components on data of a real Prometheus, in Chromium.

No Grafana server takes part; heat maps are drawn by `web/app.tsx` itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from PIL import Image

from dashboards.build import GENERATED
from tests.dashboards.live.services import Serving

WEB = Path(__file__).parent / "web"
MOST_BYTES = 150_000
# As in web/app.tsx.
_CELL_WIDTH, _CELL_HEIGHT = 58, 30
_STEP_S = 5
_HTML = """<!doctype html><meta charset=utf-8><link rel=stylesheet href='{style}'>
<style>*{{box-sizing:border-box}} body{{margin:0;font:14px Inter,Roboto,sans-serif}}</style>
<div id=root></div><script>window.PAGE={data}</script><script src='{code}'></script>"""
_CODE = ("package.json", "package-lock.json", "app.tsx")


def collect(served: Serving, folder: Path, minutes: float) -> None:
    """Write one JSON per dashboard: its panels, each with what Prometheus answers to its queries."""
    end = int(time.time()) // _STEP_S * _STEP_S
    start = end - int(60 * minutes)
    replicas = sorted(served.value("ray_jenga_buffer_bytes"))
    for file in sorted(GENERATED.glob("*.json")):
        panels = []
        for panel in _spread(json.loads(file.read_text())["panels"], replicas):
            values = panel.pop("values")
            panel["title"] = panel["title"].replace("$replica", values.get("replica", ""))
            asked = [_query(target["expr"], values) for target in panel.get("targets", ())]
            panel["found"] = [{"query": query, "start": start, "end": end, "step": _STEP_S} for query in asked]
            panels.append(panel)
        answers = iter(served.ask("query_range", [question for panel in panels for question in panel["found"]]))
        for panel in panels:
            panel["found"] = [next(answers) for _ in panel["found"]]
        (folder / file.name).write_text(json.dumps({"panels": panels, "start": start, "end": end}))


def _spread(panels: list[dict[str, Any]], replicas: list[str]) -> list[dict[str, Any]]:
    """Panels as Grafana lays them out: those that repeat once for each replica, side by side."""
    spread = []
    for panel in panels:
        if panel.get("repeat") != "replica":
            spread.append({**panel, "values": {}})
            continue
        box = panel["gridPos"]
        width = 24 // len(replicas)
        for number, replica in enumerate(replicas):
            place = {**box, "x": number * width, "w": width}
            spread.append({**panel, "gridPos": place, "values": {"replica": replica}})
    return spread


def _query(expr: str, values: dict[str, str]) -> str:
    expr = expr.replace("$__rate_interval", "1m")
    return re.sub(r"\$(\w+)", lambda name: values.get(name[1], ".*"), expr)


def draw(folder: Path) -> list[Path]:
    """A picture for each JSON that `collect` wrote; every panel must be drawn."""
    bundle = _bundle()
    pictures = []
    for file in sorted(folder.glob("*.json")):
        page = json.loads(file.read_text())
        bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in page["panels"])
        data = json.dumps(page).replace("</", "<\\/")
        html = file.with_suffix(".html")
        html.write_text(_HTML.format(data=data, style=bundle.with_suffix(".css"), code=bundle))
        picture = file.with_suffix(".png")
        size = f"--window-size={24 * _CELL_WIDTH},{bottom * _CELL_HEIGHT + 8}"
        _chromium(html, size, f"--screenshot={picture}")
        document = _chromium(html, size, "--dump-dom")
        title = re.search(r"<title>(.*?)</title>", document)
        assert title is None, title
        drawn = document.count('class="panel-drawn"')
        empty = document.count('class="panel-empty"')
        assert drawn + empty == sum(panel["type"] != "row" for panel in page["panels"]), document[:2000]
        print(f"{picture.name}: {drawn} panels drawn, {empty} without data")
        pictures.append(picture)
    return pictures


def _bundle() -> Path:
    """web/app.tsx with all that it imports, in one file."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jenga" / "grafana-panels"
    folder.mkdir(parents=True, exist_ok=True)
    for name in _CODE:
        shutil.copy(WEB / name, folder)
    if not (folder / "node_modules").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, check=True)
    options = ["--bundle", "--outfile=app.js", "--define:process.env.NODE_ENV='production'", "--loader:.svg=dataurl"]
    options += ["--loader:.ttf=dataurl"]
    subprocess.run(
        ["node_modules/.bin/esbuild", "app.tsx", *options, "--minify", "--log-level=error"], cwd=folder, check=True
    )
    return folder / "app.js"


def _chromium(html: Path, *options: str) -> str:
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--log-level=3"]
    command += ["--virtual-time-budget=5000", f"--user-data-dir={html.parent / 'chromium'}", *options, f"file://{html}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def keep(pictures: list[Path], folder: Path) -> None:
    """Store the pictures with few colours, each below MOST_BYTES."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        target = folder / picture.name
        with Image.open(picture) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
        assert target.stat().st_size < MOST_BYTES, target
