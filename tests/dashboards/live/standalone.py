"""Run inside namespaces of its own: `vllm serve`, Prometheus, load; ends as `dashboards check --standalone` does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import yaml

from tests.dashboards.live.load import MODEL, Load
from tests.dashboards.live.services import JENGA, PROMETHEUS, ROOT

URL = "http://127.0.0.1:8000"
_LOAD_S = 150


def main(folder: Path) -> int:
    """Exit status of the check."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run([JENGA, "dashboards", "build", str(folder), "--standalone"], check=True, stdout=subprocess.DEVNULL)
    scrape = {"job_name": "vllm", "static_configs": [{"targets": [URL.removeprefix("http://")]}]}
    rules = [str(folder / "prometheus" / name) for name in ("recording.yml", "alerts.yml")]
    config = {"global": {"scrape_interval": "5s"}, "rule_files": rules, "scrape_configs": [scrape]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    prometheus = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    subprocess.Popen(
        [*prometheus, f"--web.listen-address={PROMETHEUS.removeprefix('http://')}"], stderr=subprocess.DEVNULL
    )
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--served-model-name", MODEL),
            *("--model", str(ROOT / "var" / "models" / MODEL), "--host", "127.0.0.1", "--port", "8000"),
            *("--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "1024", "--block-size", "32"),
            *("--max-num-seqs", "32", "--kv-cache-memory-bytes", str(5 << 20)),
        ],
        env=os.environ | {"JENGA": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with httpx.Client(trust_env=False) as client:
        while True:
            if server.poll() is not None:
                sys.exit(f"the server ended with status {server.returncode}")
            try:
                if client.get(f"{URL}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
    with Load(URL):
        time.sleep(_LOAD_S)
        command = [JENGA, "dashboards", "check", "--standalone", "--prometheus", PROMETHEUS, "--minutes", "2"]
        return subprocess.run(command, env=os.environ | {"COLUMNS": "200"}, check=False).returncode


if __name__ == "__main__":
    # What is still running ends with the namespace.
    sys.stdout.flush()
    os._exit(main(Path(sys.argv[1])))
