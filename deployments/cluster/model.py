"""Puts the model of a serving configuration on this node's disk; a set-up command of cluster/*.yaml.

python -m deployments.cluster.model SERVING.yaml [--no-weights]
"""

import argparse
import re
import sys
from pathlib import Path

from deployments.config import ConfigError, Model, load

# What the head leaves out: it reads the tokenizer and the configuration.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
_COMPLETE = ".jenga-complete"


def repository(folder: Path) -> str:
    """The hub's name of the model that lies in ``folder``: its last two parts.

    Raises ConfigError when there are no two that could be one.
    """
    name = "/".join(folder.parts[-2:])
    if len(folder.parts) < 3 or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(
            f"model.path: {folder} does not exist, and its end is no ORGANISATION/MODEL of the Hugging Face hub; "
            "put the model there, or name the folder so"
        )
    return name


def provide(model: Model, *, weights: bool) -> str:
    """Make or fetch what is missing, and say what was done.

    Raises ConfigError when that cannot be done.
    """
    folder = Path(model.path).expanduser().absolute()
    if model.demo is not None:
        from jenga import demo

        if folder.name != model.demo:
            raise ConfigError(f"model.path: demo model {model.demo} lies in a folder of its own name, not {folder}")
        demo.make(model.demo, folder.parent)
        return f"{folder}: demo model"
    done = folder / (_COMPLETE if weights else f"{_COMPLETE}-but-weights")
    if done.exists() or ((folder / "config.json").is_file() and not list(folder.glob(f"{_COMPLETE}*"))):
        return f"{folder}: there already"
    name = repository(folder)
    from huggingface_hub import snapshot_download

    try:
        # A download that was cut short goes on where it stopped.
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{_COMPLETE}-not").touch()
        snapshot_download(name, local_dir=folder, ignore_patterns=None if weights else list(_WEIGHTS))
    except Exception as error:
        raise ConfigError(f"model.path: {name} cannot be fetched to {folder}: {error}") from None
    done.touch()
    return f"{folder}: fetched {name}" + ("" if weights else " without its weights")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Put the model of a serving configuration on this disk.")
    parser.add_argument("serving", type=Path)
    parser.add_argument("--no-weights", action="store_true", help="tokenizer and configuration only, for the head")
    options = parser.parse_args()
    try:
        print(provide(load(options.serving).application.args.model, weights=not options.no_weights))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
