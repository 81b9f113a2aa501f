"""The demo models by name, and how each one's folder is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from jenga.demo import folder as model_folder
from jenga.demo.folder import DemoModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from jenga.demo.train import Progress

RECALL = "gemma3-recall"
GRANITE = "granite-hybrid"
QWEN3_NEXT = "qwen3-next"
GEMMA4 = "gemma4"
WHISPER = "whisper"
NAMES: tuple[str, ...] = (RECALL, GRANITE, QWEN3_NEXT, GEMMA4, WHISPER)
SEED = 0
# Raised whenever a recipe's weights or files change, so that folders of an older recipe are made anew.
VERSION = 1


@dataclass(frozen=True)
class Made:
    """What became of one model."""

    path: Path
    kept: bool
    """A complete folder of the same recipe was there already and was left alone."""


def make(name: str, out: Path | str, force: bool = False) -> Path:
    """Make demo model `name` as folder ``out/name`` unless it is there already, and return that folder.

    Raises DemoModelError for an unknown name or a folder that cannot be (over)written.
    """
    return make_reporting(name, Path(out), force=force).path


def make_reporting(
    name: str,
    out: Path,
    *,
    force: bool = False,
    train: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Made:
    """`make`, which also says whether the folder was kept.

    With `train` the recall model's weights come from a new training run instead of the checkpoint in the
    package; `progress` follows it.  Raises what `make` raises.
    """
    if name not in NAMES:
        raise DemoModelError(f"no demo model is called '{name}'; there are {', '.join(NAMES)}")
    if train and name != RECALL:
        raise DemoModelError(f"--train: {name} has random weights; only {RECALL} is trained")
    path = out / name
    recipe: dict[str, object] = {"name": name, "version": VERSION, "seed": SEED, "trained": train}
    if not force and model_folder.is_complete(path, recipe):
        return Made(path, kept=True)

    def fill(scratch: Path) -> None:
        if name == RECALL:
            _fill_recall(scratch, train, progress)
        else:
            _fill_random(scratch, name)

    model_folder.write(path, recipe, fill, force)
    return Made(path, kept=False)


def checkpoint_bytes() -> bytes:
    """The recall model's trained weights, a safetensors file shipped with the package."""
    with as_file(files("jenga.demo") / "data" / f"{RECALL}.safetensors") as path:
        return path.read_bytes()


def _fill_recall(scratch: Path, train: bool, progress: Callable[[Progress], None]) -> None:
    from jenga.demo import gemma3

    config = gemma3.config()
    config.architectures = ["Gemma3ForCausalLM"]
    if train:
        from jenga.demo.train import trained_weights

        weights = trained_weights(SEED, progress)
    else:
        weights = checkpoint_bytes()
    (scratch / "model.safetensors").write_bytes(weights)
    _fill_common(scratch, config, gemma3.CONTEXT)


def _fill_random(scratch: Path, name: str) -> None:
    from safetensors.torch import save

    from jenga.demo import hybrids, whisper

    if name == WHISPER:
        config: PreTrainedConfig = whisper.config()
        context = whisper.CONTEXT
        model = whisper.random_model(SEED)
        whisper.save_feature_extractor(scratch)
    else:
        configs = {
            GRANITE: hybrids.granite_config,
            QWEN3_NEXT: hybrids.qwen3_next_config,
            GEMMA4: hybrids.gemma4_config,
        }
        config, context = configs[name](), hybrids.CONTEXT
        model = hybrids.random_model(config, SEED)
    config.architectures = [type(model).__name__]
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        state.pop("proj_out.weight")  # the embedding again
    (scratch / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    _fill_common(scratch, config, context)


def _fill_common(scratch: Path, config: PreTrainedConfig, context: int) -> None:
    from jenga.demo import tokenizer

    config.dtype = "bfloat16"
    config.save_pretrained(scratch)
    tokenizer.save(scratch, context)
    # Without do_sample, vLLM's default sampling is greedy only when asked; temperature 0 makes answers firm.
    generation = {
        "bos_token_id": tokenizer.BOS,
        "eos_token_id": tokenizer.END,
        "pad_token_id": tokenizer.PAD,
        "temperature": 0.0,
    }
    (scratch / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
