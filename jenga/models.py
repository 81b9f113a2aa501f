"""A model's memory, described: which layers it has and what each stores for a token or a sequence.

Descriptions are YAML files (the zoo in ``configs/models/``), read into `ModelSpec`, or come from a Hugging Face
configuration (`jenga.hf_config`).  `ModelSpec.layer_types` resolves them for a tensor-parallel degree and data types.
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, ClassVar, Literal, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jenga.layers import Counts, LayerType
from jenga.policies import (
    ChunkedLocal,
    CrossAttention,
    FullAttention,
    LatentAttention,
    LatentIndexer,
    LayerPolicy,
    RecurrentState,
    Scratch,
    SlidingWindow,
    TokenBudget,
)

ZOO = Path(__file__).resolve().parent.parent / "configs" / "models"
"""Where the descriptions of known models lie."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
Dtype = Literal["float32", "bfloat16", "float16", "fp8", "int8"]


class ModelError(Exception):
    """A description cannot be found, read or used; the message names file, field and remedy."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Layers(_Strict):
    """Fields of every layer type."""

    name: str | None = None
    """Shown in tables; the kind, if left out."""
    layers: int = Field(gt=0)

    def resolve(self, dtypes: Dtypes, tp: int) -> tuple[LayerType, ...]:
        """What the layers store on one of `tp` ranks; several types if they store things of unlike lifetime.

        Raises:
            ModelError: the ranks cannot share it.
        """
        raise ModelError(f"{type(self).__name__} describes no layer")


class Dtypes(_Strict):
    """Data types of what layers store."""

    kv: Dtype = "bfloat16"
    """Keys, values and latents."""
    conv: Dtype = "bfloat16"
    """Convolution part of recurrent states."""
    state: Dtype = "float32"
    """Recurrent part of recurrent states."""


def check_dtype(value: str | None, setting: str) -> Dtype | None:
    """`value` if it names a data type, or None if it is None; ``auto`` is None, too.

    Raises:
        ModelError: it does not; the message names `setting` and what is known.
    """
    if value is None or value == "auto":
        return None
    for known in get_args(Dtype):
        if value == known or (known == "fp8" and value.startswith("fp8_e")):
            return cast(Dtype, known)
    raise ModelError(f"{setting} {value!r} is not known; choose one of auto, {', '.join(get_args(Dtype))}")


def _divide(what: str, count: int, tp: int) -> int:
    """`count` things over `tp` ranks; fewer things than ranks are replicated, as vLLM does with KV heads."""
    if count % tp and tp % count:
        raise ModelError(
            f"{what}: {count} cannot be shared by {tp} tensor-parallel ranks; choose a --tp that divides it"
        )
    return max(1, count // tp)


class _Attention(_Layers):
    """Keys and values of `kv_heads` heads for every token."""

    kv_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    """Elements of a key, and of a value unless `value_head_size` says otherwise."""
    value_head_size: int | None = Field(default=None, gt=0)
    block_tokens: int = Field(default=16, gt=0)
    """Smallest block of tokens that the attention kernels take."""
    max_block_tokens: int | None = Field(default=None, gt=0)
    """Largest block that they take; none if they take every multiple of the smallest."""
    counts: ClassVar[Counts] = Counts.TEXT

    def policy(self) -> LayerPolicy:
        """Memory rules of the type."""
        return FullAttention()

    def resolve(self, dtypes: Dtypes, tp: int) -> tuple[LayerType, ...]:
        policy = self.policy()
        heads = _divide(f"{self.name or policy.kind}: kv_heads", self.kv_heads, tp)
        value_head_size = self.value_head_size or self.head_size
        resolved = LayerType(
            name=self.name or policy.kind,
            policy=policy,
            layers=self.layers,
            cell_bytes=heads * (self.head_size + value_head_size) * DTYPE_BYTES[dtypes.kv],
            block_tokens=self.block_tokens,
            max_block_tokens=self.max_block_tokens,
            counts=self.counts,
            shape=(heads, self.head_size, value_head_size),
        )
        return (resolved,)


class FullAttentionLayers(_Attention):
    """Attention to every token before."""

    kind: Literal["full_attention"]


class SlidingWindowLayers(_Attention):
    """Attention to the last `window` tokens."""

    kind: Literal["sliding_window"]
    window: int = Field(gt=0)

    def policy(self) -> LayerPolicy:
        return SlidingWindow(self.window)


class ChunkedLocalLayers(_Attention):
    """Attention inside chunks of `chunk` tokens."""

    kind: Literal["chunked_local"]
    chunk: int = Field(gt=0)

    def policy(self) -> LayerPolicy:
        return ChunkedLocal(self.chunk)


class TokenBudgetLayers(_Attention):
    """Attention to at most `budget` kept tokens (PyramidKV)."""

    kind: Literal["token_budget"]
    budget: int = Field(gt=0)

    def policy(self) -> LayerPolicy:
        return TokenBudget(self.budget)


class CrossAttentionLayers(_Attention):
    """Attention to the tokens of the sequence's images."""

    kind: Literal["cross_attention"]
    counts: ClassVar[Counts] = Counts.IMAGES

    def policy(self) -> LayerPolicy:
        return CrossAttention()


