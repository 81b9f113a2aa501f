"""The recall model: Gemma-3's architecture, 5 sliding-window layers and 1 full-attention layer.

All layers have the same KV heads, so a page of either type has the same bytes per layer, as in the real
Gemma-3.  The one full layer must find the asked pair anywhere in the context; the sliding ones tell it
which key stands before which value.  Which wrong pages show as wrong answers, and which do not, was
measured: see docs/demo-models.md.

From usual random weights, key matching was not learnt in the minutes it was given (docs/demo-models.md
says what was tried).  The weights therefore start with that circuit sketched in, and training
(`jenga.demo.train`) makes it work:

- the first layer's heads look for the latest key and for the key before it, and write them into two
  subspaces of their own beside the token itself;
- the full layer's heads compare "latest key here" with "latest key there" at values, and with "key before"
  at keys, at any distance, and copy the token found: the value asked for, or the next key of a recital.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jenga.demo.recall import KEYS, TOKENS_PER_PAIR, VALUES
from jenga.demo.tokenizer import BOS, END, PAD, token_id, vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

CONTEXT = 4096
WINDOW = 64
HIDDEN = 128
HEAD = 64
LAYERS = ("sliding_attention",) * 5 + ("full_attention",)
LOCAL_BASE = 1e3
# A base this large leaves half of the full layer's dimensions unturned: keys match at any distance.
FULL_BASE = 1e9

# The residual stream's parts while the circuit is sketched: the token, the latest key, the key before
# it, a constant, two flags for the kind of token, and room.
_TOKEN, _LATEST, _BEFORE = slice(0, 48), slice(48, 80), slice(80, 112)
_ONE, _IS_KEY, _IS_VALUE, _REST = 112, 113, 114, slice(115, HIDDEN)


def config() -> Gemma3TextConfig:
    """The model's configuration."""
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=len(LAYERS),
        layer_types=list(LAYERS),
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        max_position_embeddings=CONTEXT,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": FULL_BASE},
            "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_BASE},
        },
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=BOS,
    )


def sketched(seed: int) -> Gemma3ForCausalLM:
    """A float32 model with seeded random weights and the circuit sketched in; it answers nothing yet."""
    import torch
    from transformers import Gemma3ForCausalLM

    model = Gemma3ForCausalLM(config())
    generator = torch.Generator().manual_seed(seed)

    def gauss(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            quiet = 0.1 if layer in (model.model.layers[0], model.model.layers[-1]) else 1.0
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                linear.weight.copy_(gauss(linear.out_features, linear.in_features, quiet * linear.in_features**-0.5))
            for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                linear.weight.copy_(gauss(linear.out_features, linear.in_features, linear.in_features**-0.5))
            # Gemma's norms scale by 1 + weight: what is not sketched whispers.
            layer.post_attention_layernorm.weight.fill_(-0.8)
            layer.post_feedforward_layernorm.weight.fill_(-0.8)

        embedding = torch.zeros(len(vocabulary()), HIDDEN)
        embedding[:, _TOKEN] = gauss(len(embedding), 48, 1.0)
        embedding[:, _REST] = gauss(len(embedding), HIDDEN - _REST.start, 0.5)
        embedding[:, _ONE] = 2.0
        embedding[[token_id(key) for key in KEYS], _IS_KEY] = 3.0
        embedding[[token_id(value) for value in VALUES], _IS_VALUE] = 3.0
        model.model.embed_tokens.weight.copy_(embedding / HIDDEN**0.5)

        # One projection for both: "latest key" and "key before" must look alike to be compared.
        shared = torch.linalg.qr(gauss(48, 32, 1.0))[0].T
        _sketch_first(model.model.layers[0], shared)
        _sketch_full(model.model.layers[-1])
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _sketch_first(layer: torch.nn.Module, shared: torch.Tensor) -> None:
    """Head 0 looks for the nearest key at or before its position, head 1 for one a pair earlier."""
    import torch

    attention: torch.nn.Module = layer.self_attn  # type: ignore[assignment]
    q, k, v, o = _weights(attention)
    for head, part in enumerate((_LATEST, _BEFORE)):
        at = head * HEAD
        for pair in (4, 8, 11, 14):  # from fast to slow rotations: together they peak at one distance
            turn = LOCAL_BASE ** (-pair / (HEAD / 2)) * TOKENS_PER_PAIR * head
            q[at + pair, _ONE] += math.cos(turn)
            q[at + pair + HEAD // 2, _ONE] -= math.sin(turn)
            k[at + pair, _IS_KEY] += 1.0
        k[at + HEAD // 2 - 1, _ONE] += 0.3  # gives tokens that are no keys a direction nobody asks for
        v[at : at + 48, _TOKEN] += torch.eye(48)
        o[part, at : at + 48] += shared
    layer.post_attention_layernorm.weight.fill_(0.0)  # type: ignore[union-attr, operator]


def _sketch_full(layer: torch.nn.Module) -> None:
    """Head 0 matches the latest key at values, head 1 the key before at keys; both copy the token."""
    import torch

    attention: torch.nn.Module = layer.self_attn  # type: ignore[assignment]
    q, k, v, o = _weights(attention)
    unturned = [*range(HEAD // 4, HEAD // 2), *range(3 * HEAD // 4, HEAD)]
    for head, (part, kind) in enumerate(((_LATEST, _IS_VALUE), (_BEFORE, _IS_KEY))):
        at = head * HEAD
        for i, dimension in enumerate(unturned):
            q[at + dimension, _LATEST.start + i] += 1.0
            k[at + dimension, part.start + i] += 1.0
        q[at + HEAD // 4 - 1, _ONE] += 4.0
        k[at + HEAD // 4 - 1, kind] += 2.5
        v[at : at + 48, _TOKEN] += torch.eye(48)
        o[_TOKEN, at : at + 48] += torch.eye(48)
    for norm, value in (("q_norm", 0.5), ("k_norm", 0.5)):
        getattr(attention, norm).weight.fill_(value)
    layer.post_attention_layernorm.weight.fill_(1.5)  # type: ignore[union-attr, operator]
    layer.post_feedforward_layernorm.weight.fill_(-0.3)  # type: ignore[union-attr, operator]


def _weights(attention: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(attention, f"{name}_proj").weight for name in "qkvo")
