"""The zoo's dimensions against public configurations and vLLM's own arithmetic; errors that readers of YAML meet."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator

from jenga.hf_config import KNOWN, from_hf_config
from jenga.layers import Counts, LayerType, pages_held
from jenga.models import ZOO, DeltaNetState, Mamba1State, Mamba2State, ModelError, known_models, load_model, parse_model
from jenga.policies import CrossAttention, SlidingWindow

NEMOTRON = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
GEMMA3 = {"model_type": "gemma3_text", "sliding_window_pattern": 6}
# The fields that matter of the public config.json files.
PUBLIC: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "gemma-2-27b": {
        "model_type": "gemma2", "hidden_size": 4608, "num_hidden_layers": 46, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 4096,
    },
    "gemma-3-27b": {
        "model_type": "gemma3",
        "text_config": GEMMA3 | {
            "hidden_size": 5376, "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16,
            "head_dim": 128, "sliding_window": 1024,
        },
    },
    "gemma-3-1b": GEMMA3 | {
        "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "sliding_window": 512,
    },
    "nemotron-h-8b": {
        "model_type": "nemotron_h", "hidden_size": 4096, "num_hidden_layers": 52, "hybrid_override_pattern": NEMOTRON,
        "num_attention_heads": 32, "num_key_value_heads": 8, "attention_head_dim": 128, "mamba_num_heads": 128,
        "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4,
    },
    "granite-4-small": {
        "model_type": "granitemoehybrid", "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128,
        "mamba_d_conv": 4, "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
    },
    "falcon-h1-34b": {
        "model_type": "falcon_h1", "hidden_size": 5120, "num_hidden_layers": 72, "num_attention_heads": 20,
        "num_key_value_heads": 4, "head_dim": 128, "mamba_d_ssm": 4096, "mamba_n_heads": 32, "mamba_d_head": 128,
        "mamba_n_groups": 2, "mamba_d_state": 256, "mamba_d_conv": 4,
    },
    "kimi-linear-48b": {
        "model_type": "kimi_linear", "num_hidden_layers": 27, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "linear_attn_config": {
            "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
            "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
            "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4,
        },
    },
}  # fmt: skip
# Models whose public configuration is also the default of transformers' configuration class.
DEFAULTS = {
    "jamba-1.5-mini": ("jamba", "JambaConfig"),
    "gpt-oss-120b": ("gpt_oss", "GptOssConfig"),
    "llama-3.2-11b-vision": ("mllama", "MllamaTextConfig"),
    "llama-4-scout": ("llama4", "Llama4TextConfig"),
    "mimo-v2-flash": ("mimo_v2_flash", "MiMoV2FlashConfig"),
    "qwen3-next-80b": ("qwen3_next", "Qwen3NextConfig"),
}


def described(config: dict[str, Any], folder: Path, tp: int) -> set[LayerType]:
    (folder / "config.json").write_text(json.dumps(config))
    return set(from_hf_config(folder).layer_types(tp=tp))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", PUBLIC)
def test_zoo_agrees_with_public_configurations(name: str, tp: int, tmp_path: Path) -> None:
    assert described(PUBLIC[name], tmp_path, tp) == set(load_model(name).layer_types(tp=tp))


@pytest.mark.parametrize("name", DEFAULTS)
def test_zoo_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    folder, cls = DEFAULTS[name]
    module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    config = getattr(module, cls)().to_dict()
    assert described(config, tmp_path, 1) == set(load_model(name).layer_types())


def test_glm_agrees_with_transformers(tmp_path: Path) -> None:
    """All but what the deployment adds: the draft model, its tokens' states, and the packed latents."""
    module = importlib.import_module("transformers.models.glm5_next.configuration_glm5_next")
    ours = {t.name: t for t in load_model("glm-5.3-flash").layer_types(tp=1)}
    for theirs in described(module.Glm5NextTextConfig().to_dict(), tmp_path, 1):
        assert theirs.layers == ours[theirs.name].layers
        if theirs.name == "mla_indexer":
            assert theirs == ours[theirs.name]
        if theirs.name == "kda":
            drafts, channels = 4, 3 * 64 * 128
            assert ours["kda"].state_bytes - theirs.state_bytes == drafts * channels * 2
            assert ours["kda drafts"].needed_bytes(1) == drafts * ours["kda"].needed_bytes(1)
    assert ours["mla_indexer"].cell_bytes * 16 == 132 * ours["mla_indexer"].cell_tokens
    # Ring of the indexer: two pools of 16 keys and gates, since draft tokens may run into a second one.
    assert ours["indexer ring"].state_bytes == 2 * 16 * 2 * 128 * 2


