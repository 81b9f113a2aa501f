"""The shipped cluster files: valid, pinned, closed; and what `jenga up` says of wrong ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import proxy
from deployments.cluster import checks, commands, exposure, remote
from deployments.config import ServeFile, load

ROOT = Path(__file__).resolve().parents[2]
FILES = ("local", "aws", "gcp")


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a shipped file with its placeholders replaced, changed by a function, and gives its path."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("0" * 64)
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id_ed25519").touch(mode=0o600)

    def write(name: str, change: Any = lambda data: None) -> Path:
        text = (ROOT / f"cluster/{name}.yaml").read_text()
        for number, place in enumerate(sorted(set(re.findall(r"EDIT_[\w.-]+", text)), reverse=True)):
            text = text.replace(place, f"10.0.0.{number + 1}")
        data = yaml.safe_load(text)
        change(data)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


@pytest.mark.parametrize("name", FILES)
def test_ray_and_our_checks_accept_the_shipped_files_once_edited(name: str, edited: Any) -> None:
    cluster = checks.check(edited(name))
    assert cluster.provider == name
    types = cluster.prepared["available_node_types"]
    if name != "local":
        workers = {kind: node for kind, node in types.items() if kind != cluster.prepared["head_node_type"]}
        assert any(kind.endswith("-spot") for kind in workers)
        assert all(node["resources"]["GPU"] == 1 for node in workers.values())
        assert types["head"]["resources"] == {"CPU": 0}
    with pytest.raises(checks.ClusterError, match="stands for a value of yours") as told:
        checks.check(ROOT / f"cluster/{name}.yaml")
    written = (ROOT / f"cluster/{name}.yaml").read_text().count("EDIT_")
    assert str(told.value).count("EDIT_") == written, "all of them at once, each once"


@pytest.mark.parametrize("name", FILES)
def test_nothing_listens_for_the_world_and_nothing_is_unpinned(name: str, edited: Any) -> None:
    prepared = checks.check(edited(name)).prepared
    every = [command for key, value in prepared.items() if key.endswith("_commands") for command in value]
    text = "\n".join(every)
    assert "0.0.0.0" not in text
    assert "pip install" not in text
    assert text.count("make install FLAVOUR=gpu") >= 1
    assert text.count("RAY_AUTH_MODE=token") == 2
    assert all(f"{key}={value}" in text for key, value in proxy.ENVIRONMENT.items())
    pins = (ROOT / "requirements/gpu.txt").read_text()
    for package, version in re.findall(r"(Ray|vLLM) ([\d.]+\d)", (ROOT / f"cluster/{name}.yaml").read_text()):
        assert re.search(rf"^{package.lower()}=={re.escape(version)}$", pins, re.MULTILINE), (package, version)


@pytest.mark.parametrize("name", FILES)
def test_a_head_that_starts_again_finds_what_was_copied_unchanged(name: str, edited: Any) -> None:
    """Ray counts every file in there, also those that Python writes, and has all workers start anew for a change."""
    prepared = checks.check(edited(name)).prepared
    (command,) = [each for each in prepared["head_setup_commands"] if "compileall" in each]
    copied = {Path(local).name for local in prepared["file_mounts"].values() if any(Path(local).rglob("*.py"))}
    assert set(command.partition("compileall -q ")[2].split()) == copied


def first_start(data: dict[str, Any]) -> None:
    data["head_start_ray_commands"][1] = "ray start --head"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("aws", lambda d: d.update(max_worker=3), "unknown key 'max_worker'; did you mean 'max_workers'"),
        ("aws", lambda d: d["provider"].update(regoin="x"), "unknown key 'regoin'; did you mean 'region'"),
        ("aws", lambda d: d["provider"].update(type="asw"), "did you mean 'aws'"),
        ("aws", lambda d: d["available_node_types"]["l40s"].update(min_worker=1), "did you mean 'min_workers'"),
        ("aws", lambda d: d["available_node_types"]["l40s"].update(min_workers=9), r"min_workers \(9\) is above"),
        ("aws", lambda d: d.update(head_node_type="nope"), "head_node_type"),
        ("aws", lambda d: d["available_node_types"]["l40s"].update(resources={"GPU": "one"}), "resources"),
        ("aws", lambda d: d.pop("setup_commands"), "setup_commands: is missing"),
        ("gcp", lambda d: d["setup_commands"].append("pip install -U 'ray[default]'"), "nothing pins"),
        ("gcp", lambda d: d["provider"].pop("project_id"), "provider.project_id: is missing"),
        ("local", first_start, "lacks --autoscaling-config"),
        ("local", lambda d: d["provider"].update(worker_ips=[]), "provider.worker_ips: is missing"),
        ("local", lambda d: d["provider"].update(worker_ips=["10.0.0.9", "10.0.0.9"]), "stands twice"),
        ("local", lambda d: d["file_mounts"].update({"~/x": "no/such"}), "there is no no/such"),
        ("local", lambda d: d["file_mounts"].pop(checks.TOKEN), "auth_token is missing"),
        ("local", lambda d: d["file_mounts"].pop(checks.REMOTE_SERVING), "serving.yaml is missing"),
    ],
)
def test_a_wrong_file_is_refused_by_name(name: str, change: Any, said: str, edited: Any) -> None:
    with pytest.raises(checks.ClusterError, match=said):
        checks.check(edited(name, change))


def test_a_replica_that_no_worker_can_hold_is_refused(edited: Any, tmp_path: Path) -> None:
    data = yaml.safe_load((ROOT / "cluster/serving.yaml").read_text())
    data["applications"][0]["args"]["resources"]["tensor_parallel"] = 4
    serving = tmp_path / "serving.yaml"
    serving.write_text(yaml.safe_dump(data))

    def change(cluster: dict[str, Any]) -> None:
        cluster["file_mounts"][checks.REMOTE_SERVING] = str(serving)

    with pytest.raises(checks.ClusterError, match=r"4 GPU\(s\) on one node"):
        checks.check(edited("aws", change))


def test_this_machine_and_the_kind_of_file(edited: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = checks.check(edited("local"))
    monkeypatch.setattr(checks, "_programs", lambda: ())
    checks.check_this_machine(cluster)
    (tmp_path / ".ssh/id_ed25519").chmod(0o644)
    with pytest.raises(checks.ClusterError, match="chmod 600"):
        checks.check_this_machine(cluster)
    (tmp_path / ".ssh/id_ed25519").unlink()
    with pytest.raises(checks.ClusterError, match="ssh-keygen"):
        checks.check_this_machine(cluster)
    monkeypatch.setattr(checks, "version", lambda name: "2.59.0")
    with pytest.raises(checks.ClusterError, match=r"Ray 2\.59\.0 is installed here"):
        checks.check_this_machine(cluster)
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(checks, "_aws_credentials", lambda provider: False)
    with pytest.raises(checks.ClusterError, match="aws configure"):
        checks.check_this_machine(checks.check(edited("aws")))
    for path, said in (
        ("configs/demo.yaml", "serving configuration"),
        ("cluster/none.yaml", "there is no cluster file"),
    ):
        with pytest.raises(checks.ClusterError, match=said):
            checks.check(Path(path))
    with pytest.raises(checks.ClusterError, match="kubectl"):
        checks.check(ROOT / "cluster/kuberay.yaml")


def test_a_name_that_another_file_runs_under_is_refused(edited: Any, tmp_path: Path) -> None:
    cluster = checks.check(edited("local"))
    commands.refuse_taken_name(cluster, tmp_path, exists=lambda _: False)
    with pytest.raises(checks.ClusterError, match="runs already"):
        commands.refuse_taken_name(cluster, tmp_path, exists=lambda _: True)


def test_what_is_reachable_from_the_world_is_named() -> None:
    world, home = "8.8.8.8", "10.0.0.5"
    listeners = [
        exposure.Listener("0.0.0.0", 6379, "gcs_server"),
        exposure.Listener("127.0.0.1", 8265, "python3"),
        exposure.Listener("::", 40001, "raylet"),
        exposure.Listener(home, 8080, "python3"),
        exposure.Listener("0.0.0.0", 8000, "ray::ProxyActor"),
        exposure.Listener("0.0.0.0", 22, "sshd"),
    ]
    assert exposure.exposed(listeners, [home, "127.0.0.1", "fe80::1%eth0"], (8000,)) == []
    assert exposure.exposed(listeners, [home, world], (8000,)) == [f"{world}:40001 (raylet)", f"{world}:6379 (GCS)"]


def test_a_report_survives_a_terminals_noise() -> None:
    report = remote.Report(
        "RUNNING",
        nodes=(remote.Node("10.0.0.1", True, "ALIVE", {"CPU": 2.0}),),
        replicas=(remote.Replica("Ingress", "a", "RUNNING", "10.0.0.1"),),
        exposed=("x",),
    )
    assert remote.Report.from_line(f"\x1b[0m{report.to_line()}\r\n") == report
    assert remote.Report.from_line("Shared connection to 10.0.0.1 closed.") is None


def test_kuberay_serves_a_valid_configuration_of_the_pinned_ray() -> None:
    """The RayService was checked against KubeRay's schema (docs/cluster.md); this holds what that cannot see."""
    service, fetched = yaml.safe_load_all((ROOT / "cluster/kuberay.yaml").read_text())
    serving = ServeFile.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    shipped = load(ROOT / "cluster/serving.yaml")
    assert serving == shipped
    (model,) = (app["args"]["model"] for app in yaml.safe_load(fetched["data"]["serving.yaml"])["applications"])
    assert model["path"] == serving.application.args.model.path
    cluster = service["spec"]["rayClusterConfig"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "requirements/gpu.txt").read_text()
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert proxy.ENVIRONMENT.items() <= {item["name"]: item["value"] for item in head["env"]}.items()
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
