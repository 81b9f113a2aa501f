"""What a request's body may hold before anything is made of it: no depth, number or count that costs others their time.

vLLM's request classes describe every fault of every part of a body, which takes seconds and gigabytes for a body of
many wrong parts; pickling fails on deep ones, and msgpack on numbers beyond 64 bits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from deployments.config import Limits

MOST_DEPTH = 64
"""Objects and lists within each other; vLLM allows a JSON schema as many."""
_INTEGERS = range(-(2**63), 2**63)
# Lists of token ids, which may be as long as the body: fields of a request, by name.
_TOKEN_LISTS = ("prompt", "stop_token_ids", "allowed_token_ids")
# Fields that are compiled to a grammar.
_FORMS = ("structured_outputs", "response_format")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_OPENING = frozenset(b"[{")
_TOO_LARGE_A_NUMBER = "Whole numbers may have at most 64 bits."


@dataclass(frozen=True)
class Fault:
    """Why a body is refused, and OpenAI's short name for it."""

    message: str
    code: str
    param: str | None = None


def fault(body: bytes, limits: Limits, context: int | None = None) -> Fault | None:
    """What is wrong with a body; None where nothing is, or where it is no JSON, which its parser tells better.

    `context`: tokens that the model can have, None if that is not known here.
    """
    if b"\0" in body or not _is_utf8(body):
        return Fault("The request body is not JSON in UTF-8.", "invalid_json")
    if found := _shape_fault(body, limits.values):
        return found
    try:
        data = json.loads(body)
    except (json.JSONDecodeError, RecursionError):
        return None
    except ValueError:
        # Python refuses to read numbers of more than some thousand digits.
        return Fault(_TOO_LARGE_A_NUMBER, "invalid_value")
    return _Walk(limits.values).fault(data) or _form_fault(data, limits) or _length_fault(data, limits, context)


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _too_many(most: int) -> Fault:
    return Fault(
        f"The request body has more than {most:,} strings, numbers, lists and objects, token ids not counted, which is "
        "the most that is taken here (limits.values).",
        "too_many_values",
    )


def _shape_fault(body: bytes, most: int) -> Fault | None:
    """Depth and number of strings, lists and objects, without parsing, and in little time whatever comes."""
    # Without escapes every quote begins or ends a string.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = plain.count(b'"') // 2
    pieces = plain.split(b'"', 2 * most + 1)
    brackets = b"".join(pieces[: 2 * most + 1 : 2]).translate(None, _NOT_BRACKETS)
    depth = parts = 0
    for bracket in brackets[: 2 * most + 1]:
        if bracket in _OPENING:
            depth += 1
            parts += 1
            if depth > MOST_DEPTH:
                return Fault(
                    f"The request body nests lists and objects deeper than {MOST_DEPTH} levels.", "nested_too_deeply"
                )
        else:
            depth -= 1
    return _too_many(most) if strings + parts > most or len(brackets) > 2 * most else None


class _Walk:
    """One pass over a parsed body, whose depth is bounded already."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most

    def fault(self, data: Any) -> Fault | None:
        """The first fault found."""
        if not isinstance(data, dict):
            return self._value(data)
        for name, value in data.items():
            if found := self._string(name):
                return found
            tokens = isinstance(value, list) and name in _TOKEN_LISTS
            found = self._tokens(value) if tokens else self._value(value)
            if found:
                return Fault(found.message, found.code, name)
        return None

    def _value(self, value: Any) -> Fault | None:
        self._left -= 1
        if self._left < 0:
            return _too_many(self._most)
        if isinstance(value, str):
            return self._string(value)
        if isinstance(value, int):
            return self._integer(value)
        if isinstance(value, float):
            # JSON has none of these, and answers that repeat them could not be written.
            finite = value - value == 0
            return None if finite else Fault("NaN and infinite numbers are not JSON.", "invalid_value")
        if isinstance(value, dict):
            return next((f for k, v in value.items() if (f := self._string(k) or self._value(v))), None)
        if isinstance(value, list):
            return next((f for v in value if (f := self._value(v))), None)
        return None

    def _tokens(self, value: list[Any]) -> Fault | None:
        """Token ids are looked at all at once; whatever else the list holds, one by one."""
        kinds = set(map(type, value))
        if kinds == {int}:
            return self._integer(min(value)) or self._integer(max(value))
        if kinds == {list}:
            return next((f for each in value if (f := self._tokens(each))), None)
        return self._value(value)

    def _string(self, text: str) -> Fault | None:
        if text.isascii():
            return None
        try:
            text.encode()
        except UnicodeEncodeError:
            return Fault("The request body is not valid Unicode (a lone surrogate).", "invalid_value")
        return None

    def _integer(self, value: int) -> Fault | None:
        return None if value in _INTEGERS else Fault(_TOO_LARGE_A_NUMBER, "invalid_value")


def _form_fault(data: Any, limits: Limits) -> Fault | None:
    """What would be described in vain, or compiled for too long."""
    if not isinstance(data, dict):
        return None
    messages = data.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        where = f"messages.{number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return Fault(f"{where}: This is no message: an object with a role.", "invalid_value", where)
        content = message.get("content")
        if isinstance(content, list) and not set(map(type, content)) <= {dict, str}:
            where += ".content"
            return Fault(f"{where}: Parts are texts or objects with a type.", "invalid_value", where)
    most = int(limits.grammar)
    for name in _FORMS:
        if name in data and len(json.dumps(data[name], ensure_ascii=False)) > most:
            return Fault(
                f"{name}: This is longer than {most:,} characters, which is the most that is compiled here "
                "(limits.grammar).",
                "grammar_too_large",
                name,
            )
    return None


def too_long(tokens: int, most: int) -> Fault:
    """The refusal of a prompt of more than `most` tokens."""
    return Fault(
        f"Prompts may have at most {most} tokens here (limits.prompt_tokens). However, your prompt has {tokens} "
        "tokens. Please reduce the length of the prompt.",
        "context_length_exceeded",
    )


def _length_fault(data: Any, limits: Limits, context: int | None) -> Fault | None:
    """A prompt of too many tokens, where it is sent as tokens: validating each of them is what takes time."""
    prompt = data.get("prompt") if isinstance(data, dict) else None
    if not isinstance(prompt, list) or data.get("truncate_prompt_tokens") is not None:
        return None
    prompts = [prompt] if prompt and type(prompt[0]) is int else [each for each in prompt if isinstance(each, list)]
    length = max(map(len, prompts), default=0)
    if limits.prompt_tokens is not None and length > limits.prompt_tokens:
        return too_long(length, limits.prompt_tokens)
    if context is not None and length > context:
        return Fault(
            f"This model's maximum context length is {context} tokens. However, your prompt has {length} tokens. "
            "Please reduce the length of the prompt.",
            "context_length_exceeded",
            "prompt",
        )
    return None
