"""Bodies that are refused before anything is made of them, and those that are not."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.bodies import MOST_DEPTH, fault
from deployments.config import Limits

LIMITS = Limits(values=100, grammar=1000)  # type: ignore[arg-type]  # pydantic reads a size from a number


def code(body: bytes | dict[str, Any]) -> str | None:
    found = fault(body if isinstance(body, bytes) else json.dumps(body).encode(), LIMITS)
    return found and found.code


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "k" * 100_000}, None),
        ({"prompt": list(range(5000)), "stop_token_ids": [5] * 200}, None),
        ({"prompt": [list(range(500))] * 20}, None),
        ({"messages": [{"role": "user", "content": 'quotes \\" and [brackets{ in text'}] * 10}, None),
        ({"a": "😀", "b": [None, True, -(2**63), 2**63 - 1, 1.5]}, None),
        (nested(MOST_DEPTH), None),
        (nested(MOST_DEPTH + 1), "nested_too_deeply"),
        (b"[" * 1_000_000, "nested_too_deeply"),
        ({"messages": [{}] * 101}, "too_many_values"),
        ({f"k{i}": 1 for i in range(101)}, "too_many_values"),
        ({"tools": [1] * 101}, "too_many_values"),
        ({"prompt": [1] * 101 + [1.5]}, "too_many_values"),
        ({"prompt": [[1.5] * 60] * 2}, "too_many_values"),
        ({"bad_words": [1] * 101}, "too_many_values"),
        ({"x": {"stop_token_ids": [1] * 101}}, "too_many_values"),
        ({"top_k": 2**63}, "invalid_value"),
        ({"prompt": [1, -(2**63) - 1]}, "invalid_value"),
        (b'{"stop": ["\\ud800"]}', "invalid_value"),
        (b'{"\\udfff": 1}', "invalid_value"),
        (b'{"a": NaN}', "invalid_value"),
        (b'{"a": [1e999]}', "invalid_value"),
        ({"messages": [{"role": "user"}, 3]}, "invalid_value"),
        ({"messages": [{"content": "x"}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": [1]}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": ["x", {"type": "text", "text": "y"}]}]}, None),
        ({"structured_outputs": {"regex": "(" * 1000}}, "grammar_too_large"),
        (json.dumps({"a": 1}).encode("utf-16"), "invalid_json"),
        (b'{"a": "\xff"}', "invalid_json"),
        (b'{"a": ', None),
        (b'{"a": "never ends', None),
        (b"9" * 5000, "invalid_value"),
        (b'{"a": "' + b'\\"' * 500_000 + b'", "b": ' + b"[" * 65, "nested_too_deeply"),
        (b'{"a": "' + b"\\\\" * 9 + b'"' + b', "b": []' * 60 + b"}", "too_many_values"),
        (b"", None),
    ],
)
def test_a_body_is_refused_for_what_would_cost_others(body: bytes | dict[str, Any], expected: str | None) -> None:
    assert code(body) == expected


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ({"prompt": [1] * 8}, False),
        ({"prompt": [1] * 9}, True),
        ({"prompt": [[1] * 3] * 9}, False),
        ({"prompt": [[1], [1] * 9]}, True),
        ({"prompt": ["k"] * 9}, False),
        ({"prompt": [1] * 9, "truncate_prompt_tokens": 5}, False),
        ({"stop_token_ids": [1] * 9}, False),
    ],
)
def test_tokens_beyond_the_context_are_refused_unread(body: dict[str, Any], refused: bool) -> None:
    expected = "context_length_exceeded" if refused else None
    for limits, context in ((LIMITS, 8), (LIMITS.model_copy(update={"prompt_tokens": 8}), 100)):
        found = fault(json.dumps(body).encode(), limits, context)
        assert (found and found.code) == expected
        assert found is None or "at most 8 tokens" in found.message or "length is 8 tokens" in found.message


def test_a_number_of_many_digits_is_told_as_one() -> None:
    found = fault(b'{"seed": ' + b"9" * 5000 + b"}", LIMITS)
    assert found is not None
    assert found.message == "Whole numbers may have at most 64 bits."


TEXT = st.text(st.characters(codec="utf-8"))
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=20,
)


@given(st.dictionaries(TEXT, JSON, max_size=5), st.booleans())
@settings(max_examples=200)
def test_any_modest_body_passes(data: dict[str, Any], ascii_only: bool) -> None:
    data = {name: value for name, value in data.items() if name != "messages"}
    limits = Limits(values=10_000)
    assert fault(json.dumps(data, ensure_ascii=ascii_only).encode(), limits) is None


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_bytes_of_any_kind_make_no_exception(body: bytes) -> None:
    fault(body, LIMITS)
