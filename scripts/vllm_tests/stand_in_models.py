"""Model folders under the names that vLLM's tests use, so that the tests need no download.

Most tests read only a configuration.  Two files start real engines: these get a tiny model with random weights.
Run inside the folder that the names are relative to.
"""

from __future__ import annotations

from pathlib import Path

from transformers import Blip2Config, LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from jenga.demo import tokenizer
from jenga.demo.hybrids import random_model
from jenga.demo.tokenizer import vocabulary

TINY = {
    "vocab_size": len(vocabulary()),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 32,
}


def configuration(name: str, config: PreTrainedConfig, architecture: str) -> None:
    """A folder with `config` only."""
    config.architectures = [architecture]
    config.save_pretrained(name)


def tiny_model(name: str, config: PreTrainedConfig) -> None:
    """A folder with weights and a tokenizer."""
    Path(name).mkdir(parents=True, exist_ok=True)
    random_model(config, seed=1).save_pretrained(name)
    tokenizer.save(Path(name), config.max_position_embeddings)


def main() -> None:
    """Write all folders."""
    configuration("facebook/opt-125m", OPTConfig(), "OPTForCausalLM")
    configuration("facebook/opt-350m", OPTConfig(hidden_size=1024, num_attention_heads=16), "OPTForCausalLM")
    configuration("Qwen/Qwen1.5-7B", Qwen2Config(), "Qwen2ForCausalLM")
    # Any image model whose code needs no torchvision; the tests only ask whether there are images.
    for name in ("llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-3B-Instruct"):
        text = OPTConfig(max_position_embeddings=4096).to_dict()
        configuration(name, Blip2Config(text_config=text), "Blip2ForConditionalGeneration")
    tiny_model("Qwen/Qwen3-0.6B", Qwen3Config(**TINY, max_position_embeddings=40960))
    tiny_model("hmellor/tiny-random-LlamaForCausalLM", LlamaConfig(**TINY, max_position_embeddings=2048))


if __name__ == "__main__":
    main()