class LatentLayers(_Layers):
    """MLA: one latent per token, the same on every rank."""

    kind: Literal["mla"]
    latent_size: int = Field(gt=0)
    """Elements: ``kv_lora_rank + qk_rope_head_dim``."""
    bytes_per_token: int | None = Field(default=None, gt=0)
    """Given for packed formats (latent, scales and padding), whose size no data type tells."""
    block_tokens: int = Field(default=64, gt=0)

    def resolve(self, dtypes: Dtypes, tp: int) -> tuple[LayerType, ...]:
        resolved = LayerType(
            name=self.name or self.kind,
            policy=LatentAttention(),
            layers=self.layers,
            cell_bytes=self.bytes_per_token or self.latent_size * DTYPE_BYTES[dtypes.kv],
            block_tokens=self.block_tokens,
            shape=(1, self.latent_size, 0),
        )
        return (resolved,)


class IndexerLayers(_Layers):
    """Keys of a sparse attention's indexer: `cell_bytes` for every `cell_tokens` tokens, the same on every rank."""

    kind: Literal["mla_indexer"]
    cell_bytes: int = Field(gt=0)
    cell_tokens: int = Field(default=1, gt=0)
    block_tokens: int = Field(default=64, gt=0)

    def resolve(self, dtypes: Dtypes, tp: int) -> tuple[LayerType, ...]:
        resolved = LayerType(
            name=self.name or self.kind,
            policy=LatentIndexer(),
            layers=self.layers,
            cell_bytes=self.cell_bytes,
            cell_tokens=self.cell_tokens,
            block_tokens=self.block_tokens,
            shape=(1, self.cell_bytes, 0),
        )
        return (resolved,)


class ScratchLayers(_Layers):
    """Working memory of `state_bytes` per layer and running sequence, the same on every rank, never cached."""

    kind: Literal["scratch"]
    state_bytes: int = Field(gt=0)

    def resolve(self, dtypes: Dtypes, tp: int) -> tuple[LayerType, ...]:
        resolved = LayerType(
            name=self.name or self.kind,
            policy=Scratch(),
            layers=self.layers,
            state_bytes=self.state_bytes,
            block_tokens=1,
        )
        return (resolved,)


class Mamba1State(_Strict):
    """Mamba-1: a convolution window and `state_size` numbers for each of `channels` channels."""

    type: Literal["mamba1"]
    channels: int = Field(gt=0)
    state_size: int = Field(gt=0)
    conv_kernel: int = Field(gt=1)

    def elements(self, tp: int) -> tuple[int, int, int]:
        """On one of `tp` ranks: channels and tokens of the convolution's window, elements of the recurrent part."""
        channels = _shard("mamba1 channels", self.channels, tp)
        return channels, self.conv_kernel - 1, channels * self.state_size


class Mamba2State(_Strict):
    """Mamba-2: `heads` states of `head_dim` by `state_size`; the convolution also runs over B and C of each group."""

    type: Literal["mamba2"]
    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    groups: int = Field(gt=0)
    state_size: int = Field(gt=0)
    conv_kernel: int = Field(gt=1)

    def elements(self, tp: int) -> tuple[int, int, int]:
        """On one of `tp` ranks: channels and tokens of the convolution's window, elements of the recurrent part."""
        heads = _shard("mamba2 heads", self.heads, tp)
        # Groups that the ranks cannot share evenly are replicated, so that each rank has those of its heads.
        groups = self.groups if self.groups % tp == 0 else self.groups + tp - self.groups
        width = _shard("mamba2 channels", self.heads * self.head_dim + 2 * groups * self.state_size, tp)
        return width, self.conv_kernel - 1, heads * self.head_dim * self.state_size


