"""`ray up` and `ray down` of cluster/aws.yaml against a fake AWS (moto), in a process of its own.

Writes what it saw as JSON to told.json in its folder.  Nothing leaves this process: in place of ssh and rsync
stand programs that write down what they were told.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ME = "198.51.100.7/32"
# Writes down its arguments: NUL behind all but the last, SOH behind the last.
FAKE = """#!/bin/sh
{{ while [ $# -gt 1 ]; do printf '%s\\000' "$1"; shift; done; printf '%s\\001' "$1"; }} >> {log}
"""


def security_group(ec2: Any) -> str:
    """The group that docs/cluster.md makes: SSH from one address, and everything among members."""
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group: str = ec2.create_security_group(GroupName="jenga", Description="jenga", VpcId=vpc)["GroupId"]
    ec2.authorize_security_group_ingress(GroupId=group, IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp=ME)
    members = [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}]
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=members)
    return group


def instances(ec2: Any) -> list[dict[str, Any]]:
    """Machines that cost money."""
    found = [item for reservation in ec2.describe_instances()["Reservations"] for item in reservation["Instances"]]
    return [item for item in found if item["State"]["Name"] != "terminated"]


def sent(log: Path) -> list[list[str]]:
    """What a fake program was told: the arguments of each call."""
    return [call.split("\0") for call in log.read_text().split("\1") if call]


def main(home: Path) -> None:
    """Everything in one fake account; ``home`` is an empty folder."""
    (home / "bin").mkdir()
    (home / ".ssh").mkdir()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0" * 64)
    for name in ("ssh", "rsync"):
        (home / "bin" / name).write_text(FAKE.format(log=home / name))
        (home / "bin" / name).chmod(0o755)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "t",
        "AWS_SECRET_ACCESS_KEY": "t",
        "AWS_DEFAULT_REGION": "us-west-2",
        "HOME": str(home),
        "RAY_TMPDIR": str(home),
        "RAY_UP_enable_autoscaler_v2": "1",
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
    }
    import boto3
    import botocore.client
    from moto import mock_aws
    from ray.scripts.scripts import down, up

    from deployments.cluster import checks

    calls: list[tuple[str, dict[str, Any]]] = []
    make = botocore.client.BaseClient._make_api_call

    def make_and_note(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        calls.append((f"{client.meta.service_model.service_name}:{operation}", arguments))
        return make(client, operation, arguments)

    botocore.client.BaseClient._make_api_call = make_and_note
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        ec2 = boto3.client("ec2", region_name="us-west-2")
        file = home / "aws.yaml"
        text = (ROOT / "cluster/aws.yaml").read_text()
        text = text.replace("EDIT_ami-...", ec2.describe_images()["Images"][0]["ImageId"])
        file.write_text(text.replace("EDIT_sg-...", security_group(ec2)))
        cluster = checks.check(file)
        checks.check_this_machine(cluster)
        up.main([str(file), "--no-config-cache", "--yes"], standalone_mode=False)
        told: dict[str, Any] = {
            "raw": cluster.raw,
            "instances": instances(ec2),
            "groups": ec2.describe_security_groups()["SecurityGroups"],
            "commands": [call[-1] for call in sent(home / "ssh")],
            "copies": [call[-2:] for call in sent(home / "rsync")],
            "workers": {},
        }
        # What the autoscaler on the head would ask for, as far as AWS' own check of parameters reads it.
        for name, node in cluster.prepared["available_node_types"].items():
            answer = ec2.run_instances(MinCount=1, MaxCount=1, **node["node_config"])["Instances"]
            told["workers"][name] = answer[0]
            ec2.terminate_instances(InstanceIds=[item["InstanceId"] for item in answer])
        down.main([str(file), "--yes"], standalone_mode=False)
        told["calls"] = calls
        told["left"] = [item["State"]["Name"] for item in instances(ec2)]
    (home / "told.json").write_text(json.dumps(told, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
