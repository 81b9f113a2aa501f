"""Demo models: complete folders, the same bytes for the same seed, and right answers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    WhisperForConditionalGeneration,
)
from typer.testing import CliRunner

from jenga import demo
from jenga.cli import app
from jenga.demo import cli, gemma3, recall, tokenizer, train

FILES = {
    "config.json",
    "model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "jenga-demo.json",
}


def files_of(name: str) -> set[str]:
    return FILES | {"preprocessor_config.json"} if name == "whisper" else FILES


# As far as the sliding layers, one above the other, can carry anything; behind that, only the full layer.
SLIDING_REACH = gemma3.LAYERS.count("sliding_attention") * gemma3.WINDOW


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models")
    for name in demo.NAMES:
        demo.make(name, out)
    return out


@pytest.mark.parametrize("name", demo.NAMES)
def test_a_folder_is_complete_small_and_loads(models: Path, name: str) -> None:
    folder = models / name
    assert {path.name for path in folder.iterdir()} == files_of(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    config = AutoConfig.from_pretrained(folder)
    if name == "whisper":
        _, info = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    else:
        kinds = config.layer_types
        assert len(set(kinds)) == 2
        assert kinds.count(kinds[0]) != kinds.count(kinds[-1])
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder).encode("a1=02") == [
        tokenizer.BOS,
        *map(tokenizer.token_id, ("a1", "=", "02")),
    ]


@pytest.mark.parametrize("name", demo.NAMES)
def test_same_seed_same_bytes(models: Path, name: str, tmp_path: Path) -> None:
    again = demo.make(name, tmp_path)
    for file in files_of(name):
        assert (again / file).read_bytes() == (models / name / file).read_bytes(), file


def test_the_shipped_checkpoint_is_under_two_megabytes(models: Path) -> None:
    assert (models / "gemma3-recall" / "model.safetensors").stat().st_size < 2_000_000


def test_a_complete_folder_is_kept_and_a_torn_or_outdated_one_mended(tmp_path: Path) -> None:
    folder = demo.make("gemma3-recall", tmp_path)
    weights = folder / "model.safetensors"
    whole, written = weights.read_bytes(), weights.stat().st_mtime_ns
    assert demo.make_reporting("gemma3-recall", tmp_path).kept
    assert weights.stat().st_mtime_ns == written

    weights.write_bytes(whole[:1000])
    assert not demo.make_reporting("gemma3-recall", tmp_path).kept
    assert weights.read_bytes() == whole

    stamp = json.loads((folder / "jenga-demo.json").read_text())
    stamp["recipe"]["version"] = -1
    (folder / "jenga-demo.json").write_text(json.dumps(stamp))
    assert not demo.make_reporting("gemma3-recall", tmp_path).kept
    assert demo.make_reporting("gemma3-recall", tmp_path).kept
    assert not demo.make_reporting("gemma3-recall", tmp_path, force=True).kept
    assert [path.name for path in tmp_path.iterdir()] == ["gemma3-recall"]


def test_a_folder_that_is_no_demo_model_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "gemma3-recall" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(demo.DemoModelError, match="--force"):
        demo.make("gemma3-recall", tmp_path)
    assert mine.read_text() == "precious"
    demo.make("gemma3-recall", tmp_path, force=True)
    assert not mine.exists()


def test_an_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(demo.DemoModelError, match="--out"):
        demo.make("gemma3-recall", tmp_path / "file")


def command() -> Callable[..., object]:
    import typer

    program = typer.Typer()
    program.callback()(lambda: None)
    cli.add_commands(program)
    return lambda *arguments: CliRunner().invoke(program, ["demo-model", *arguments])


def test_command_makes_then_keeps(tmp_path: Path) -> None:
    run = command()
    first = run("gemma3-recall", "--out", str(tmp_path))
    second = run("gemma3-recall", "--out", str(tmp_path))
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "gemma3-recall: made" in first.output
    assert "kept, complete already" in second.output


def test_command_refuses_an_unknown_name_and_training_what_is_not_trained(tmp_path: Path) -> None:
    run = command()
    unknown = run("gemma5", "--out", str(tmp_path))
    assert unknown.exit_code == 1
    assert "granite-hybrid" in unknown.output
    untrainable = run("qwen3-next", "--train", "--out", str(tmp_path))
    assert untrainable.exit_code == 1
    assert "only gemma3-recall" in untrainable.output
    assert not any(tmp_path.iterdir())


def test_the_command_line_loads_no_torch() -> None:
    assert app is not None
    code = (
        "import sys, typer, jenga.cli, jenga.demo.cli, jenga.demo, jenga.demo.recall;"
        "jenga.demo.cli.add_commands(typer.Typer());"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def model(models: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(models / "gemma3-recall", dtype=torch.bfloat16).eval()


def ask(model: PreTrainedModel, question: recall.Question) -> str:
    """The greedy answer through the chat template, as text."""
    words = tokenizer.build(gemma3.CONTEXT)
    prompt = words.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([words.encode(prompt, add_special_tokens=False)])
    out = model.generate(ids, do_sample=False, temperature=None, max_new_tokens=question.answer_tokens + 1)
    assert out[0, -1] == tokenizer.END, "the answer does not end where it should"
    text = words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def test_recall_of_pairs_far_outside_the_window(model: PreTrainedModel) -> None:
    questions = [recall.question(seed, 255, beyond=SLIDING_REACH) for seed in range(50)]
    right = sum(ask(model, each) == each.answer for each in questions)
    assert right >= 49


def test_recital_longer_than_the_window(model: PreTrainedModel) -> None:
    questions = [recall.question(seed, 60, beyond=120, verb="!") for seed in range(3)]
    assert min(each.answer_tokens for each in questions) > gemma3.WINDOW
    assert [ask(model, each) for each in questions] == [each.answer for each in questions]


@pytest.mark.parametrize("layer", [gemma3.LAYERS.index("sliding_attention"), gemma3.LAYERS.index("full_attention")])
def test_a_wrong_page_is_a_wrong_answer(model: PreTrainedModel, layer: int) -> None:
    """A recital goes on over 32 tokens of another prompt's KV, as if one page had been mixed up."""
    words = tokenizer.build(gemma3.CONTEXT)
    said = 4 * 10 + 1  # a value was said last: what comes next hangs on its key, two tokens back

    def state(seed: int) -> tuple[DynamicCache, list[int], int]:
        made = recall.question(seed, 100, beyond=200, verb="!")
        answer = words.encode(made.answer, add_special_tokens=False)
        ids = words.encode(made.text)
        cache = DynamicCache(config=model.config)
        model(torch.tensor([ids + answer[: said - 1]]), past_key_values=cache)
        return cache, answer, len(ids) - 1 - made.distance

    def recited(cache: DynamicCache, answer: list[int]) -> bool:
        token = answer[said - 1]
        for wanted in answer[said : said + 24]:
            token = int(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].argmax())
            if token != wanted:
                return False
        return True

    sound, mixed = 0, 0
    for seed in range(5):
        cache, answer, asked = state(seed)
        sound += recited(cache, answer)
        cache, answer, asked = state(seed)
        other, _, _ = state(seed + 1000)
        # In the full layer the pairs to be said next, in the sliding one the latest tokens.
        page = slice(asked + said, asked + said + 32) if layer == len(gemma3.LAYERS) - 1 else slice(-32, None)
        for mine, theirs in (
            (cache.layers[layer].keys, other.layers[layer].keys),
            (cache.layers[layer].values, other.layers[layer].values),
        ):
            mine[:, :, page] = theirs[:, :, page]
        mixed += recited(cache, answer)
    assert (sound, mixed) == (5, 0)


def test_the_answer_needs_the_pair(model: PreTrainedModel) -> None:
    """Guards the tests above: without the asked pair the model cannot know, so memory is what they test."""
    questions = [recall.question(seed, 60, beyond=100) for seed in range(20)]
    blind = [
        recall.Question(each.text.replace(f"{each.text[-3:-1]}={each.answer}; ", "", 1), each.answer, each.distance)
        for each in questions
    ]
    assert sum(ask_first(model, each) == each.answer for each in blind) <= 3


def ask_first(model: PreTrainedModel, question: recall.Question) -> str:
    words = tokenizer.build(gemma3.CONTEXT)
    logits = model(torch.tensor([words.encode(question.text)])).logits
    return str(words.decode([int(logits[0, -1].argmax())]))


def test_training_is_seeded_and_learns() -> None:
    def run() -> tuple[list[float], dict[str, torch.Tensor]]:
        made, losses = gemma3.sketched(1), []
        train.train(made, 1, lambda p: losses.append(p.loss), stages=(train.Stage((64,), 1024, 12),))
        return losses, made.state_dict()

    (losses, state), (again, state_again) = run(), run()
    assert losses == again
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert losses[-1] < losses[0]
