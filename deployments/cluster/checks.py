"""Checks of a cluster file before `ray up`: Ray's own, and what those let through.

`ray up` has no dry run and finds most mistakes only after it has paid for machines.
"""

import contextlib
import difflib
import importlib.util
import io
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from deployments.config import Autoscaling, ConfigError, ServeFile, load, unknown_key_message

# A value with this in it stands for the user's own.
PLACEHOLDER = "EDIT_"
# Where cluster/*.yaml put the project and the serving configuration on every node.
REMOTE_PROJECT = "~/jenga-serve"
REMOTE_SERVING = f"{REMOTE_PROJECT}/serving.yaml"
# What Ray's own ports ask for.
TOKEN = "~/.ray/auth_token"
_ROOT = Path(__file__).resolve().parents[2]
_LOCK = _ROOT / "requirements" / "gpu.txt"

# Ray accepts any key under `provider`; these are the ones that it reads.
_PROVIDER_KEYS = {
    "local": {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
    "aws": {
        "region",
        "availability_zone",
        "cache_stopped_nodes",
        "use_internal_ips",
        "security_group",
        "aws_credentials",
        "cloudwatch",
    },
    "gcp": {"region", "availability_zone", "project_id", "use_internal_ips", "gcp_credentials", "cache_stopped_nodes"},
}
# What would install a Ray of another version than the project's.
_NIGHTLY = re.compile(r"ray-wheels|nightly|\.dev\d|pip3? install[^&|;]*\bray(\[[^]]*\])?(?![\w=.\[-]*==)(?=[\s\"'@]|$)")


class ClusterError(Exception):
    """A cluster file, or a cluster, that cannot be used; the message is for the user."""


@dataclass(frozen=True)
class ClusterFile:
    """A cluster file that has been checked: as written, and as Ray completes it."""

    path: Path
    raw: dict[str, Any]
    prepared: dict[str, Any]
    serving_path: Path
    serving: ServeFile

    @property
    def name(self) -> str:
        """The cluster's name."""
        return str(self.raw["cluster_name"])

    @property
    def provider(self) -> str:
        """local, aws, gcp or another of Ray's."""
        return str(self.raw["provider"]["type"])


def read(path: Path) -> dict[str, Any]:
    """The file as written; raises ClusterError when it is missing or no YAML mapping."""
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
    except FileNotFoundError:
        shipped = sorted(str(item) for item in Path("cluster").glob("*.yaml"))
        hint = f"; there are {', '.join(shipped)}" if shipped else ""
        raise ClusterError(f"there is no cluster file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"the cluster file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ClusterError(f"{path} is not YAML: {error}") from None
    data = documents[0] if documents else None
    if not isinstance(data, Mapping):
        raise ClusterError(f"{path} must hold a mapping with `cluster_name` and `provider`, not {type(data).__name__}")
    if "apiVersion" in data:
        raise ClusterError(f"{path} is for Kubernetes: `kubectl apply -f {path}` (docs/cluster.md)")
    if "applications" in data:
        raise ClusterError(f"{path} is a serving configuration: `jenga serve {path}`, or name it in a cluster file")
    return dict(data)


def check(path: Path) -> ClusterFile:
    """Read and check a cluster file.

    Raises ClusterError that names every fault found, one to a line.
    """
    raw = read(path)
    faults = [*_unknown_keys(raw), *_placeholders(raw)]
    if not faults:
        faults = [*_types(raw), *_provider(raw), *_commands(raw), *_mounts(raw)]
    if faults:
        raise ClusterError("\n  ".join([f"{path}:", *faults]))
    prepared = _prepared(path, raw)
    serving_path = Path(raw["file_mounts"][REMOTE_SERVING]).expanduser()
    try:
        serving = load(serving_path)
    except ConfigError as error:
        raise ClusterError(str(error)) from None
    faults = list(_capacity(prepared, serving, serving_path))
    if faults:
        raise ClusterError("\n  ".join([f"{path}:", *faults]))
    return ClusterFile(path, raw, prepared, serving_path, serving)


def check_this_machine(cluster: ClusterFile) -> None:
    """What `ray up` needs here: Ray's version, programs, the SSH key, the cloud's packages and credentials.

    Raises ClusterError that names every fault found.
    """
    faults = [*_ray_version(), *_programs(), *_ssh_key(cluster.raw), *_credentials(cluster.raw)]
    if faults:
        raise ClusterError("\n  ".join([f"{cluster.path}:", *faults]))


def _schema() -> dict[str, Any]:
    import ray.autoscaler

    schema: dict[str, Any] = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return schema


def _unknown_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    schema = _schema()["properties"]
    provider = raw.get("provider")
    # Ray takes this one key out of a `local` file before it looks at the schema.
    own = {"min_workers"} if isinstance(provider, Mapping) and provider.get("type") == "local" else set()
    yield from (unknown_key_message(str(key), sorted(schema)) for key in raw if key not in {*schema, *own})
    for key in ("cluster_name", "provider"):
        if not raw.get(key):
            yield f"{key}: is missing"
    if not isinstance(provider, Mapping):
        return
    kind = provider.get("type")
    if kind not in _PROVIDER_KEYS:
        near = difflib.get_close_matches(str(kind), list(_PROVIDER_KEYS), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        yield f"provider.type: {kind!r} is not one of {', '.join(_PROVIDER_KEYS)}{hint}"
        return
    known = _PROVIDER_KEYS[kind] | {"type"}
    yield from (f"provider: {unknown_key_message(str(key), sorted(known))}" for key in provider if key not in known)
    types = raw.get("available_node_types")
    for name, node in (types if isinstance(types, Mapping) else {}).items():
        known = set(schema["available_node_types"]["patternProperties"][".*"]["properties"])
        yield from (
            f"available_node_types.{name}: {unknown_key_message(str(key), sorted(known))}"
            for key in (node if isinstance(node, Mapping) else {})
            if key not in known
        )


def _strings(data: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text of the file with its place."""
    if isinstance(data, str):
        yield place, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _strings(value, f"{place}.{key}" if place else str(key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from _strings(value, f"{place}[{number}]")


def _placeholders(raw: Mapping[str, Any]) -> Iterator[str]:
    seen: set[int] = set()
    for place, text in _strings(raw):
        if id(text) in seen:
            continue  # by an anchor of the file, one value stands in many places
        seen.add(id(text))
        for name in dict.fromkeys(re.findall(rf"{PLACEHOLDER}[\w.-]+", text)):
            yield f"{place}: {name} stands for a value of yours; the comment beside it says which"


def _types(raw: Mapping[str, Any]) -> Iterator[str]:
    head = raw.get("head_node_type")
    if raw.get("available_node_types") and head not in raw["available_node_types"]:
        yield f"head_node_type: {head!r} is not one of {', '.join(raw['available_node_types'])}"
    for name, node in (raw.get("available_node_types") or {}).items():
        low, high = node.get("min_workers", 0), node.get("max_workers", raw.get("max_workers", 2))
        if isinstance(low, int) and isinstance(high, int) and low > high:
            yield f"available_node_types.{name}: min_workers ({low}) is above max_workers ({high})"
        if name == head and ((node.get("resources") or {}).get("GPU") or high):
            yield f"available_node_types.{name}: the head serves no model: resources GPU 0, max_workers 0"
    if (raw.get("docker") or {}).get("image") and not raw["docker"].get("container_name"):
        yield "docker.container_name: is missing beside docker.image"


def _provider(raw: Mapping[str, Any]) -> Iterator[str]:
    provider = raw["provider"]
    needed = {"local": ("head_ip", "worker_ips"), "aws": ("region",), "gcp": ("project_id", "availability_zone")}
    yield from (f"provider.{key}: is missing" for key in needed[provider["type"]] if not provider.get(key))
    if provider["type"] == "local":
        workers = provider.get("worker_ips") or []
        if isinstance(workers, list) and len({provider.get("head_ip"), *workers}) != 1 + len(workers):
            yield "provider.worker_ips: an address stands twice, or is the head's"
        if not (raw.get("auth") or {}).get("ssh_private_key"):
            yield "auth.ssh_private_key: is missing: the key that opens these machines"


def _commands(raw: Mapping[str, Any]) -> Iterator[str]:
    # What the file leaves out comes from Ray's defaults: nightly builds, and ports open to the world.
    for key in ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        if not raw.get(key):
            yield f"{key}: is missing: Ray's default would install a nightly Ray, or open ports"
    groups = [(key, value) for key, value in raw.items() if key.endswith("_commands") and isinstance(value, list)]
    for key, commands in groups:
        for command in commands:
            if _NIGHTLY.search(str(command)):
                yield f"{key}: {str(command)[:80]!r} installs a Ray that nothing pins; requirements/ pins it"
    head, worker = (" ".join(map(str, raw.get(f"{who}_start_ray_commands") or [])) for who in ("head", "worker"))
    if head and "--autoscaling-config=~/ray_bootstrap_config.yaml" not in head:
        yield "head_start_ray_commands: `ray start --head` lacks --autoscaling-config=~/ray_bootstrap_config.yaml"
    if head and ("--dashboard-host=127.0.0.1" not in head or "--num-cpus=0" not in head):
        yield "head_start_ray_commands: `ray start --head` needs --dashboard-host=127.0.0.1 and --num-cpus=0"
    if worker and "--address=$RAY_HEAD_IP:6379" not in worker:
        yield "worker_start_ray_commands: `ray start` must say --address=$RAY_HEAD_IP:6379"


def _mounts(raw: Mapping[str, Any]) -> Iterator[str]:
    mounts = raw.get("file_mounts") or {}
    if REMOTE_SERVING not in mounts:
        yield f"file_mounts: {REMOTE_SERVING} is missing: the serving configuration"
    if TOKEN not in mounts:
        yield f"file_mounts: {TOKEN} is missing: without a token everybody who reaches Ray's ports commands the cluster"
    for remote, local in mounts.items():
        if remote == TOKEN and not Path(str(local)).expanduser().is_file():
            yield f"file_mounts: {remote}: there is no {local}; `.venv/bin/ray get-auth-token --generate` makes one"
        elif not Path(str(local)).expanduser().exists():
            yield f"file_mounts: {remote}: there is no {local} here in {Path.cwd()}; go to the repository's folder"


def _prepared(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The file as Ray completes and checks it; raises ClusterError with Ray's own reason."""
    import copy

    import click
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            prepared: dict[str, Any] = prepare_config(copy.deepcopy(dict(raw)))
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        place = ".".join(map(str, error.absolute_path)) or "top level"
        raise ClusterError(f"{path}:\n  {place}: {error.message[:300]}") from None
    except (click.ClickException, SystemExit, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join((said.getvalue() or str(error)).split())
        raise ClusterError(f"{path}:\n  {reason[:500] or type(error).__name__}") from None
    return prepared


def _capacity(prepared: Mapping[str, Any], serving: ServeFile, path: Path) -> Iterator[str]:
    """Whether some worker type can hold a replica, and the cluster all that must run; Ray would wait for ever."""
    args = serving.application.args
    resources = args.resources
    needed = resources.gpus * resources.tensor_parallel
    low = args.replicas.min if isinstance(args.replicas, Autoscaling) else args.replicas
    workers = {
        name: node for name, node in prepared["available_node_types"].items() if name != prepared["head_node_type"]
    }
    # Of its own machines (`local`), Ray learns what they have when they join.
    known = {name: (node.get("resources") or {}).get("GPU") for name, node in workers.items()}
    if not needed or not known or None in known.values():
        return
    if max(known.values()) < needed:
        yield (
            f"{path} asks for {needed:g} GPU(s) on one node for each replica, the largest worker type has "
            f"{max(known.values()):g}: change resources.tensor_parallel there, or the worker types"
        )
        return
    room = sum(
        min(node["max_workers"], prepared["max_workers"]) * (known[name] // needed) for name, node in workers.items()
    )
    if low > room:
        yield f"{path} asks for at least {low} replica(s), the workers have room for {room:g}: raise max_workers"


def _ray_version() -> Iterator[str]:
    if not _LOCK.is_file():
        return
    match = re.search(r"^ray==([\w.]+)", _LOCK.read_text(), re.MULTILINE)
    if match and version("ray") != match.group(1):
        yield f"Ray {version('ray')} is installed here, the nodes install {match.group(1)}: run `make install`"


def _programs() -> Iterator[str]:
    import shutil

    for program, package in (("ssh", "openssh-client"), ("rsync", "rsync")):
        if shutil.which(program) is None:
            yield f"the program {program} is not installed here (apt-get install {package})"


def _ssh_key(raw: Mapping[str, Any]) -> Iterator[str]:
    key = (raw.get("auth") or {}).get("ssh_private_key")
    if key is None:
        return  # Ray makes one with the cloud
    path = Path(str(key)).expanduser()
    if not path.is_file():
        yield f"auth.ssh_private_key: there is no {path}; `ssh-keygen -t ed25519 -f {path}` makes one"
    elif path.stat().st_uid == os.getuid() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield f"auth.ssh_private_key: others may read {path}, so ssh refuses it: chmod 600 {path}"


def _credentials(raw: Mapping[str, Any]) -> Iterator[str]:
    kind = raw["provider"]["type"]
    wanted = {"aws": "boto3", "gcp": "googleapiclient"}.get(kind)
    if wanted and importlib.util.find_spec(wanted) is None:
        yield f"the package {wanted} is not installed here: run `make install`"
    elif kind == "aws" and not _aws_credentials(raw["provider"]):
        yield "no AWS credentials: run `aws configure`, or set AWS_PROFILE or AWS_ACCESS_KEY_ID"
    elif kind == "gcp" and (reason := _no_gcp_credentials()):
        yield f"no Google Cloud credentials ({reason}): run `gcloud auth application-default login`"


def _aws_credentials(provider: Mapping[str, Any]) -> bool:
    import boto3

    given = provider.get("aws_credentials") or {}
    return boto3.Session(**given).get_credentials() is not None


def _no_gcp_credentials() -> str | None:
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    try:
        google.auth.default()
    except DefaultCredentialsError as error:
        return str(error).splitlines()[0][:120]
    return None
