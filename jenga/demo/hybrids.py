"""Models with random weights whose next token depends on the whole context.

Default initialisation makes a language model that says one token for ever, whatever it reads: no page
and no state could be wrong visibly.  Here every sub-layer adds about as much to the residual stream as the
embedding does, attention is broad (every page counts a little) and loud, and states forget over 5 to 500 tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jenga.demo.tokenizer import BOS, END, PAD, vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

CONTEXT = 4096
LAYERS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2


def granite_config() -> PreTrainedConfig:
    """GraniteMoeHybrid, 6 Mamba-2 and 2 attention layers, dense (a router's choice is all or nothing)."""
    from transformers import GraniteMoeHybridConfig

    return GraniteMoeHybridConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=256,
        shared_intermediate_size=256,
        num_hidden_layers=len(LAYERS),
        layer_types=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_multiplier=1 / 8,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=4,
        mamba_d_head=64,
        mamba_d_state=64,
        mamba_n_groups=1,
        mamba_expand=2,
        mamba_chunk_size=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=BOS,
    )


def qwen3_next_config() -> PreTrainedConfig:
    """Qwen3-Next, 6 GDN and 2 attention layers; vLLM wants experts, so every token takes them all."""
    from transformers import Qwen3NextConfig

    return Qwen3NextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(LAYERS),
        layer_types=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=BOS,
    )


def gemma4_config() -> PreTrainedConfig:
    """Gemma-4, 5 sliding-window layers with 2 heads of 32 and one full layer with one key head of 96.

    So the two kinds store 256 and 384 bytes a token: neither is a multiple of the other.
    """
    from transformers import Gemma4TextConfig

    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    return Gemma4TextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_global_key_value_heads=1,  # type: ignore[call-arg]  # this and the next: taken by __post_init__
        global_head_dim=96,
        attention_k_eq_v=True,
        sliding_window=64,
        hidden_size_per_layer_input=0,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=BOS,
    )


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A bfloat16 model of `config`; the same seed gives the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            _fill(name, weight, generator)
    model.to(torch.bfloat16).eval()  # type: ignore[arg-type]
    return model


def _fill(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    import torch

    leaf = name.rsplit(".", 2)[-2:]
    if "A_log" in leaf:
        weight.zero_()
    elif leaf[-1] == "D":
        weight.fill_(0.3)  # less of the token itself past the state
    elif "dt_bias" in leaf:
        # Softplus of this is the step, and 1 / step the memory in tokens: 5 to 500.
        step = torch.logspace(math.log10(0.2), math.log10(0.002), weight.numel())
        weight.copy_(torch.log(torch.expm1(step)))
    elif "embed_tokens" in leaf:
        weight.normal_(0.0, 1.0, generator=generator)
    elif weight.ndim >= 2:
        # conv1d is [channels, 1, width]: all but the first dimension feed one output.
        weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
        if leaf[0] == "o_proj":
            weight.mul_(6.0)  # a mean over hundreds of tokens is small
