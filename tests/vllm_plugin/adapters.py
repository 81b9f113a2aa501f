"""LoRA adapters with random weights, written as peft writes them."""

from __future__ import annotations

import json
from pathlib import Path

RANK = 8


def make_adapter(model: Path, path: Path, seed: int) -> Path:
    """An adapter of the query and output projections of all attention layers of `model`, large enough to be heard."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    with safe_open(model / "model.safetensors", framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118  # no mapping
            if not name.endswith(("q_proj.weight", "o_proj.weight")):
                continue
            rows, columns = stored.get_slice(name).get_shape()
            adapted = f"base_model.model.{name.removesuffix('.weight')}"
            for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                weights[f"{adapted}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    path.mkdir(parents=True)
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": 4 * RANK,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "none",
        "lora_dropout": 0.0,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
