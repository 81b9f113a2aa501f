"""Run inside namespaces of its own: `vllm serve` on a model folder, a few requests, and what /metrics then says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

URL = "http://127.0.0.1:8000"
PROMPT = "; ".join(f"a{i % 10}={10 + i % 90}" for i in range(60)) + "; ? a1="


def scrape(client: httpx.Client) -> list[tuple[str, dict[str, str], float]]:
    """All samples of /metrics."""
    families = text_string_to_metric_families(client.get(f"{URL}/metrics").text)
    return [(s.name, s.labels, s.value) for family in families for s in family.samples]


def main(model: str, memory: str, answer: str) -> None:
    """Serve, ask, scrape, write."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "m"),
            *("--host", "127.0.0.1", "--port", "8000", "--enforce-eager", "--dtype", "bfloat16"),
            *("--max-model-len", "1024", "--block-size", "32", "--kv-cache-memory-bytes", memory),
            "--enable-prompt-tokens-details",
        ],
        env=os.environ
        | {"JENGA": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"},
        stdout=sys.stderr,
    )
    with httpx.Client(timeout=120, trust_env=False) as client:
        while True:
            if server.poll() is not None:
                sys.exit(f"the server ended with status {server.returncode}")
            try:
                if client.get(f"{URL}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        requests = []
        for tokens in (3, 2, 40):
            body = {"model": "m", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
            usage = client.post(f"{URL}/v1/completions", json=body).raise_for_status().json()["usage"]
            details = usage["prompt_tokens_details"] or {}
            requests.append((usage["prompt_tokens"], details.get("cached_tokens") or 0))
        # The logger asks every few seconds; the last request must have been counted and let go.
        for _ in range(60):
            found = scrape(client)
            admitted = sum(value for name, _, value in found if name == "jenga_admitted_requests_total")
            live = sum(v for name, labels, v in found if name == "jenga_pages" and labels["state"] == "live")
            if admitted == len(requests) and live == 0:
                break
            time.sleep(0.5)
    Path(answer).write_text(json.dumps({"requests": requests, "metrics": found}))
    server.terminate()
    server.wait(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
