"""Public models with fewer layers and random weights.

A layer is as wide as the public one (heads, head sizes, states, hidden and intermediate sizes), so that a step's work
outweighs what its launches cost, and the proportions of layer types are kept; layers, experts and vocabularies
are cut.  `small` versions are narrow as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from jenga import demo

VOCABULARY = 4096
WHISPER = "whisper"
CONTEXT = 32768


@dataclass(frozen=True)
class Model:
    """One model of the benchmark."""

    name: str
    config: Callable[[bool], dict[str, Any]] | None
    """Hugging Face configuration; the argument asks for the small version.  None: the demo model of that name."""
    engine: dict[str, Any]
    """Engine arguments that vLLM needs for it, with Jenga or without."""
    context: int = 640
    """Most tokens of a small model's sequence."""


def _common(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
        **more,
    }


def llama(small: bool) -> dict[str, Any]:
    """Llama-3.1-8B: full attention only, the control."""
    return _common(
        "LlamaForCausalLM",
        "llama",
        hidden_size=512 if small else 4096,
        intermediate_size=1024 if small else 14336,
        num_hidden_layers=4 if small else 8,
        num_attention_heads=16 if small else 32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
    )


def gemma3(small: bool) -> dict[str, Any]:
    """Gemma-3-27B: five layers with a window of 1,024 tokens, then a full one."""
    layers = 12
    return _common(
        "Gemma3ForCausalLM",
        "gemma3_text",
        hidden_size=512 if small else 5376,
        intermediate_size=1024 if small else 21504,
        num_hidden_layers=layers,
        layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
        num_attention_heads=16 if small else 32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=128,
        sliding_window=64 if small else 1024,
        rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh",
    )


def gemma4(small: bool) -> dict[str, Any]:
    """Gemma-4-31B: heads of 256 behind windows of 1,024 tokens, of 512 (and fewer) in the full layers."""
    layers = 6 if small else 12
    return _common(
        "Gemma4ForCausalLM",
        "gemma4_text",
        hidden_size=512 if small else 5376,
        intermediate_size=1024 if small else 21504,
        num_hidden_layers=layers,
        layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
        num_attention_heads=8 if small else 32,
        num_key_value_heads=4 if small else 16,
        head_dim=256,
        num_global_key_value_heads=1 if small else 4,
        global_head_dim=512,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        sliding_window=64 if small else 1024,
        rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh",
    )


def gpt_oss(small: bool) -> dict[str, Any]:
    """gpt-oss-120b: windows of 128 tokens every other layer, attention sinks, experts (8 instead of 128)."""
    layers = 4 if small else 12
    return _common(
        "GptOssForCausalLM",
        "gpt_oss",
        hidden_size=512 if small else 2880,
        intermediate_size=512 if small else 2880,
        num_hidden_layers=layers,
        layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
        num_local_experts=4 if small else 8,
        num_experts_per_tok=2 if small else 4,
        num_attention_heads=16 if small else 64,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=128,
        rms_norm_eps=1e-5,
    )


def falcon_h1(small: bool) -> dict[str, Any]:
    """Falcon-H1-34B: attention and Mamba-2 heads side by side in each layer."""
    return _common(
        "FalconH1ForCausalLM",
        "falcon_h1",
        hidden_size=512 if small else 5120,
        intermediate_size=1024 if small else 21504,
        num_hidden_layers=4 if small else 12,
        num_attention_heads=8 if small else 20,
        num_key_value_heads=4,
        head_dim=128,
        mamba_d_ssm=1024 if small else 4096,
        mamba_n_heads=8 if small else 32,
        mamba_d_head=128,
        mamba_n_groups=2,
        mamba_d_state=256,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_chunk_size=128,
        mamba_rms_norm=False,
        rms_norm_eps=1e-5,
    )


def nemotron_h(small: bool) -> dict[str, Any]:
    """Nemotron-H-8B: Mamba-2, MLP and attention as layers of their own."""
    pattern = "M-M*-M-" if small else "M-M-M-M*-M-M-"
    return _common(
        "NemotronHForCausalLM",
        "nemotron_h",
        hidden_size=512 if small else 4096,
        intermediate_size=1024 if small else 21504,
        hybrid_override_pattern=pattern,
        num_hidden_layers=len(pattern),
        num_attention_heads=8 if small else 32,
        num_key_value_heads=8,
        head_dim=128,
        ssm_state_size=128,
        mamba_num_heads=16 if small else 128,
        mamba_head_dim=64,
        n_groups=8,
        conv_kernel=4,
        chunk_size=128,
        expand=2,
        mamba_ssm_cache_dtype="float32",
    )


