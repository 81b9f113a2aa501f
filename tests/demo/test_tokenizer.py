"""The demo models' tokenizer loses nothing and keeps words of the task whole."""

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jenga.demo import recall, tokenizer

TOKENIZER = tokenizer.build(4096)


# Text that spells a special token is one, by design; anything else must survive.
@given(st.text().filter(lambda text: not any(special in text for special in tokenizer.SPECIAL)))
@settings(deadline=None)
def test_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids[0] == tokenizer.BOS
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("word", [*recall.KEYS[::37], *recall.VALUES[::9], *tokenizer.MARKS, "=", *tokenizer.SPECIAL])
def test_words_are_single_tokens(word: str) -> None:
    assert TOKENIZER.encode(word, add_special_tokens=False) == [tokenizer.token_id(word)]


def test_ids_are_dense_and_distinct() -> None:
    ids = tokenizer.vocabulary()
    assert sorted(ids.values()) == list(range(len(TOKENIZER)))


def test_token_id_refuses_what_is_no_token() -> None:
    with pytest.raises(KeyError):
        tokenizer.token_id("hello")


def render(messages: list[dict[str, object]], prompt: bool = True) -> str:
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


def test_chat_template() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a1=02; ? a1="},
        {"role": "assistant", "content": "02"},
        {"role": "user", "content": [{"type": "text", "text": "? a1="}]},
    ]
    body = "<bos><system>s<end><user>a1=02; ? a1=<end><model>02<end><user>? a1=<end>"
    assert render(messages) == body + "<model>"
    assert render(messages, prompt=False) == body


def test_chat_template_refuses_unknown_roles() -> None:
    with pytest.raises(jinja2.TemplateError, match="role tool"):
        render([{"role": "tool", "content": "x"}])
