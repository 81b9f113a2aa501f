"""The serving configuration: one YAML file for `jenga serve` and for Ray's own `serve deploy`.

The file is a Ray Serve configuration with one application; everything of ours is in the
application's ``args``.  No Ray and no vLLM are imported here, so that a wrong file is refused at once.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

IMPORT_PATH = "deployments.app:build"

ENGINES = "Engine:"
"""What the names of deployments of engines begin with."""


class ConfigError(Exception):
    """A configuration that cannot be used; the message is for the person who wrote it."""


def unknown_key_message(key: str, known: Sequence[str]) -> str:
    """What to say of ``key`` when only ``known`` keys exist: the nearest one, then all of them."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown key '{key}'{hint} (known: {', '.join(sorted(known))})"


class Section(BaseModel):
    """A mapping of the file: unknown keys are refused and named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = list(cls.model_fields)
            unknown = [unknown_key_message(str(key), known) for key in data if key not in known]
            if unknown:
                raise PydanticCustomError("unknown_key", "{text}", {"text": "; ".join(unknown)})
        return data


class Model(Section):
    """Which model is served, and under which name."""

    id: str = Field(min_length=1, description="name that clients send as `model`")
    path: str = Field(min_length=1, description="folder with the weights, config.json and tokenizer")
    demo: str | None = Field(None, description="demo model that `jenga serve` makes when the folder is missing")


class Engine(Section):
    """vLLM's engine; what has no field here goes into `extra` under vLLM's own name."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: PositiveInt | None = Field(None, description="tokens of prompt and answer together")
    max_num_seqs: PositiveInt | None = Field(None, description="requests that run at the same time")
    block_size: PositiveInt | None = Field(None, description="tokens per page of an attention layer")
    kv_memory: ByteSize | None = Field(None, description="KV memory of one replica, such as 64MiB")
    enforce_eager: bool = False
    prefix_caching: bool = True
    extra: dict[str, Any] = Field(default_factory=dict, description="further vLLM engine arguments")

    @field_validator("kv_memory", mode="before")
    @classmethod
    def _has_a_unit(cls, value: Any) -> Any:
        # What was checked here travels to the cluster in bytes, where it is read again: only what no memory can be.
        if re.fullmatch(r"\s*\d+\s*", str(value)) and 0 < int(value) < 4096:
            raise PydanticCustomError(
                "no_unit",
                "{value} has no unit and would be {value} bytes; write {value}MiB or {value}GiB",
                {"value": value},
            )
        return value

    @field_validator("extra")
    @classmethod
    def _known_to_vllm(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if not extra:
            return extra
        for key in extra:
            if key in _OWN_SETTING:
                raise PydanticCustomError(
                    "own_setting",
                    "'{key}' is set by `{setting}`, not in `extra`",
                    {"key": key, "setting": _OWN_SETTING[key]},
                )
        known = vllm_argument_names()
        unknown = [key for key in extra if key not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.6)
            raise PydanticCustomError(
                "unknown_engine_argument",
                "vLLM has no engine argument '{key}'{hint}",
                {"key": unknown[0], "hint": f"; did you mean '{near[0]}'?" if near else ""},
            )
        return extra


# vLLM argument -> the setting of ours that decides it.
_OWN_SETTING = {
    "model": "model.path",
    "served_model_name": "model.id",
    "dtype": "engine.dtype",
    "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs",
    "block_size": "engine.block_size",
    "kv_cache_memory_bytes": "engine.kv_memory",
    "enforce_eager": "engine.enforce_eager",
    "kv_events_config": "router.policy",
    "enable_prefix_caching": "engine.prefix_caching",
    "tensor_parallel_size": "resources.tensor_parallel",
    "data_parallel_size": "replicas",
}


class Autoscaling(Section):
    """Replicas follow the load; the delays and the average are Ray Serve's own."""

    min: PositiveInt = 1
    max: PositiveInt = 2
    signal: str
    look_back_s: float = Field(30, ge=5, description="seconds that a decision looks back on, on average")
    upscale_delay_s: float = Field(30, ge=0, description="seconds that more must have been needed before more start")
    downscale_delay_s: float = Field(600, ge=0, description="seconds that fewer must have been enough before some stop")

    @field_validator("signal", mode="before", check_fields=False)
    @classmethod
    def _known_signal(cls, value: Any) -> Any:
        if value not in _SIGNALS:
            raise PydanticCustomError("unknown_signal", "there is {known}", {"known": " and ".join(_SIGNALS)})
        return value

    @model_validator(mode="after")
    def _ordered(self) -> "Autoscaling":
        if self.min > self.max:
            raise PydanticCustomError(
                "min_above_max",
                "min ({low}) is above max ({high})",
                {"low": self.min, "high": self.max},
            )
        return self


class KvMemory(Autoscaling):
    """By the KV memory that requests hold and by their waiting (`deployments.autoscaling`)."""

    signal: Literal["kv-memory"] = "kv-memory"
    kv_target: float = Field(0.7, gt=0, le=1, description="part of its KV memory that a replica's requests should hold")
    waiting_target: float = Field(0.1, gt=0, description="requests that may wait in an engine for each one that runs")
    slack: float = Field(
        0.2, ge=0, lt=1, description="part of the load by which fewer replicas must have room to spare"
    )

    @model_validator(mode="before")
    @classmethod
    def _other_signal(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "target_ongoing_requests" in data:
            raise PydanticCustomError(
                "other_signal",
                "target_ongoing_requests goes with `signal: requests`: add that, or take it out and aim by `kv_target`",
            )
        return data


class OngoingRequests(Autoscaling):
    """By the number of requests in progress: Ray Serve's own policy."""

    signal: Literal["requests"]
    target_ongoing_requests: PositiveFloat = Field(description="requests per replica to aim at")


def _replicas_form(value: Any) -> str:
    if isinstance(value, Autoscaling):
        return value.signal
    if isinstance(value, Mapping):
        return "requests" if value.get("signal") == "requests" else "kv-memory"
    return "count"


Replicas = Annotated[
    Annotated[int, Field(gt=0, strict=True), Tag("count")]
    | Annotated[KvMemory, Tag("kv-memory")]
    | Annotated[OngoingRequests, Tag("requests")],
    Discriminator(_replicas_form),
]
_SIGNALS = ("kv-memory", "requests")
# Tags of `Replicas`: pydantic puts them into an error's path, where they are no keys of the file.
_TAGS = ("count", *_SIGNALS)


class Resources(Section):
    """What one worker of a replica takes, and how many workers a replica has."""

    cpus: PositiveFloat = Field(1, description="CPU cores of one worker, as Ray counts them")
    gpus: float = Field(0, ge=0, description="GPUs of one worker; 0 runs vLLM's CPU back end")
    tensor_parallel: PositiveInt = Field(1, description="workers that share one model, all on one node")
    omp_threads: PositiveInt = Field(1, description="OpenMP threads of a CPU engine")

    @model_validator(mode="after")
    def _one_gpu_a_worker(self) -> "Resources":
        if self.gpus > 1:
            raise PydanticCustomError(
                "gpus_of_a_worker",
                "gpus ({gpus}) is of one worker, which can use one GPU: for a model on several, "
                "write gpus: 1, tensor_parallel: {workers}",
                {"gpus": f"{self.gpus:g}", "workers": math.ceil(self.gpus) * self.tensor_parallel},
            )
        if 0 < self.gpus < 1 < self.tensor_parallel:
            raise PydanticCustomError(
                "shared_gpu",
                "gpus ({gpus}) is a part of a GPU, but tensor_parallel ({workers}) workers need a whole one each: "
                "write gpus: 1, or tensor_parallel: 1",
                {"gpus": f"{self.gpus:g}", "workers": self.tensor_parallel},
            )
        return self


class Router(Section):
    """How a request finds its replica.

    ``cache-aware`` knows what is cached (``jenga.routing.placement``), ``prefix-affinity`` guesses it from the
    requests that it has sent (``deployments.placement``).
    """

    policy: Literal["cache-aware", "prefix-affinity", "least-loaded"] = "cache-aware"
    request_price: float = Field(64, ge=0, description="prompt tokens that it costs to come to a request in progress")
    compute_price: float = Field(1, ge=0, description="price of a prompt token to compute; 1 is one to wait for")
    behind_price: float = Field(1, ge=0, description="what it costs more for each request in progress on a replica")
    store_price: float = Field(0.5, ge=0, description="share of that price for a token that is not stored there yet")
    pressure_price: float = Field(1, ge=0, description="share by which full KV memory makes a request dearer")
    slack: float = Field(16, ge=0, description="prompt tokens within which replicas are equally good")
    slow_start_s: float = Field(30, ge=0, description="seconds over which a new replica takes up its share of the load")
    chunk: PositiveInt = Field(64, description="characters (or token ids) hashed together")
    max_chunks: PositiveInt = Field(512, description="chunks of a prompt that are looked at")
    max_entries: PositiveInt = Field(65_536, description="chunks remembered per replica")
    load_factor: float = Field(
        2.0, ge=1, description="a replica is too busy for affinity beyond factor x least load + slack"
    )
    load_slack: float = Field(4, ge=0, description="requests of slack in the rule above")


class Auth(Section):
    """Whose requests are answered: holders of keys that `jenga keys` made (docs/security.md)."""

    keys_file: str | None = Field(
        None, description="key file, on every node that runs an ingress; followed when it changes"
    )
    keys_variable: str | None = Field(None, description="instead: variable with the key file's text, read at the start")

    @model_validator(mode="after")
    def _one_source(self) -> "Auth":
        if (self.keys_file is None) == (self.keys_variable is None):
            raise PydanticCustomError("one_source", "give either `keys_file` or `keys_variable`")
        return self


class Limits(Section):
    """What requests may ask for, whoever makes them."""

    body: Annotated[ByteSize, Field(gt=0)] = Field(ByteSize(8 << 20), description="size of a request body")
    prompt_tokens: PositiveInt | None = Field(None, description="tokens of a prompt; the model's length if not set")
    sequences: PositiveInt = Field(128, description="answers of one request: prompts x `n`")
    values: PositiveInt = Field(10_000, description="strings, numbers, lists and objects in a body, token ids aside")
    grammar: Annotated[ByteSize, Field(gt=0)] = Field(
        ByteSize(64 << 10), description="size of a response format or a structured output, which becomes a grammar"
    )
    request_s: PositiveFloat = Field(600, description="seconds from the end of the headers to the end of the answer")
    body_s: PositiveFloat = Field(60, description="seconds from the end of the headers to the end of the body")
    requests: PositiveInt = Field(1024, description="requests in progress in one ingress; more are told to come back")
    bodies: Annotated[ByteSize, Field(gt=0)] = Field(
        ByteSize(256 << 20), description="size of the bodies of all requests of one ingress together"
    )

    @model_validator(mode="after")
    def _one_body_fits(self) -> "Limits":
        if self.bodies < self.body:
            # It would be told to come back for ever.
            raise PydanticCustomError(
                "bodies_below_body",
                "bodies ({all} bytes, of all requests) is below body ({one} bytes, of one): raise it, or lower body",
                {"all": int(self.bodies), "one": int(self.body)},
            )
        return self


class Serving(Section):
    """``args`` of the application: everything that is ours."""

    model: Model
    engine: Engine = Engine()
    replicas: Replicas = 1
    ingresses: PositiveInt = Field(1, description="processes that check, tokenise and route requests, each by itself")
    resources: Resources = Resources()
    router: Router = Router()
    auth: Auth | None = None
    limits: Limits = Limits()
    memory_map: bool = Field(True, description="the page /memory and its data, for whoever reaches the REST interface")
    stream_batch_ms: float = Field(10, ge=0, description="milliseconds over which a stream's tokens travel together")
    environment: dict[str, str] = Field(default_factory=dict, description="variables of each replica")

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """YAML reads `OMP_NUM_THREADS: 2` as a number; a variable is text."""
        if isinstance(value, Mapping):
            return {
                key: str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item
                for key, item in value.items()
            }
        return value

    @model_validator(mode="after")
    def _memory_is_told(self) -> "Serving":
        if isinstance(self.replicas, KvMemory) and self.environment.get("JENGA") == "0":
            raise PydanticCustomError(
                "no_signal",
                "replicas.signal kv-memory needs the plugin, which environment.JENGA 0 turns off: "
                "take that out, or write signal: requests",
            )
        return self

    @property
    def max_replicas(self) -> int:
        """The most replicas that may run at once."""
        return self.replicas.max if isinstance(self.replicas, Autoscaling) else self.replicas


class HttpOptions(Section):
    """Where the REST interface listens (Ray Serve's own keys)."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65_535)] = 8000
    root_path: str | None = None
    request_timeout_s: None = Field(
        None, description="not to be set: `limits.request_s` ends a request that takes long"
    )
    keep_alive_timeout_s: PositiveInt | None = None
    ssl_certfile: str | None = Field(None, description="PEM file: certificate and the chain above it; serves HTTPS")
    ssl_keyfile: str | None = Field(None, description="PEM file: the certificate's private key, without a passphrase")

    @field_validator("request_timeout_s", mode="before")
    @classmethod
    def _one_time_limit(cls, told: object) -> object:
        if told is not None:
            # Ray's proxy would say nothing to a request that has had its turn, and it would be asked once more.
            raise PydanticCustomError("two_time_limits", "leave this out; `limits.request_s` (args) ends long requests")
        return told

    @model_validator(mode="after")
    def _certificate_and_key(self) -> "HttpOptions":
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise PydanticCustomError("half_of_tls", "`ssl_certfile` and `ssl_keyfile` go together: give both or none")
        return self


class Application(Section):
    """The one application of the file (Ray Serve's own keys)."""

    name: str = "jenga"
    route_prefix: str = Field("/", pattern="^/")
    import_path: Literal["deployments.app:build"] = "deployments.app:build"
    runtime_env: dict[str, Any] | None = None
    args: Serving

    @model_validator(mode="before")
    @classmethod
    def _number_beside_the_arguments(cls, data: Any) -> Any:
        """`deployments` with the number of engines, where Ray's own programs want it, is `args.replicas`."""
        if not isinstance(data, Mapping) or "deployments" not in data:
            return data
        rest = {key: value for key, value in data.items() if key != "deployments"}
        told, args = data["deployments"], data.get("args")
        model = args.get("model") if isinstance(args, Mapping) else None
        if not told or not isinstance(args, Mapping) or not isinstance(model, Mapping) or "id" not in model:
            return rest  # what is missing is told of otherwise
        name = engine_deployment(str(model["id"]))
        if "replicas" in args:
            raise PydanticCustomError("two_numbers", "give `args.replicas` or `deployments`, not both")
        match told:
            case [{"name": given, "num_replicas": number, **others}] if given == name and not others:
                return rest | {"args": {**args, "replicas": number}}
        raise PydanticCustomError(
            "other_deployments",
            "`deployments` may only be [{example}]; everything else is set in `args`",
            {"example": f'{{name: "{name}", num_replicas: N}}'},
        )


class ServeFile(Section):
    """The whole file."""

    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] | None = None
    http_options: HttpOptions = HttpOptions()
    grpc_options: dict[str, Any] | None = None
    logging_config: dict[str, Any] | None = None
    applications: list[Application] = Field(min_length=1, max_length=1)

    @property
    def application(self) -> Application:
        """The one application."""
        return self.applications[0]

    def to_ray(self) -> dict[str, Any]:
        """The same file as plain data for Ray Serve; `args` keep their form, so `build` reads them again.

        A fixed number of replicas goes beside `args`: for any change of those Serve replaces every replica.
        """
        plain = self.model_dump(mode="json", exclude_none=True)
        args = self.application.args
        if not isinstance(args.replicas, Autoscaling):
            (application,) = plain["applications"]
            del application["args"]["replicas"]
            application["deployments"] = [{"name": engine_deployment(args.model.id), "num_replicas": args.replicas}]
        return plain


def engine_deployment(model_id: str) -> str:
    """Name of the deployment of a model's engines, as Ray Serve LLM makes it."""
    return ENGINES + model_id.replace("/", "--").replace(".", "_")


def vllm_argument_names() -> list[str]:
    """Names that vLLM's engine and OpenAI front end accept.

    Imports vLLM, which takes seconds: asked only for a file that uses `extra`.
    """
    import dataclasses

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    return sorted({field.name for cls in (AsyncEngineArgs, FrontendArgs) for field in dataclasses.fields(cls)})


def describe(error: ValidationError, source: str) -> str:
    """A validation error as lines `where: what`, without pydantic's own apparatus."""
    lines = [f"{source}:"]
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"] if part not in _TAGS]
        where = ".".join(path).replace("applications.0", "applications[0]") or "top level"
        what = item["msg"]
        if item["type"] == "missing":
            what = "is missing"
        elif "input" in item and not isinstance(item["input"], Mapping):
            what = f"{what[0].lower()}{what[1:]}, not {item['input']!r}"
        line = f"  {where}: {what}"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def parse_serving(args: Any) -> Serving:
    """Our part of the file, as Ray Serve hands it to `build`.

    Raises ConfigError naming every wrong key and value.
    """
    try:
        return Serving.model_validate(args)
    except ValidationError as error:
        raise ConfigError(describe(error, "application arguments")) from None


def load(path: Path) -> ServeFile:
    """Read and check a serving configuration.

    Raises ConfigError when the file is missing, is not YAML, or does not fit.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        shipped = sorted(item.name for item in Path("configs").glob("*.yaml"))
        hint = f"; configs/ has {', '.join(shipped)}" if shipped else ""
        raise ConfigError(f"there is no configuration file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} must hold a mapping with `applications`, not {type(data).__name__}")
    try:
        return ServeFile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error, str(path))) from None
