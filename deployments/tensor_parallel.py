"""Whether a model can be split among the workers of a replica, before an engine is started to find out."""

import json
from pathlib import Path

from deployments.config import ConfigError, Serving


def check(config: Serving, folder: Path) -> None:
    """Compare `resources.tensor_parallel` with the attention heads in the model's `config.json`.

    Raises ConfigError when they cannot be shared out evenly; a file without heads is left to vLLM.
    """
    workers = config.resources.tensor_parallel
    try:
        data = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return
    # Models of text and images keep those of the text in a part of its own.
    heads = _number(data, "num_attention_heads") or _number(_part(data, "text_config"), "num_attention_heads")
    if heads is not None and heads % workers:
        possible = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            f"resources.tensor_parallel: {workers} workers cannot share the {heads} attention heads "
            f"(num_attention_heads) of {folder}; use one of {possible}"
        )


def _part(data: object, key: str) -> object:
    return data.get(key) if isinstance(data, dict) else None


def _number(data: object, key: str) -> int | None:
    value = _part(data, key)
    return value if isinstance(value, int) else None
