"""What becomes of long streams when their replica is to stop: two engines with streams of minutes, one case at a time.

python -m benchmarks.stopping [--case NAME] [--streams 40]    6 minutes a case
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console

from benchmarks import demo
from benchmarks.demo import MODEL
from deployments.config import load
from deployments.local.api import ServeApi
from deployments.local.record import Record

TOKENS = 3900
ENGINE = {"max_model_len": 4096, "max_num_seqs": 32, "kv_memory": "96MiB"}
SETTLE_S, GIVE_UP_S = 5.0, 900.0


@dataclass(frozen=True)
class Case:
    """A change under streams, of the number of replicas or of the engine, and the time that streams are allowed."""

    replicas: int = 2
    engine: dict[str, Any] = field(default_factory=dict)
    request_s: float = 600.0


CASES = {
    "fewer replicas": Case(replicas=1),
    "new configuration": Case(engine={"max_num_seqs": 31}),
    "longer than limits.request_s": Case(replicas=1, request_s=45.0),
}


@dataclass
class Stream:
    """One streamed answer."""

    begin: float
    events: int = 0
    end: float = 0.0
    verdict: str = ""
    """``whole``, or the code of the error event, or ``silent``."""

    async def read(self, http: httpx.AsyncClient, number: int) -> None:
        """Ask, and read to the end."""
        body = {"model": MODEL, "prompt": f"{number} " * 20, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        self.verdict = "silent"
        async with http.stream("POST", "/v1/completions", json=body) as got:
            async for line in got.aiter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    self.verdict = "whole"
                elif data != line and "error" in (event := json.loads(data)):
                    self.verdict = event["error"]["code"]
                self.events += data != line
        self.end = time.monotonic()


def deploy(record: Record, folder: Path, case: Case) -> None:
    """Hand the change to Ray Serve: another engine as `jenga up --no-restart` does, other numbers as its autoscaler."""
    file = folder / "serving.yaml"
    data = yaml.safe_load(file.read_text())
    data["applications"][0]["args"]["engine"] |= case.engine
    file.write_text(yaml.safe_dump(data))
    config = load(file).to_ray()
    if case.replicas != 2:
        # Not in `args`, for which Serve replaces every replica.
        config["applications"][0]["deployments"] = [{"name": f"Engine:{MODEL}", "num_replicas": case.replicas}]
    ServeApi(record.dashboard_url).deploy(config)


def engines(record: Record) -> dict[str, str]:
    """States of the engines' replicas."""
    state = ServeApi(record.dashboard_url).state(record.application)
    return {each.id: each.state for each in state.replicas if each.deployment.startswith("Engine:")}


async def run(record: Record, folder: Path, case: Case, streams: int) -> dict[str, Any]:
    """Streams, the change, until all is as it should be; and when the old replicas were seen last."""
    old = set(engines(record))
    staying = 0 if case.engine else case.replicas
    async with httpx.AsyncClient(base_url=record.url, timeout=GIVE_UP_S, trust_env=False) as http:
        asked = [Stream(time.monotonic()) for _ in range(streams)]
        reading = asyncio.gather(*(stream.read(http, number) for number, stream in enumerate(asked)))
        while not all(stream.events for stream in asked):
            await asyncio.sleep(0.1)
        await asyncio.sleep(SETTLE_S)
        begin = time.monotonic()
        await asyncio.to_thread(deploy, record, folder, case)
        seen: dict[str, float] = {}
        while time.monotonic() - begin < GIVE_UP_S:
            now = await asyncio.to_thread(engines, record)
            seen |= {replica: time.monotonic() - begin for replica in old & now.keys()}
            if reading.done() and len(old & now.keys()) == staying and [*now.values()] == ["RUNNING"] * case.replicas:
                break
            await asyncio.sleep(0.5)
        full = time.monotonic() - begin
        await reading
    lasted = [stream.end - stream.begin for stream in asked]
    return {
        "streams": dict(Counter(stream.verdict for stream in asked)),
        "tokens": dict(Counter(stream.events - 1 for stream in asked if stream.verdict == "whole")),
        "lasted_s": [round(min(lasted), 1), round(max(lasted), 1)],
        "last_ended_after_s": round(max(stream.end for stream in asked) - begin, 1),
        "old_replicas_gone_after_s": sorted(round(each, 1) for each in seen.values())[: len(old) - staying],
        "as_it_should_be_after_s": round(full, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--streams", type=int, default=40)
    options = parser.parse_args()
    console, good = Console(stderr=True), True
    for name in options.case or CASES:
        case = CASES[name]
        with tempfile.TemporaryDirectory(prefix="stopping-") as made:
            folder = Path(made)
            try:
                record = demo.serve(folder, console, ENGINE, replicas=2, limits={"request_s": case.request_s})
                result = asyncio.run(run(record, folder, case, options.streams))
            finally:
                demo.stop(folder)
        print(json.dumps({"case": name, "request_s": case.request_s} | result), flush=True)
        expected = "whole" if result["lasted_s"][1] < case.request_s else "request_timeout"
        good &= result["streams"].keys() == {expected}
        good &= max(result["old_replicas_gone_after_s"]) < case.request_s + 30
    sys.exit(not good)


if __name__ == "__main__":
    main()
