"""What a request's body may hold before anything is made of it: no depth, number or count that costs others their time.

vLLM's request classes describe every fault of every part of a body, which takes seconds and gigabytes for a body of
many wrong parts; pickling fails on deep ones, and msgpack on numbers beyond 64 bits.
"""

from __future__ import annotations

import json
import re
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
# A string, or what opens or closes a list or an object, with what is in front of it.  Possessive, so that it is linear.
_PART = re.compile(rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"|([\[{])|[\]}])', re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """Why a body is refused, and OpenAI's short name for it."""

    message: str
    code: str
    param: str | None = None


def fault(body: bytes, limits: Limits) -> Fault | None:
    """What is wrong with a body; None where nothing is, or where it is no JSON, which its parser tells better."""
    if b"\0" in body or not _is_utf8(body):
        return Fault("The request body is not JSON in UTF-8.", "invalid_json")
    if found := _shape_fault(body, limits.values):
        return found
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return _Walk(limits.values).fault(data) or _form_fault(data, limits)


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
    """Depth and number of strings, lists and objects, without parsing: ends where there are too many."""
    at = depth = parts = 0
    while match := _PART.match(body, at):
        at = match.end()
        if match[1]:
            depth += 1
            if depth > MOST_DEPTH:
                return Fault(
                    f"The request body nests lists and objects deeper than {MOST_DEPTH} levels.", "nested_too_deeply"
                )
        elif body[at - 1] != 0x22:
            depth -= 1
            continue
        parts += 1
        if parts > most:
            return _too_many(most)
    return None


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
        return None if value in _INTEGERS else Fault("Whole numbers may have at most 64 bits.", "invalid_value")


def _form_fault(data: Any, limits: Limits) -> Fault | None:
    """What would be described in vain, or compiled for too long."""
    if not isinstance(data, dict):
        return None
    messages = data.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            where = f"messages.{number}"
            return Fault(f"{where}: This is no message: an object with a role.", "invalid_value", where)
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
