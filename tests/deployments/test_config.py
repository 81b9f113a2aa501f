"""The serving configuration: what is refused, and in which words."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import tensor_parallel
from deployments.config import ConfigError, KvMemory, OngoingRequests, load, parse_serving

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def plain() -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "demo.yaml").read_text())


def write(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "serving.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def serving_files() -> list[Path]:
    return [path for path in sorted(CONFIGS.glob("*.yaml")) if "applications" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", serving_files(), ids=lambda path: path.name)
def test_shipped_files_are_valid_and_survive_the_way_through_ray(path: Path) -> None:
    config = load(path)
    application = config.to_ray()["applications"][0]
    for told in application.get("deployments", ()):
        application["args"]["replicas"] = told["num_replicas"]
    assert parse_serving(application["args"]) == config.application.args


def test_a_number_of_replicas_is_not_among_the_arguments_for_which_all_are_replaced(tmp_path: Path) -> None:
    plain = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    args = plain["applications"][0]["args"]
    args["model"]["id"] = "org/model-1.5"
    two, three = (load(write(tmp_path, put(plain, "applications.0.args.replicas", n))).to_ray() for n in (2, 3))
    counts = [made["applications"][0].pop("deployments") for made in (two, three)]
    assert two == three
    assert counts == [[{"name": "Engine:org--model-1_5", "num_replicas": n}] for n in (2, 3)]
    scaled = load(write(tmp_path, put(plain, "applications.0.args.replicas", {"min": 1, "max": 3}))).to_ray()
    assert scaled["applications"][0]["args"]["replicas"]["max"] == 3
    assert "deployments" not in scaled["applications"][0]

    for nothing in (None, []):
        assert load(write(tmp_path, put(plain, "applications.0.deployments", nothing))).to_ray()["applications"]

    # The same file with Ray's own key, for Ray's own programs.
    beside = put(plain, "applications.0.deployments", [{"name": "Engine:org--model-1_5", "num_replicas": 3}])
    del beside["applications"][0]["args"]["replicas"]
    assert load(write(tmp_path, beside)).to_ray()["applications"][0]["deployments"] == counts[1]
    wrong: list[tuple[str, Any, str]] = [
        ("args.replicas", 2, r"applications\[0\]: give `args\.replicas` or `deployments`, not both"),
        ("deployments", [{"name": "Engine:m", "num_replicas": 3}], 'only be.*name: "Engine:org--model-1_5"'),
        ("deployments", [{"name": "Engine:org--model-1_5", "max_ongoing_requests": 3}], "set in `args`"),
        ("deployments", "3", "set in `args`"),
        ("deployments", [{"name": "Engine:org--model-1_5", "num_replicas": True}], "args.replicas: .*not True"),
        ("args.model", {"path": "/m"}, "args.model.id: is missing"),
    ]
    for where, value, said in wrong:
        with pytest.raises(ConfigError, match=said):
            load(write(tmp_path, put(beside, f"applications.0.{where}", value)))


def test_demo_names_two_replicas_of_64_mib() -> None:
    args = load(CONFIGS / "demo.yaml").application.args
    assert args.max_replicas == 2
    assert args.engine.kv_memory == 64 * 2**20


def test_a_small_memory_survives_the_way_through_ray() -> None:
    data = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    data["applications"][0]["args"]["engine"]["kv_memory"] = "64KiB"
    args = parse_serving(data["applications"][0]["args"])
    assert args.engine.kv_memory == 64 * 2**10
    assert parse_serving(args.model_dump(mode="json")) == args


def put(data: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(data)
    *path, last = where.split(".")
    node = data
    for key in path:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    node[last] = value
    return data


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("htp_options", {}, ["top level: unknown key 'htp_options'; did you mean 'http_options'?"]),
        ("http_options.prot", 1, ["http_options: unknown key 'prot'; did you mean 'port'?"]),
        ("http_options.port", 0, ["http_options.port", "not 0"]),
        (
            "applications.0.args.engine.max_modellen",
            9,
            ["applications[0].args.engine: unknown key 'max_modellen'; did you mean 'max_model_len'?"],
        ),
        ("applications.0.args.engine.block_size", "big", ["args.engine.block_size", "not 'big'"]),
        ("applications.0.args.engine.kv_memory", "lots", ["args.engine.kv_memory", "not 'lots'"]),
        ("applications.0.args.engine.kv_memory", 64, ["args.engine.kv_memory: 64 has no unit", "write 64MiB"]),
        ("applications.0.args.engine.extra", {"model": "x"}, ["'model' is set by `model.path`"]),
        ("applications.0.args.replicas", "two", ["args.replicas: input should be a valid integer", "not 'two'"]),
        ("applications.0.args.replicas", {"min": 3, "max": 1}, ["args.replicas: min (3) is above max (1)"]),
        ("applications.0.args.replicas", {"mni": 3}, ["args.replicas: unknown key 'mni'; did you mean 'min'?"]),
        (
            "applications.0.args.replicas",
            {"max": 3, "target_ongoing_requests": 8},
            ["args.replicas: target_ongoing_requests goes with `signal: requests`: add that, or take it out"],
        ),
        ("applications.0.args.replicas", {"signal": "requests"}, ["args.replicas.target_ongoing_requests: is missing"]),
        (
            "applications.0.args.replicas",
            {"signal": "requests", "target_ongoing_requests": 8, "kv_target": 0.5},
            ["args.replicas: unknown key 'kv_target'"],
        ),
        (
            "applications.0.args.replicas",
            {"signal": "tokens"},
            ["args.replicas.signal: there is kv-memory and requests, not 'tokens'"],
        ),
        ("applications.0.args.replicas", {"kv_target": 70}, ["args.replicas.kv_target", "not 70"]),
        ("applications.0.args.replicas", {"slack": 1}, ["args.replicas.slack", "not 1"]),
        ("applications.0.args.resources", {"gpus": 4}, ["gpus (4) is of one worker", "gpus: 1, tensor_parallel: 4"]),
        (
            "applications.0.args.resources",
            {"gpus": 0.5, "tensor_parallel": 2},
            ["gpus (0.5) is a part of a GPU, but tensor_parallel (2) workers", "write gpus: 1, or tensor_parallel: 1"],
        ),
        ("applications.0.args.engine.extra", {"data_parallel_size": 2}, ["'data_parallel_size' is set by `replicas`"]),
        (
            "applications.0.args.limits",
            {"bodies": "4MiB"},
            ["limits: bodies (4194304 bytes, of all requests) is below body (8388608 bytes, of one)"],
        ),
        ("applications.0.args.router.slow_start_s", -1, ["args.router.slow_start_s", "not -1"]),
        ("applications.0.args.router.policy", "random", ["args.router.policy", "'prefix-affinity'", "not 'random'"]),
        ("applications.0.args.environment", {"A": [1]}, ["args.environment.A", "not [1]"]),
        ("applications.0.import_path", "other:app", ["applications[0].import_path", "deployments.app:build"]),
        ("applications", [], ["applications"]),
    ],
)
def test_faults_are_named_with_their_place(
    plain: dict[str, Any], tmp_path: Path, where: str, value: Any, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, put(plain, where, value)))
    message = str(caught.value)
    for part in said:
        assert part in message
    assert "pydantic" not in message
    assert "function-after" not in message


def test_every_fault_is_reported_at_once(plain: dict[str, Any], tmp_path: Path) -> None:
    data = put(put(plain, "http_options.port", -1), "applications.0.args.engine.dtype", "int3")
    with pytest.raises(ConfigError, match=r"(?s)http_options\.port.*args\.engine\.dtype"):
        load(write(tmp_path, data))


def test_missing_model_is_named(plain: dict[str, Any], tmp_path: Path) -> None:
    del plain["applications"][0]["args"]["model"]
    with pytest.raises(ConfigError, match=r"applications\[0\]\.args\.model: is missing"):
        load(write(tmp_path, plain))


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "is not YAML"), ("- 1", "must hold a mapping"), ("", "must hold a mapping")]
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(write(tmp_path, text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*absent\.yaml"):
        load(tmp_path / "absent.yaml")


def test_an_engine_argument_unknown_to_vllm_is_refused_with_the_nearest(plain: dict[str, Any]) -> None:
    args = put(plain["applications"][0]["args"], "engine.extra", {"gpu_memory_utilisation": 0.5})
    with pytest.raises(ConfigError, match="no engine argument 'gpu_memory_utilisation'; did you mean 'gpu_memory_util"):
        parse_serving(args)


def test_numbers_in_the_environment_become_text(plain: dict[str, Any]) -> None:
    args = put(plain["applications"][0]["args"], "environment", {"A": 2, "B": 1.5, "C": "x"})
    assert parse_serving(args).environment == {"A": "2", "B": "1.5", "C": "x"}


def test_autoscaling_bounds_the_replicas(plain: dict[str, Any]) -> None:
    args = parse_serving(put(plain["applications"][0]["args"], "replicas", {"min": 1, "max": 5}))
    assert isinstance(args.replicas, KvMemory)
    assert args.max_replicas == 5
    rays = {"min": 1, "max": 5, "signal": "requests", "target_ongoing_requests": 8}
    args = parse_serving(put(plain["applications"][0]["args"], "replicas", rays))
    assert isinstance(args.replicas, OngoingRequests)
    assert args.max_replicas == 5
    assert parse_serving(args.model_dump(mode="json")) == args


def test_the_memory_signal_needs_the_plugin(plain: dict[str, Any]) -> None:
    args = put(put(plain["applications"][0]["args"], "replicas", {"max": 5}), "environment", {"JENGA": 0})
    with pytest.raises(ConfigError, match=r"environment\.JENGA 0 turns off.*signal: requests"):
        parse_serving(args)


@pytest.mark.parametrize("folded", [False, True])
def test_heads_that_cannot_be_shared_out_are_refused(tmp_path: Path, folded: bool) -> None:
    heads: dict[str, Any] = {"num_attention_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": heads} if folded else heads))
    for workers, possible in ((1, True), (3, True), (4, False)):
        args = parse_serving({"model": {"id": "m", "path": "m"}, "resources": {"tensor_parallel": workers}})
        if possible:
            tensor_parallel.check(args, tmp_path)
        else:
            with pytest.raises(
                ConfigError, match=r"tensor_parallel: 4 workers cannot share the 6 .* one of 1, 2, 3, 6"
            ):
                tensor_parallel.check(args, tmp_path)
