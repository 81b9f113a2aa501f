"""A model's memory from its Hugging Face configuration (``config.json``), for the architectures listed in `KNOWN`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jenga.models import ModelError, ModelSpec

Layers = list[dict[str, Any]]
_MISSING = object()


class _Config:
    """The fields of a configuration; those of ``text_config`` come first."""

    def __init__(self, data: Mapping[str, Any], where: Path) -> None:
        text = data.get("text_config")
        self._data = {**data, **text} if isinstance(text, dict) else dict(data)
        self.where = where

    def get(self, field: str, default: Any = _MISSING) -> Any:
        value = self._data.get(field)
        if value is None:
            if default is _MISSING:
                raise ModelError(f"{self.where}: field {field!r} is missing; is this the model's own config.json?")
            return default
        return value

    def number(self, field: str, default: Any = _MISSING) -> int:
        value = self.get(field, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"{self.where}: field {field!r} is {value!r}, not a whole number")
        return value

    def kinds(self, default: Callable[[int], str]) -> list[str]:
        """Kind of every layer: ``layer_types``, or by number where the configuration leaves it out."""
        listed = self.get("layer_types", None)
        if isinstance(listed, list) and listed:
            return [str(kind) for kind in listed]
        return [default(i) for i in range(self.number("num_hidden_layers"))]

    def heads(self) -> dict[str, int]:
        """Fields of an attention layer."""
        heads = self.number("num_attention_heads")
        size = self.get("head_dim", None) or self.number("hidden_size") // heads
        return {"kv_heads": self.number("num_key_value_heads", heads), "head_size": size}


def _layers(kind: str, count: int, **fields: Any) -> Layers:
    return [{"kind": kind, "layers": count, **fields}] if count else []


def _plain(c: _Config) -> Layers:
    window = c.get("sliding_window", None) if c.get("use_sliding_window", True) else None
    kinds = c.kinds(lambda _: "sliding_attention" if window else "full_attention")
    return _by_kind(c, kinds, window)


def _by_kind(c: _Config, kinds: list[str], window: int | None) -> Layers:
    unknown = set(kinds) - {"sliding_attention", "full_attention", "chunked_attention"}
    if unknown:
        raise ModelError(f"{c.where}: layer_types names {', '.join(sorted(unknown))}, which this architecture has not")
    sliding = _layers("sliding_window", kinds.count("sliding_attention"), window=window, **c.heads())
    full = _layers("full_attention", kinds.count("full_attention"), **c.heads())
    return sliding + full


def _gemma2(c: _Config) -> Layers:
    kinds = c.kinds(lambda i: "full_attention" if i % 2 else "sliding_attention")
    return _by_kind(c, kinds, c.number("sliding_window", 4096))


def _gemma3(c: _Config) -> Layers:
    every = c.number("sliding_window_pattern", c.get("_sliding_window_pattern", 6))
    kinds = c.kinds(lambda i: "sliding_attention" if (i + 1) % every else "full_attention")
    return _by_kind(c, kinds, c.number("sliding_window", 4096))


def _gpt_oss(c: _Config) -> Layers:
    kinds = c.kinds(lambda i: "full_attention" if i % 2 else "sliding_attention")
    return _by_kind(c, kinds, c.number("sliding_window", 128))


def _llama4(c: _Config) -> Layers:
    chunk = c.get("attention_chunk_size", None)
    if not chunk:
        return _layers("full_attention", c.number("num_hidden_layers"), **c.heads())
    rope = c.get("no_rope_layers", None) or [
        (i + 1) % c.number("no_rope_layer_interval", 4) for i in range(c.number("num_hidden_layers"))
    ]
    local = sum(1 for uses_rope in rope if uses_rope)
    heads = c.heads()
    full = _layers("full_attention", len(rope) - local, **heads)
    return _layers("chunked_local", local, chunk=chunk, **heads) + full


def _mllama(c: _Config) -> Layers:
    cross = len(c.get("cross_attention_layers"))
    full = _layers("full_attention", c.number("num_hidden_layers") - cross, **c.heads())
    return full + _layers("cross_attention", cross, **c.heads())


def _mimo(c: _Config) -> Layers:
    pattern = c.get("hybrid_layer_pattern", None)  # 1: sliding
    kinds = c.kinds(lambda i: "sliding_attention" if pattern and pattern[i] else "full_attention")
    value = {"value_head_size": c.number("v_head_dim", 128)}
    sliding = {
        "kv_heads": c.number("swa_num_key_value_heads", 2 * c.number("num_key_value_heads")),
        "head_size": c.number("swa_head_dim", c.heads()["head_size"]),
        "value_head_size": c.number("swa_v_head_dim", value["value_head_size"]),
    }
    window = c.get("sliding_window", None) or c.number("sliding_window_size", 128)
    local = _layers("sliding_window", kinds.count("sliding_attention"), window=window, **sliding)
    return local + _layers("full_attention", kinds.count("full_attention"), **c.heads(), **value)


def _states(count: int, state: dict[str, Any]) -> Layers:
    return _layers("recurrent_state", count, state=state)


def _jamba(c: _Config) -> Layers:
    period, offset = c.number("attn_layer_period"), c.number("attn_layer_offset")
    total = c.number("num_hidden_layers")
    attention = sum(1 for i in range(total) if i % period == offset)
    state = {
        "type": "mamba1",
        "channels": c.number("mamba_expand", 2) * c.number("hidden_size"),
        "state_size": c.number("mamba_d_state", 16),
        "conv_kernel": c.number("mamba_d_conv", 4),
    }
    return _states(total - attention, state) + _layers("full_attention", attention, **c.heads())


def _qwen3_next(c: _Config) -> Layers:
    every = c.number("full_attention_interval", 4)
    kinds = c.kinds(lambda i: "linear_attention" if (i + 1) % every else "full_attention")
    state = {
        "type": "gdn",
        "key_heads": c.number("linear_num_key_heads"),
        "value_heads": c.number("linear_num_value_heads"),
        "key_head_dim": c.number("linear_key_head_dim"),
        "value_head_dim": c.number("linear_value_head_dim"),
        "conv_kernel": c.number("linear_conv_kernel_dim"),
    }
    full = kinds.count("full_attention")
    return _states(len(kinds) - full, state) + _layers("full_attention", full, **c.heads())


def _nemotron_h(c: _Config) -> Layers:
    pattern = c.get("hybrid_override_pattern", None)
    blocks = list(pattern) if pattern else list(c.get("layers_block_type"))
    names = {"M": ("M", "mamba", "linear_attention"), "*": ("*", "attention", "full_attention")}
    mamba, attention = (sum(1 for b in blocks if b in names[key]) for key in ("M", "*"))
    state = {
        "type": "mamba2",
        "heads": c.number("mamba_num_heads"),
        "head_dim": c.number("mamba_head_dim"),
        "groups": c.number("n_groups"),
        "state_size": c.number("ssm_state_size"),
        "conv_kernel": c.number("conv_kernel"),
    }
    heads = c.heads() | ({"head_size": c.number("attention_head_dim")} if c.get("attention_head_dim", None) else {})
    return _states(mamba, state) + _layers("full_attention", attention, **heads)


def _mamba2(c: _Config) -> dict[str, Any]:
    heads = c.number("mamba_n_heads")
    size = c.get("mamba_d_head", "auto")
    return {
        "type": "mamba2",
        "heads": heads,
        "head_dim": c.number("mamba_expand", 2) * c.number("hidden_size") // heads if size == "auto" else size,
        "groups": c.number("mamba_n_groups", 1),
        "state_size": c.number("mamba_d_state"),
        "conv_kernel": c.number("mamba_d_conv", 4),
    }


def _granite(c: _Config) -> Layers:
    kinds = c.kinds(lambda _: "attention")
    attention = sum(1 for kind in kinds if kind in ("attention", "full_attention"))
    return _states(len(kinds) - attention, _mamba2(c)) + _layers("full_attention", attention, **c.heads())


def _falcon_h1(c: _Config) -> Layers:
    total = c.number("num_hidden_layers")
    return _states(total, _mamba2(c)) + _layers("full_attention", total, **c.heads())


def _latent(c: _Config) -> int:
    return c.number("kv_lora_rank") + c.number("qk_rope_head_dim", 0)


def _kimi_linear(c: _Config) -> Layers:
    linear = c.get("linear_attn_config", {})
    kinds = c.kinds(lambda i: "linear_attention" if i + 1 in linear.get("kda_layers", ()) else "full_attention")
    recurrent = kinds.count("linear_attention")
    return _states(recurrent, _kda(c, linear)) + _layers("mla", len(kinds) - recurrent, latent_size=_latent(c))


def _kda(c: _Config, linear: Mapping[str, Any]) -> dict[str, Any]:
    heads = linear.get("num_heads") or c.number("linear_num_heads")
    size = linear.get("head_dim") or c.number("linear_head_dim")
    kernel = linear.get("short_conv_kernel_size") or c.number("linear_conv_kernel_dim")
    return {
        "type": "kda",
        "key_heads": heads,
        "value_heads": heads,
        "key_head_dim": size,
        "value_head_dim": size,
        "conv_kernel": kernel,
    }


def _glm5_next(c: _Config) -> Layers:
    kinds = c.kinds(lambda i: "linear_attention" if i % 4 != 3 else "indexed_attention")
    recurrent = kinds.count("linear_attention")
    sparse = len(kinds) - recurrent
    key, pool = c.number("index_head_dim", 128), c.number("index_kpool", 16)
    indexer = {"cell_bytes": key + key // 128 * 4, "cell_tokens": pool}  # a float32 scale for every 128 elements
    # Keys and gates, in bfloat16, of the pool that is being filled.
    ring = {"name": "indexer ring", "state_bytes": pool * 2 * key * 2}
    return (
        _states(recurrent, _kda(c, c.get("linear_attn_config", {})))
        + _layers("mla", sparse, latent_size=_latent(c))
        + _layers("mla_indexer", sparse, **indexer)
        + _layers("scratch", sparse, **ring)
    )


KNOWN: dict[str, Callable[[_Config], Layers]] = {
    "falcon_h1": _falcon_h1,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "glm5_next": _glm5_next,
    "glm5_next_text": _glm5_next,
    "gpt_oss": _gpt_oss,
    "granitemoehybrid": _granite,
    "jamba": _jamba,
    "kimi_linear": _kimi_linear,
    "llama": _plain,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "mimo_v2_flash": _mimo,
    "ministral": _plain,
    "mistral": _plain,
    "mllama": _mllama,
    "mllama_text_model": _mllama,
    "nemotron_h": _nemotron_h,
    "qwen2": _plain,
    "qwen3": _plain,
    "qwen3_moe": _plain,
    "qwen3_next": _qwen3_next,
}
"""By ``model_type``."""


def from_hf_config(path: Path) -> ModelSpec:
    """Describe the model whose configuration is `path`, a ``config.json`` or the folder with it.

    Raises:
        ModelError: it cannot be read, or its architecture is not known; the message says what is.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text())
    except OSError as error:
        raise ModelError(f"--hf-config {file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"--hf-config {file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"--hf-config {file} holds no JSON object")
    kind = data.get("model_type")
    describe = KNOWN.get(kind) if isinstance(kind, str) else None
    if describe is None:
        raise ModelError(
            f"--hf-config {file}: model_type {kind!r} is not known; known: {', '.join(sorted(KNOWN))}. "
            "Describe the model in YAML instead (configs/models has examples) and give that as --model"
        )
    try:
        layers = describe(_Config(data, file))
        name = str(data.get("_name_or_path") or file.resolve().parent.name or kind)
        return ModelSpec.model_validate({"name": name, "source": str(file), "layers": layers})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(x) for x in e['loc'])}: {e['msg']}" for e in error.errors())
        raise ModelError(f"--hf-config {file} gives no valid description: {faults}") from None
    except (TypeError, AttributeError, ZeroDivisionError, IndexError) as error:
        raise ModelError(f"--hf-config {file}: a field has an unexpected form: {error}") from None
