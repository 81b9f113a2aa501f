"""The recall task is what it says: unambiguous, seeded, and of the stated length."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jenga.demo import recall, tokenizer

TOKENIZER = tokenizer.build(4096)

seeds = st.integers(0, 2**32)
sizes = st.integers(1, len(recall.KEYS))


def lookup(text: str, key: str) -> list[str]:
    """Every value that a reader of the prompt could take for `key`'s."""
    return re.findall(rf"(?<![A-Za-z0-9]){key}=(\d\d)", text)


@given(seeds, sizes, st.sampled_from(["?", "!"]))
def test_a_prompt_has_exactly_one_right_answer(seed: int, pairs: int, verb: recall.Verb) -> None:
    made = recall.question(seed, pairs, verb=verb)
    key = made.text[-3:-1]
    assert made.text.endswith(f"{verb} {key}=")
    values = lookup(made.text, key)
    assert len(values) == 1
    if verb == "?":
        assert made.answer == values[0]
    else:
        table = made.text[: made.text.index("! ")]
        assert f"{key}={made.answer}" == table[table.index(f"{key}=") :]


@given(seeds, sizes, st.sampled_from(["?", "!"]))
@settings(deadline=None)
def test_stated_lengths_are_the_tokenizers(seed: int, pairs: int, verb: recall.Verb) -> None:
    made = recall.question(seed, pairs, verb=verb)
    prompt = TOKENIZER.encode(made.text, add_special_tokens=False)
    assert len(prompt) == recall.TOKENS_PER_PAIR * pairs + recall.QUESTION_TOKENS
    assert len(TOKENIZER.encode(made.answer, add_special_tokens=False)) == made.answer_tokens
    value = tokenizer.token_id(made.answer[:2])
    assert prompt[len(prompt) - 1 - made.distance] == value


@given(seeds, st.integers(20, len(recall.KEYS)), st.integers(0, 70))
def test_beyond_keeps_the_asked_pair_away_from_the_end(seed: int, pairs: int, beyond: int) -> None:
    assert recall.question(seed, pairs, beyond=beyond).distance > beyond


def test_same_seed_same_question_and_other_seed_another() -> None:
    assert recall.question(7, 50) == recall.question(7, 50)
    assert len({recall.question(seed, 50) for seed in range(100)}) == 100


@given(st.integers(11, 2087))
@settings(deadline=None)
def test_pairs_for_fills_but_never_exceeds_the_tokens(tokens: int) -> None:
    def length(pairs: int) -> int:
        messages = recall.question(0, pairs).messages
        text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(TOKENIZER.encode(text, add_special_tokens=False))

    pairs = recall.pairs_for(tokens)
    assert length(pairs) <= tokens
    assert pairs == len(recall.KEYS) or length(pairs + 1) > tokens


@pytest.mark.parametrize("pairs", [0, -1, len(recall.KEYS) + 1])
def test_impossible_tables_are_refused(pairs: int) -> None:
    with pytest.raises(ValueError, match=f"pairs={pairs}"):
        recall.table(0, pairs)


def test_impossible_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond=100"):
        recall.question(0, 5, beyond=100)
