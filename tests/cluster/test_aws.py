"""cluster/aws.yaml through the whole of `ray up` and `ray down`, against a fake AWS: see aws_run.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.aws_run import ME, ROOT


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("aws")
    result = subprocess.run(
        [sys.executable, "-m", "tests.cluster.aws_run", str(home)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == 0, (result.stdout[-3000:], result.stderr[-3000:])
    found: dict[str, Any] = json.loads((home / "told.json").read_text())
    return found


def test_the_head_is_one_small_machine_behind_the_closed_group(told: dict[str, Any]) -> None:
    (head,) = told["instances"]
    assert head["InstanceType"] == "m7i.xlarge"
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert (tags["ray-cluster-name"], tags["ray-node-type"]) == ("jenga", "head")
    assert [group["GroupName"] for group in head["SecurityGroups"]] == ["jenga"]
    # Ray made no group of its own, whose port 22 would be open to the world.
    assert not [group for group in told["groups"] if group["GroupName"].startswith("ray-autoscaler")]
    (mine,) = (group for group in told["groups"] if group["GroupName"] == "jenga")
    assert [item["CidrIp"] for rule in mine["IpPermissions"] for item in rule.get("IpRanges", [])] == [ME]


def test_the_head_is_set_up_by_the_file_and_by_nothing_else(told: dict[str, Any]) -> None:
    """Every command reaches the head, in its order; none of Ray's defaults does."""
    raw = told["raw"]
    wanted = raw["setup_commands"] + raw["head_setup_commands"] + raw["head_start_ray_commands"]
    # Ray puts variables before each command, and quotes all of it for the shell on the other side.
    bare = [command.replace("'\"'\"'", "'") for command in told["commands"]]
    places = [next(i for i, sent in enumerate(bare) if command.strip() in sent) for command in wanted]
    assert places == sorted(places)
    together = "\n".join(bare)
    for absent in ("ray-wheels", "nightly", "pip install", "--dashboard-host=0.0.0.0", "anaconda", "$RAY_HEAD_IP"):
        assert absent not in together
    for present in ("make install FLAVOUR=gpu", "--num-cpus=0", "--dashboard-host=127.0.0.1", "RAY_AUTH_MODE=token"):
        assert present in together


def test_project_serving_configuration_and_token_are_copied(told: dict[str, Any]) -> None:
    copied = {Path(source).name for source, _ in told["copies"]}
    assert {"serving.yaml", "auth_token", "requirements", "jenga", "deployments", "pyproject.toml"} <= copied
    assert not {".venv", ".git", "var", "tests"} & copied


def test_every_node_type_is_accepted_and_spot_is_spot(told: dict[str, Any]) -> None:
    assert set(told["workers"]) == {"head", "l40s", "l40s-spot", "h100"}
    for name, machine in told["workers"].items():
        assert (machine.get("InstanceLifecycle") == "spot") == name.endswith("-spot")
        assert [group["GroupName"] for group in machine["SecurityGroups"]] == ["jenga"]


def test_down_ends_every_machine(told: dict[str, Any]) -> None:
    assert told["left"] == []


def test_the_policy_allows_what_is_called_and_no_more(told: dict[str, Any]) -> None:
    """cluster/aws-iam.json, which docs/cluster.md gives to the user."""
    rules = json.loads((ROOT / "cluster/aws-iam.json").read_text())["Statement"]
    allowed = {
        action: rule["Resource"]
        for rule in rules
        for action in ([rule["Action"]] if isinstance(rule["Action"], str) else rule["Action"])
    }
    called = {operation for operation, _ in told["calls"]}
    # To hand the role to a machine is a permission, but no call; the rest docs/cluster.md has the user do by hand.
    by_hand = {"ssm:GetParameter", "servicequotas:GetServiceQuota", "servicequotas:RequestServiceQuotaIncrease"}
    assert allowed.keys() == called | {"iam:PassRole"} | by_hand
    commands = (ROOT / "docs/cluster.md").read_text()
    for name in ("ssm get-parameter", "service-quotas get-service-quota", "service-quotas request-service-quota-incr"):
        assert f"aws {name}" in commands
    for operation, arguments in told["calls"]:
        names = [value for key, value in arguments.items() if key in ("RoleName", "InstanceProfileName")]
        for name in names:
            assert any(resource.endswith(f"/{name}") for resource in allowed[operation]), (operation, name)
