"""Hosts and the cluster on them, for the modules of this folder.

Only the set-up command that would install the project anew on every host is replaced.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.live.lab import HEAD, MODEL, Lab, jenga

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A head, and as many workers as the module's `WORKERS` says."""
    hosts = Lab(tmp_path_factory.mktemp("lab"))
    try:
        hosts.start(request.module.WORKERS)
        yield hosts
    finally:
        hosts.stop()


@pytest.fixture(scope="module")
def files(lab: Lab) -> dict[str, Path]:
    """cluster/local.yaml and a serving configuration with what a user edits, and the replaced set-up command."""
    serving = yaml.safe_load((ROOT / "cluster/serving.yaml").read_text())
    demo = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    args = demo["applications"][0]["args"]
    args["model"]["path"] = f"~/models/{MODEL}"
    args["engine"] |= {"max_model_len": 512, "max_num_seqs": 16, "kv_memory": "16MiB"}
    serving["applications"][0]["args"] = args
    serving_path = lab.folder / "serving.yaml"
    serving_path.write_text(yaml.safe_dump(serving))

    cluster = yaml.safe_load((ROOT / "cluster/local.yaml").read_text())
    cluster["cluster_name"] = "jenga-lab"
    cluster["provider"] = {"type": "local", "head_ip": HEAD, "worker_ips": lab.workers}
    cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(lab.key)}
    cluster["file_mounts"]["~/jenga-serve/serving.yaml"] = str(serving_path)
    install = "cd ~/jenga-serve && make install FLAVOUR=gpu"
    cluster["min_workers"] = cluster["max_workers"] = len(lab.workers)
    # All hosts share this machine: with one core each, every worker takes one replica.
    starts = cluster["worker_start_ray_commands"]
    starts[-1] = starts[-1].replace("ray start", "ray start --num-cpus=1")
    commands = cluster["setup_commands"]
    commands[commands.index(install)] = (
        # What was copied there runs, not the repository that the environment points to.
        f"ln -sfn {sys.prefix} ~/jenga-serve/.venv && "
        "(grep -q PYTHONPATH ~/.bashrc || echo 'export PYTHONPATH=~/jenga-serve' >> ~/.bashrc)"
    )
    token = lab.folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    cluster["file_mounts"]["~/.ray/auth_token"] = str(token)
    cluster_path = lab.folder / "cluster.yaml"
    cluster_path.write_text(yaml.safe_dump(cluster))
    return {"cluster": cluster_path, "serving": serving_path}


@pytest.fixture(scope="module")
def cluster(lab: Lab, files: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """The files, and what `jenga up` printed."""
    begin = time.monotonic()
    result = jenga(lab, "up", str(files["cluster"]), "--wait", "900")
    print(result.stdout, result.stderr, f"jenga up took {time.monotonic() - begin:.0f} s")
    assert result.returncode == 0, result.stdout + result.stderr
    try:
        yield {"output": result.stdout, **files}
    finally:
        jenga(lab, "down", str(files["cluster"]))
