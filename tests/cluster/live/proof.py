"""A cluster for real: `jenga up` of a head and two workers over SSH, the demo application, answers from outside.

`make test-cluster` runs it; conftest.py says what is replaced.
"""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest
import yaml

from jenga.demo import recall
from tests.cluster.live.lab import HEAD, MODEL, Lab, jenga

WORKERS = 2


def test_the_start_says_what_runs_where(lab: Lab, cluster: dict[str, Any]) -> None:
    for shown in (
        "is right",
        "serving gemma3-recall",
        HEAD,
        *lab.workers,
        f"http://{HEAD}:8000/v1",
        "jenga down",
        "ssh -i",
    ):
        assert shown in cluster["output"], shown


def test_engines_run_on_the_workers_and_not_on_the_head(lab: Lab, cluster: dict[str, Any]) -> None:
    result = jenga(lab, "status", str(cluster["cluster"]), "--json")
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads(result.stdout)
    assert told["application"] == "RUNNING"
    assert told["warnings"] == []
    nodes = {node["address"]: node for node in told["nodes"]}
    assert {address for address, node in nodes.items() if node["state"] == "ALIVE"} == {HEAD, *lab.workers}
    assert nodes[HEAD]["head"]
    assert "CPU" not in nodes[HEAD]["resources"]
    engines = [replica["node"] for replica in told["replicas"] if replica["deployment"].startswith("Engine:")]
    assert sorted(engines) == lab.workers
    shown = jenga(lab, "status", str(cluster["cluster"]))
    assert shown.returncode == 0
    assert "warning" not in shown.stdout
    assert HEAD in shown.stdout


def test_answers_come_from_outside_through_the_head(cluster: dict[str, Any]) -> None:
    client = openai.OpenAI(
        base_url=f"http://{HEAD}:8000/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
    )
    right = 0
    for seed in range(12):
        question = recall.question(seed, 16)
        answer = client.chat.completions.create(model=MODEL, messages=question.messages, max_tokens=4, temperature=0)
        right += (answer.choices[0].message.content or "").strip() == question.answer
    assert right == 12
    cached = 0
    for _ in range(2):
        question = recall.question(99, 40)
        answer = client.chat.completions.create(model=MODEL, messages=question.messages, max_tokens=4, temperature=0)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached = answer.usage.prompt_tokens_details.cached_tokens or 0
    assert cached > 0


def test_replicas_go_on_writing_their_logs(lab: Lab, cluster: dict[str, Any]) -> None:
    """Also behind what vLLM does to logging at its start."""
    for host, deployment, said in (("head", "Ingress", "/v1/chat/completions"), ("worker-1", "Engine", "CALL chat")):
        read = f"cat /tmp/ray/session_latest/logs/serve/replica_jenga_{deployment}*.log"
        end = time.monotonic() + 20
        while said not in (found := lab.ssh(host, read).stdout):
            assert time.monotonic() < end, (host, found[-2000:])
            time.sleep(1)


def test_only_rest_and_rays_own_ports_listen_beyond_the_loopback_of_the_head(lab: Lab, cluster: dict[str, Any]) -> None:
    """Ray's dashboard, Prometheus and Grafana do not; what does is for the private network."""
    for port in (8265, 9090, 3000):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{HEAD}:{port}", trust_env=False)
    listening = lab.ssh("head", "ss -Hltn | awk '{print $4}'").stdout.split()
    assert "127.0.0.1:8265" in listening


def test_prometheus_on_the_head_scrapes_every_node(lab: Lab, cluster: dict[str, Any]) -> None:
    said = lab.ssh("head", "cat ~/monitoring/prometheus.log; curl -s http://127.0.0.1:9090/-/ready").stdout
    assert "Ready" in said, said
    query = "curl -s --data-urlencode 'query=count(up{job=\"ray\"} == 1)' http://127.0.0.1:9090/api/v1/query"
    end = time.monotonic() + 60
    while True:
        found = json.loads(lab.ssh("head", query).stdout)["data"]["result"]
        if found and float(found[0]["value"][1]) >= 3:
            return
        assert time.monotonic() < end, found
        time.sleep(2)


def test_another_file_may_not_take_the_name(lab: Lab, cluster: dict[str, Any]) -> None:
    other = lab.folder / "other.yaml"
    other.write_text(cluster["cluster"].read_text())
    result = jenga(lab, "up", str(other))
    assert result.returncode == 1
    assert "runs already" in result.stderr


def test_a_changed_serving_configuration_is_rolled_out_without_a_restart(lab: Lab, cluster: dict[str, Any]) -> None:
    """Another name of the model and one replica: Ray stays the one that it was."""
    session = "readlink /tmp/ray/session_latest"
    before = lab.ssh("head", session).stdout
    serving = yaml.safe_load(cluster["serving"].read_text())
    serving["applications"][0]["args"] |= {"replicas": 1}
    serving["applications"][0]["args"]["model"]["id"] = "renamed"
    cluster["serving"].write_text(yaml.safe_dump(serving))
    result = jenga(lab, "up", str(cluster["cluster"]), "--no-restart", "--wait", "400")
    print(result.stdout, result.stderr)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "serving renamed" in result.stdout
    assert "is right" in result.stdout
    assert lab.ssh("head", session).stdout == before
    models = httpx.get(f"http://{HEAD}:8000/v1/models", trust_env=False).json()["data"]
    assert [item["id"] for item in models] == ["renamed"]


def test_down_leaves_nothing(lab: Lab, cluster: dict[str, Any]) -> None:
    result = jenga(lab, "down", str(cluster["cluster"]))
    print(result.stdout, result.stderr)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in lab.hosts:
        left = lab.ssh(name, "pgrep -a 'raylet|gcs_server|prometheus|grafana|EngineCore|ray::'").stdout
        assert not left, (name, left)
    result = jenga(lab, "status", str(cluster["cluster"]))
    assert result.returncode == 1
    assert "no cluster 'jenga-lab' runs" in result.stderr
