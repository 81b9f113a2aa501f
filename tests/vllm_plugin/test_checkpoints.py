"""What the plugin keeps of windows and states: hits where later requests resume, and the right tokens from them."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vllm.v1.core.sched.scheduler import Scheduler

from jenga.checkpoints import GPU_PASS_TOKENS, PASS_TOKENS, SharedPrefixes
from jenga.demo import make
from jenga.hits import Hit
from jenga.policies import FullAttention, RecurrentState
from jenga.routing import GroupRule, HitRule
from jenga.routing.expected import stored_by
from jenga.vllm_plugin import settings
from jenga.vllm_plugin.checkpoints import Checkpoints
from jenga.vllm_plugin.config import CheckpointOptions
from tests.vllm_plugin.harness import run

RUNNER = Path(__file__).with_name("chat_run.py")
BLOCK, ANSWER, SYSTEM_TOKENS = 32, 40, 192
BOS, END, USER, MODEL, SYSTEM = "<bos>", "<end>", "<user>", "<model>", "<system>"


def special(model: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return {t: tokenizer.convert_tokens_to_ids(t) for t in (BOS, END, USER, MODEL, SYSTEM)}


def chats(
    ids: dict[str, int], turns: int, systems: int = 2, each: int = 2, question: int = 30
) -> list[list[list[int]]]:
    """`each` conversations with each of `systems` system prompts; the first starts a turn before the others."""
    rng = random.Random(5)

    def words(count: int) -> list[int]:
        return [rng.randrange(40, 200) for _ in range(count)]

    made = []
    for _ in range(systems):
        start = [ids[BOS], ids[SYSTEM], *words(SYSTEM_TOKENS - 4), ids[END], ids[USER]]
        for nth in range(each):
            asked = [[*words(question), ids[END], ids[MODEL]] for _ in range(turns)]
            made.append([[]] * (nth > 0) + [start + asked[0], *([ids[END], ids[USER], *a] for a in asked[1:])])
    return made


def spec(model: Path, mebibytes: float, *, caching: bool = True, **engine: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "answer": ANSWER,
        "engine": {
            "dtype": "float32",
            "max_model_len": 1024,
            "block_size": BLOCK,
            "kv_cache_memory_bytes": int(mebibytes * 2**20),
            "enable_prefix_caching": caching,
            "max_num_batched_tokens": 400,
            **engine,
        },
    }


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("granite-hybrid", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("gemma3-recall", tmp_path_factory.mktemp("models"))


def check_hits(result: dict[str, Any]) -> None:
    """System prompts are resumed from the second sighting on; turns recompute what is new, and at most a block."""
    for nth, turns in enumerate(result["hits"]):
        assert turns[0][1] == (SYSTEM_TOKENS if nth % 2 else 0)
        for (before, _), (_, cached) in pairwise(turns):
            # The last token of an answer was not computed, and hits are whole blocks.
            assert before + ANSWER - 1 - cached < BLOCK


def test_chats_on_states(granite: Path, tmp_path: Path) -> None:
    """Mamba-2: from kept states the answers are, in float32, those of stock vLLM without a cache."""
    given = {"chats": chats(special(granite), turns=3)}
    kept = run(tmp_path, "kept", spec(granite, 64) | given, jenga=True, runner=RUNNER)
    check_hits(kept)
    assert kept["live_after"] == kept["preemptions"] == kept["given_up"] == 0
    stock = run(tmp_path, "stock", spec(granite, 64, caching=False) | given, jenga=False, runner=RUNNER)
    assert kept["answers"] == stock["answers"]

    # Memory for about one conversation: states are given up, evicted and overwritten, and never wrong.
    given = {"chats": chats(special(granite), turns=3, systems=3)}
    short = run(tmp_path, "short", spec(granite, 3.0) | given, jenga=True, runner=RUNNER)
    assert min(short["evicted"], short["given_up"]) > 0
    assert short["live_after"] == 0
    assert sum(cached for turns in short["hits"] for _, cached in turns) > 0
    again = run(tmp_path, "again", spec(granite, 64, caching=False) | given, jenga=False, runner=RUNNER)
    assert short["answers"] == again["answers"]


def test_chats_on_windows(gemma: Path, tmp_path: Path) -> None:
    """Sliding windows are kept at the same places; `checkpoints` settings turn that off."""
    given = {"chats": chats(special(gemma), turns=3)}
    kept = run(tmp_path, "kept", spec(gemma, 64) | given, jenga=True, runner=RUNNER)
    check_hits(kept)
    off = {"additional_config": {"jenga": {"checkpoints": {"turns": False, "answers": False}}}}
    less = run(tmp_path, "less", spec(gemma, 64, **off) | given, jenga=True, runner=RUNNER)
    assert kept["answers"] == less["answers"]
    spared = [sum(cached for turns in result["hits"] for _, cached in turns) for result in (kept, less)]
    assert spared[0] > spared[1] > 0


def test_settings_name_what_is_wrong(gemma: Path, tmp_path: Path) -> None:
    wrong = {"additional_config": {"jenga": {"checkpoints": {"turn": False}}}}
    with pytest.raises(RuntimeError, match=r"additional_config\.jenga\.checkpoints\.turn = False: .*not permitted"):
        run(tmp_path, "wrong", spec(gemma, 64, **wrong) | {"chats": []}, jenga=True, runner=RUNNER)


@pytest.mark.parametrize("value", [0, -256, 1.5, "256", True, None])
def test_bad_costs_of_a_pass(value: object) -> None:
    config: Any = SimpleNamespace(additional_config={"jenga": {"checkpoints": {"pass_tokens": value}}})
    with pytest.raises(ValueError, match=r"checkpoints\.pass_tokens = .*: Input should be .*a number of tokens, 1 or"):
        settings.read(config)


def test_a_pass_costs_more_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = SimpleNamespace(additional_config={"jenga": {"checkpoints": {"turns": False}}})
    assert settings.read(config).checkpoints.pass_tokens == PASS_TOKENS
    monkeypatch.setattr(settings.current_platform, "is_cuda_alike", lambda: True)
    for chosen in ({}, config.additional_config):
        config.additional_config = chosen
        assert settings.read(config).checkpoints.pass_tokens == GPU_PASS_TOKENS


ALIGNMENT, MARK = 16, 9


@hypothesis_settings(max_examples=300)
@given(
    length=st.integers(2, 900) | st.integers(600, 900),
    turns=st.sets(st.integers(0, 900), max_size=3),
    resumed=st.integers(0, 20),
    further=st.integers(0, 40),
    known=st.lists(st.integers(0, 55), max_size=3),
    pass_tokens=st.sampled_from([1, 40, 256, 900, 4000]),
    budget=st.sampled_from([10_000, 10_000, 500, 170]),
)
def test_engine_and_router_agree_where_a_prefill_pauses(
    length: int, turns: set[int], resumed: int, further: int, known: list[int], pass_tokens: int, budget: int
) -> None:
    """vLLM's own split, corrected by the plugin, ends its chunks where the router expects states."""
    tokens = [MARK if i in turns else 100 for i in range(length)]
    most = (length - 1) // ALIGNMENT
    furthest = min(resumed + further, most) * ALIGNMENT
    hit = Hit(min(resumed, most) * ALIGNMENT, furthest, None)
    keys = list(range(1000, 1000 + length // ALIGNMENT))
    engine = Checkpoints(CheckpointOptions(frozenset({MARK}), pass_tokens=pass_tokens), ALIGNMENT, ALIGNMENT)
    router = SharedPrefixes()
    for junctions in (engine.shared, router):
        for page in known:
            junctions.learn(1000 + page)
    request: Any = SimpleNamespace(
        request_id="r",
        block_hashes=keys,
        prompt_token_ids=tokens,
        num_tokens=length,
        num_prompt_tokens=length,
        num_computed_tokens=0,
        shared_prefix_boundary=furthest if furthest > hit.tokens else 0,
    )
    scheduler: Any = SimpleNamespace(
        block_size=ALIGNMENT,
        hash_block_size=ALIGNMENT,
        cache_config=SimpleNamespace(block_size=ALIGNMENT),
        scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
        max_num_scheduled_tokens=budget,
        mamba_partial_cache_hit=False,
        mamba_shared_prefix_checkpoint=False,
        mamba_has_prefill_checkpoint_blocks=False,
        use_eagle_block_drop=False,
    )
    ends, start = [], hit.tokens
    while start < length:
        chunk = min(budget, length - start)
        before = hit.tokens if request.num_computed_tokens == 0 else 0
        stock = Scheduler._mamba_block_aligned_split(scheduler, request, chunk, before)
        start += engine.chunk(request, start, chunk, stock)
        request.num_computed_tokens = start
        ends.append(start)
    groups = (GroupRule("full", FullAttention(), ALIGNMENT), GroupRule("state", RecurrentState(), ALIGNMENT))
    rule = HitRule(groups, ALIGNMENT, ALIGNMENT, "ab", frozenset({MARK}), pass_tokens)
    rule = HitRule.from_dict(rule.to_dict())
    expected = [(key - 999) * ALIGNMENT for key in stored_by(rule, tokens, keys, hit, router)[1]]
    assert set(expected) <= set(ends)
    assert all(end % ALIGNMENT == 0 for end in ends[:-1]), "a state within a block could not be cached"
    if budget > length:
        assert set(ends) == {*expected, length}, "no pause that nobody needs"