def test_every_model_of_the_issue_is_described() -> None:
    assert len(known_models()) >= 18
    for name in known_models():
        model = load_model(name)
        assert model.source.startswith("https://")
        names = [t.name for t in model.layer_types()]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_states_as_vllm_counts_them(tp: int) -> None:
    def elements(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
        (a, b), rest = shapes
        recurrent = 1
        for x in rest:
            recurrent *= x
        return a * b, recurrent

    def mine(state: Mamba1State | Mamba2State | DeltaNetState) -> tuple[int, int]:
        channels, window, recurrent = state.elements(tp)
        return channels * window, recurrent

    mamba1 = Mamba1State(type="mamba1", channels=8192, state_size=16, conv_kernel=4)
    assert mine(mamba1) == elements(MambaStateShapeCalculator.mamba1_state_shape(tp, 8192, 16, 4))
    for groups in (1, 2, 8):
        mamba2 = Mamba2State(type="mamba2", heads=128, head_dim=64, groups=groups, state_size=128, conv_kernel=4)
        theirs = MambaStateShapeCalculator.mamba2_state_shape(tp, 8192, groups, 128, 64, 128, 4)
        assert mine(mamba2) == elements(theirs)
    gdn = DeltaNetState(type="gdn", key_heads=16, value_heads=32, key_head_dim=128, value_head_dim=128, conv_kernel=4)
    assert mine(gdn) == elements(MambaStateShapeCalculator.gated_delta_net_state_shape(tp, 16, 32, 128, 128, 4))
    kda = DeltaNetState(type="kda", key_heads=32, value_heads=32, key_head_dim=128, value_head_dim=128, conv_kernel=4)
    assert mine(kda) == elements(MambaStateShapeCalculator.kda_state_shape(tp, 32, 128))


def test_data_types_and_ranks() -> None:
    llama = load_model("llama-3.1-8b")
    assert llama.layer_types()[0].cell_bytes == 8 * 128 * 2 * 2
    assert llama.layer_types(kv_dtype="fp8")[0].cell_bytes == 8 * 128 * 2
    assert llama.layer_types(tp=4)[0].cell_bytes == 2 * 128 * 2 * 2
    assert llama.layer_types(tp=16)[0].cell_bytes == 128 * 2 * 2  # one head each: replicated
    qwen = load_model("qwen3-next-80b")
    full, half = (qwen.layer_types(state_dtype=d)[0].state_bytes for d in ("float32", "bfloat16"))  # type: ignore[arg-type]
    assert full - half == 32 * 128 * 128 * 2
    kimi = load_model("kimi-linear-48b")
    assert kimi.layer_types(tp=1)[1] == kimi.layer_types(tp=2)[1], "latents are replicated"
    with pytest.raises(ModelError, match=r"kv_heads: 8 cannot be shared by 3 tensor-parallel ranks"):
        llama.layer_types(tp=3)


def test_bytes_that_a_sequence_needs() -> None:
    window = LayerType("w", SlidingWindow(100), 2, cell_bytes=10)
    assert window.needed_bytes(50) == 2 * 50 * 10
    assert window.needed_bytes(1000) == 2 * 99 * 10  # those the next token attends to, itself aside
    assert window.needed_bytes(1000, 16) == 2 * 160 * 7  # tokens 901 to 999 lie in pages 56 to 62
    with pytest.raises(ValueError, match="do not hold whole cells of 4"):
        LayerType("i", SlidingWindow(100), 1, cell_bytes=132, cell_tokens=4).page_bytes(6)
    assert pages_held(CrossAttention(), 33, 16) == 3
    assert pages_held(CrossAttention(), 0, 16) == 0
    assert [c.length(5, 7) for c in Counts] == [5, 7, 12]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("name: x", "source: Field required; layers: Field required"),
        ("{name: x, source: y, layers: [{kind: full, layers: 1}]}", "full_attention"),
        ("{name: x, source: y, layers: [{kind: mla, layers: 1, latent_size: 1, heads: 2}]}", "heads: Extra inputs"),
        ("{name: x, source: y, layers: [{kind: mla, layers: 0, latent_size: 1}]}", "greater than 0"),
        ("[1, 2]", "file: "),
    ],
)
def test_bad_descriptions(text: str, message: str) -> None:
    with pytest.raises(ModelError) as error:
        parse_model(text, "my.yaml")
    assert message in str(error.value)
    assert "my.yaml" in str(error.value)


def test_models_are_found_by_name_and_path(tmp_path: Path) -> None:
    copy = tmp_path / "own.yaml"
    copy.write_text((ZOO / "gemma-3-1b.yaml").read_text())
    assert load_model(str(copy)) == load_model("gemma-3-1b")
    with pytest.raises(ModelError, match=r"Did you mean gemma-3-27b\?"):
        load_model("gemma3-27b")
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        load_model(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not known; known: falcon_h1"),
        ({}, "model_type None is not known"),
        ({"model_type": "llama", "num_hidden_layers": 2}, "field 'num_attention_heads' is missing"),
        ({"model_type": "llama", "num_hidden_layers": "2"}, "not a whole number"),
        (PUBLIC["llama-3.1-8b"] | {"num_key_value_heads": -1}, "greater than 0"),
        (PUBLIC["gemma-2-27b"] | {"layer_types": ["odd"]}, "layer_types names odd"),
    ],
)
def test_bad_configurations(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        described(config, tmp_path, 1)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_configurations_that_are_no_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        from_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        from_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        from_hf_config(tmp_path)


def test_every_known_architecture_is_reachable() -> None:
    """Each converter is used by the zoo's models, or is an alias of one that is."""
    used = {c["model_type"] for c in PUBLIC.values()} | {folder for folder, _ in DEFAULTS.values()} | {"glm5_next"}
    converters = {KNOWN[kind] for kind in used}
    assert set(KNOWN.values()) == converters