def qwen3_next(small: bool) -> dict[str, Any]:
    """Qwen3-Next-80B: three gated DeltaNet layers, then a full one; 64 experts instead of 512."""
    layers = 8 if small else 12
    return _common(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        hidden_size=512 if small else 2048,
        intermediate_size=1024 if small else 5120,
        num_hidden_layers=layers,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
        num_attention_heads=8 if small else 16,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=4 if small else 16,
        linear_num_value_heads=8 if small else 32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        num_experts=4 if small else 64,
        num_experts_per_tok=2 if small else 10,
        moe_intermediate_size=256 if small else 512,
        shared_expert_intermediate_size=256 if small else 512,
        decoder_sparse_step=1,
        norm_topk_prob=True,
    )


def kimi_linear(small: bool) -> dict[str, Any]:
    """Kimi-Linear-48B: three KDA layers, then MLA (latent 512 + 64); 32 experts instead of 256."""
    layers = 8 if small else 12
    full = [i for i in range(1, layers + 1) if i % 4 == 0 or i == layers]
    return _common(
        "KimiLinearForCausalLM",
        "kimi_linear",
        hidden_size=512 if small else 2304,
        intermediate_size=1024 if small else 9216,
        num_hidden_layers=layers,
        num_attention_heads=8 if small else 32,
        num_key_value_heads=8 if small else 32,
        head_dim=72,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        mla_use_nope=True,
        num_experts=4 if small else 32,
        num_experts_per_token=2 if small else 8,
        num_shared_experts=1,
        moe_intermediate_size=256 if small else 1024,
        moe_renormalize=True,
        moe_router_activation_func="sigmoid",
        routed_scaling_factor=2.446,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        use_grouped_topk=True,
        num_expert_group=1,
        topk_group=1,
        linear_attn_config={
            "full_attn_layers": full,
            "kda_layers": [i for i in range(1, layers + 1) if i not in full],
            "head_dim": 128,
            "num_heads": 8 if small else 32,
            "short_conv_kernel_size": 4,
        },
    )


RANDOM = {"load_format": "dummy", "worker_extension_cls": "benchmarks.gpu.weights.RandomWeights"}
"""Engine arguments for random weights: vLLM's workers import the extension before they load a model."""

# FlashInfer, which vLLM prefers for GDN prefills on Hopper, is a package of its own; Triton's kernel is always there.
GDN = {"additional_config": {"gdn_prefill_backend": "triton"}}

MODELS = {
    m.name: m
    for m in (
        Model("llama-3.1-8b", llama, {}),
        Model("gemma-3-27b", gemma3, {}),
        Model("gemma-4-31b", gemma4, {"attention_backend": "TRITON_ATTN"}),  # FlashAttention 3 ends at heads of 256
        Model("gpt-oss-120b", gpt_oss, {}),
        Model("falcon-h1-34b", falcon_h1, {}),
        Model("nemotron-h-8b", nemotron_h, {}),
        Model("qwen3-next-80b", qwen3_next, GDN),
        Model("kimi-linear-48b", kimi_linear, {"trust_remote_code": True}),
        Model(WHISPER, None, {"load_format": "auto", "skip_tokenizer_init": False}, 320),
    )
}


def _copy_demo(name: str, path: Path) -> None:
    shutil.copytree(demo.make(name, path.parent / "demo"), path, dirs_exist_ok=True)


def make(name: str, folder: Path, *, small: bool) -> Path:
    """Write the model's `config.json` into a folder of its own and return that; the weights come from `weights.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"{name}-small" if small else name)
    config = MODELS[name].config
    if config is None:
        # In a process of its own: whoever has computed with CPU tensors cannot be forked any more.
        ((_, words),) = processes.run([processes.Job(_copy_demo, (name, path), {}, folder / f"{name}.log", 60)])
        if words:
            raise RuntimeError(f"the demo model {name} was not made:\n{words}")
        return path
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config(small), indent=1) + "\n")
    return path