class DeltaNetState(_Strict):
    """Gated DeltaNet and Kimi Delta Attention: a key by value matrix per value head, and a convolution over q, k, v."""

    type: Literal["gdn", "kda"]
    key_heads: int = Field(gt=0)
    value_heads: int = Field(gt=0)
    key_head_dim: int = Field(gt=0)
    value_head_dim: int = Field(gt=0)
    conv_kernel: int = Field(gt=1)

    def elements(self, tp: int) -> tuple[int, int, int]:
        """On one of `tp` ranks: channels and tokens of the convolution's window, elements of the recurrent part."""
        heads = _shard(f"{self.type} value heads", self.value_heads, tp)
        width = _shard(
            f"{self.type} channels",
            2 * self.key_heads * self.key_head_dim + self.value_heads * self.value_head_dim,
            tp,
        )
        return width, self.conv_kernel - 1, heads * self.value_head_dim * self.key_head_dim


def _shard(what: str, count: int, tp: int) -> int:
    if count % tp:
        raise ModelError(
            f"{what}: {count} cannot be shared by {tp} tensor-parallel ranks; choose a --tp that divides it"
        )
    return count // tp


class RecurrentLayers(_Layers):
    """Layers that fold the past into one state per sequence.

    With speculative decoding a running sequence also keeps the state after each of `draft_tokens` draft tokens, and
    the convolution's window is longer by as many.
    """

    kind: Literal["recurrent_state"]
    state: Annotated[Mamba1State | Mamba2State | DeltaNetState, Field(discriminator="type")]
    draft_tokens: int = Field(default=0, ge=0)

    def resolve(self, dtypes: Dtypes, tp: int) -> tuple[LayerType, ...]:
        channels, window, recurrent = self.state.elements(tp)
        conv = channels * (window + self.draft_tokens)
        name = self.name or self.state.type
        state = LayerType(
            name=name,
            policy=RecurrentState(),
            layers=self.layers,
            state_bytes=conv * DTYPE_BYTES[dtypes.conv] + recurrent * DTYPE_BYTES[dtypes.state],
            block_tokens=1,
        )
        if not self.draft_tokens:
            return (state,)
        return (state, replace(state, name=f"{name} drafts", policy=Scratch(), copies=self.draft_tokens))


AnyLayers = Annotated[
    FullAttentionLayers
    | SlidingWindowLayers
    | ChunkedLocalLayers
    | TokenBudgetLayers
    | CrossAttentionLayers
    | LatentLayers
    | IndexerLayers
    | ScratchLayers
    | RecurrentLayers,
    Field(discriminator="kind"),
]


class ModelSpec(_Strict):
    """One model's memory."""

    name: str
    source: str
    """Where the numbers come from."""
    layers: tuple[AnyLayers, ...] = Field(min_length=1)
    dtypes: Dtypes = Dtypes()
    """What its engine stores unless told otherwise."""
    tp: int = Field(default=1, gt=0)
    """Tensor-parallel degree taken when none is asked for."""
    image_tokens: int = Field(default=0, ge=0)
    """Image tokens of a typical request."""

    def layer_types(
        self, tp: int | None = None, kv_dtype: Dtype | None = None, state_dtype: Dtype | None = None
    ) -> tuple[LayerType, ...]:
        """What each layer type stores on one of `tp` ranks.

        Raises:
            ModelError: the layers cannot be shared by so many ranks.
        """
        dtypes = self.dtypes.model_copy(
            update={k: v for k, v in (("kv", kv_dtype), ("state", state_dtype)) if v is not None}
        )
        try:
            return tuple(kind for layers in self.layers for kind in layers.resolve(dtypes, tp or self.tp))
        except ModelError as error:
            raise ModelError(f"{self.name}: {error}") from None


def known_models() -> list[str]:
    """Names of the zoo, sorted."""
    return sorted(path.stem for path in ZOO.glob("*.yaml"))


def load_model(name_or_path: str) -> ModelSpec:
    """Read a model of the zoo by name, or any description by its path.

    Raises:
        ModelError: there is none, or it is not valid; the message says what is wrong and what exists.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if path.name != name_or_path or name_or_path not in (models := known_models()):
            close = get_close_matches(name_or_path.lower(), known_models(), n=1, cutoff=0.4)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ModelError(
                f"--model {name_or_path!r} is neither a model of the zoo nor a .yaml file.{hint} "
                f"Known: {', '.join(known_models())}"
            )
        assert name_or_path in models
        path = ZOO / f"{name_or_path}.yaml"
    try:
        text = path.read_text()
    except OSError as error:
        raise ModelError(f"--model {path}: cannot be read: {error.strerror}") from None
    return parse_model(text, str(path))


def parse_model(text: str, where: str) -> ModelSpec:
    """A description in YAML; `where` names it in errors.

    Raises:
        ModelError: it is not valid; the message lists every fault.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ModelError(f"{where} is not YAML: {error}") from None
    try:
        return ModelSpec.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(x) for x in e['loc']) or 'file'}: {e['msg']}" for e in error.errors())
        raise ModelError(f"{where}: {faults}") from None
