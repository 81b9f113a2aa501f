"""Random weights whose next token depends on the whole context, made inside the engine.

vLLM's dummy weights are so small that a model says one token for ever, and no wrong page could show.  The recipe is
that of `jenga/demo/hybrids.py`, for vLLM's own parameter names; every contender gets the same weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

SEED = 7


class RandomWeights:
    """For `worker_extension_cls`: what counts is that the worker imports this module."""

    def weight_bytes(self: Any) -> int:
        """Bytes of the model's parameters."""
        parameters = self.model_runner.model.parameters()
        return sum(each.numel() * each.element_size() for each in parameters)


def _load_weights(self: Any, model: torch.nn.Module, model_config: Any) -> None:
    fill(model)


setattr(DummyModelLoader, "load_weights", _load_weights)  # noqa: B010


def fill(model: torch.nn.Module) -> None:
    """Fill every parameter; the same model gets the same weights on every call."""
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.named_parameters())):
            generator = torch.Generator(weight.device).manual_seed(SEED + number)
            _fill(name, weight, generator)


def _fill(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    leaf, part = name.rsplit(".", 1)[-1], name.rsplit(".", 2)[-2] if "." in name else ""
    if leaf == "A_log":
        weight.zero_()
    elif leaf == "A":
        weight.fill_(-1.0)
    elif leaf == "D":
        weight.fill_(0.3)
    elif leaf == "dt_bias":
        # Softplus of this is the step, and 1 / step the memory in tokens: 5 to 500.
        step = torch.logspace(math.log10(0.2), math.log10(0.002), weight.numel(), device=weight.device)
        weight.copy_(torch.log(torch.expm1(step)).reshape(weight.shape))
    elif "embed" in name or leaf == "sinks":
        weight.normal_(0.0, 1.0, generator=generator)
    elif leaf.endswith("bias"):
        weight.zero_()
    elif weight.ndim == 3 and "conv" not in name:  # experts: [experts, out, in]
        weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    elif weight.ndim >= 2:
        weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
        if part == "o_proj":
            weight.mul_(6.0)  # a mean over hundreds of tokens is small
    # The rest are scales of norms, which keep what they were made with (one, or zero where it is added to one).
