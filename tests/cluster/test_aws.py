"""cluster/aws.yaml through the whole of `ray up`, against a fake AWS (moto); what nodes are told is only recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from click.testing import CliRunner
from moto import mock_aws
from ray.autoscaler._private import command_runner
from ray.scripts.scripts import down, up

from deployments.cluster import checks

ROOT = Path(__file__).resolve().parents[2]
ME = "198.51.100.7/32"


@dataclass
class Cloud:
    """The fake account after `ray up`, and what was sent to the head."""

    file: Path
    output: str
    commands: list[str] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ec2(self) -> Any:
        return boto3.client("ec2", region_name="us-west-2")

    def instances(self, *states: str) -> list[dict[str, Any]]:
        found = self.ec2.describe_instances()["Reservations"]
        all_of_them = [instance for reservation in found for instance in reservation["Instances"]]
        return [instance for instance in all_of_them if instance["State"]["Name"] in states]


def security_group(ec2: Any) -> str:
    """The group that docs/cluster.md makes: SSH from one address, and everything among members."""
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group: str = ec2.create_security_group(GroupName="jenga", Description="jenga", VpcId=vpc)["GroupId"]
    ec2.authorize_security_group_ingress(GroupId=group, IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp=ME)
    members = [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}]
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=members)
    return group


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    home = tmp_path_factory.mktemp("aws")
    (home / ".ssh").mkdir()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0" * 64)
    account = {
        "AWS_ACCESS_KEY_ID": "t",
        "AWS_SECRET_ACCESS_KEY": "t",
        "AWS_DEFAULT_REGION": "us-west-2",
        "HOME": str(home),
        "RAY_TMPDIR": str(home),
        "RAY_UP_enable_autoscaler_v2": "1",
    }
    cloud = Cloud(home / "aws.yaml", "")

    def recorded(self: Any, final_cmd: list[str], with_output: bool = False, **_: Any) -> Any:
        cloud.commands.append(final_cmd[-1])
        return b"" if with_output else 0

    with pytest.MonkeyPatch.context() as patch, mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        for name, value in account.items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        patch.setattr(command_runner.SSHCommandRunner, "_run_helper", recorded)
        patch.setattr(
            command_runner.SSHCommandRunner,
            "run_rsync_up",
            lambda self, source, target, options=None: cloud.copies.append((source, target)),
        )
        image = cloud.ec2.describe_images()["Images"][0]["ImageId"]
        text = (ROOT / "cluster/aws.yaml").read_text().replace("EDIT_ami-...", image)
        cloud.file.write_text(text.replace("EDIT_sg-...", security_group(cloud.ec2)))
        result = CliRunner().invoke(up, [str(cloud.file), "--no-config-cache", "--yes"])
        cloud.output = result.output
        assert result.exit_code == 0, (result.output[-3000:], result.exception)
        yield cloud


def test_the_file_with_its_edits_passes_our_checks(cloud: Cloud) -> None:
    checks.check_this_machine(checks.check(cloud.file))


def test_the_head_is_one_small_machine_behind_the_closed_group(cloud: Cloud) -> None:
    (head,) = cloud.instances("running", "pending")
    assert head["InstanceType"] == "m7i.xlarge"
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert (tags["ray-cluster-name"], tags["ray-node-type"]) == ("jenga", "head")
    assert [group["GroupName"] for group in head["SecurityGroups"]] == ["jenga"]
    # Ray made no group of its own, whose port 22 would be open to the world.
    groups = cloud.ec2.describe_security_groups()["SecurityGroups"]
    assert not [group["GroupName"] for group in groups if group["GroupName"].startswith("ray-autoscaler")]
    (mine,) = (group for group in groups if group["GroupName"] == "jenga")
    sources = [item["CidrIp"] for rule in mine["IpPermissions"] for item in rule.get("IpRanges", [])]
    assert sources == [ME]


def test_the_head_is_set_up_by_pins_and_serves_nothing_itself(cloud: Cloud) -> None:
    """Every command of the file reaches the head, in its order; none of Ray's defaults does."""
    raw = yaml.safe_load(cloud.file.read_text())
    wanted = raw["setup_commands"] + raw["head_setup_commands"] + raw["head_start_ray_commands"]
    # Ray puts variables before each command, and quotes all of it for the shell on the other side.
    bare = [command.replace("'\"'\"'", "'") for command in cloud.commands]
    places = [next(i for i, sent in enumerate(bare) if command.strip() in sent) for command in wanted]
    assert places == sorted(places)
    together = "\n".join(bare)
    for absent in ("ray-wheels", "nightly", "pip install", "--dashboard-host=0.0.0.0", "anaconda"):
        assert absent not in together
    for present in ("make install FLAVOUR=gpu", "--num-cpus=0", "--dashboard-host=127.0.0.1", "RAY_AUTH_MODE=token"):
        assert present in together
    assert not [command for command in bare if "worker" in command and "ray start" in command]


def test_project_serving_configuration_and_token_are_copied(cloud: Cloud) -> None:
    copied = {Path(source).name for source, _ in cloud.copies}
    assert {"serving.yaml", "auth_token", "requirements", "jenga", "deployments", "pyproject.toml"} <= copied
    assert not {".venv", ".git", "var", "tests"} & copied


def test_workers_are_what_the_file_says(cloud: Cloud) -> None:
    """What the autoscaler on the head would ask AWS for, accepted by AWS' own parameter check."""
    prepared = checks.check(cloud.file).prepared
    for name in ("l40s", "l40s-spot", "h100"):
        node = dict(prepared["available_node_types"][name]["node_config"])
        answer = cloud.ec2.run_instances(MinCount=1, MaxCount=1, **node)
        (worker,) = answer["Instances"]
        assert (worker.get("InstanceLifecycle") == "spot") == (name == "l40s-spot")
        cloud.ec2.terminate_instances(InstanceIds=[worker["InstanceId"]])
    assert json.dumps(prepared["available_node_types"]["l40s"]["resources"]) == '{"CPU": 8, "GPU": 1}'


def test_down_ends_every_machine(cloud: Cloud) -> None:
    result = CliRunner().invoke(down, [str(cloud.file), "--yes"])
    assert result.exit_code == 0, (result.output[-2000:], result.exception)
    assert not cloud.instances("running", "pending", "stopping", "stopped")
