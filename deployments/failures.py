"""What engines say in their logs: why one did not start, and the plan of its memory.

vLLM's engine core is a process of its own.  When it fails, the parent only learns "Engine core
initialization failed. See root cause above"; the cause is in the log.
"""

import re
from collections.abc import Iterable

# Escape sequences that terminals read as colours.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# `(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:1510] ` in front of each line of a logged traceback.
_LOG_PREFIX = re.compile(r"^(\([^)]*pid=\d+[^)]*\)\s*)+|^(ERROR|CRITICAL)\s+[\d-]+ [\d:.]+ \[[^\]]*\]\s?")
_RAISED = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?(?P<type>[A-Z]\w*(?:Error|Exception|Exit|Interrupt))(?:: (?P<text>.*))?$")
# Exceptions that only say that something below failed.
_WRAPPERS = (
    "Traceback (most recent call last)",
    "Engine core initialization failed",
    "Failed to create vLLM engine config",
    "WorkerProc init",
)


def _plain(line: str) -> str:
    line = _COLOUR.sub("", line.rstrip())
    while match := _LOG_PREFIX.match(line):
        line = line[match.end() :]
    return line


def root_cause(lines: Iterable[str]) -> str | None:
    """The message of the first exception that is not merely a wrapper, None if there is none.

    The first, because what follows in a log is raised by those who watched it fail.  Indented lines
    behind it belong to the message.
    """
    cause: list[str] = []
    for line in map(_plain, lines):
        if cause:
            if not line.startswith("  "):
                break
            cause.append(line)
            continue
        match = _RAISED.match(line)
        if not match:
            continue
        text = (match["text"] or "").strip()
        if any(text.startswith(wrapper) for wrapper in _WRAPPERS):
            # `... config: <cause>` carries the cause itself.
            _, _, text = text.partition("config: ")
            if not text:
                continue
        cause.append(text or match["type"])
    return "\n".join(cause) or None


# What vLLM says when the pool cannot hold one longest request, and what to do about it here.
_KV_TOO_SMALL = re.compile(
    r"To serve at least one request|larger than the available KV cache memory|No available memory for the cache"
    r"|do(?:es)? not hold one (?:large page|request)"
)


def in_our_terms(reason: str, *, kv_memory: int | None, max_model_len: int | None) -> str:
    """``reason`` with the settings of our file that decide it; kv_memory in bytes, max_model_len in tokens."""
    reason = _unframed(reason)
    if _KV_TOO_SMALL.search(reason):
        size = f"{kv_memory:,} bytes" if kv_memory else "not set"
        length = f"{max_model_len:,} tokens" if max_model_len else "the model's own"
        longest = re.search(r"estimated maximum model length is (\d+)", reason)
        fits = f" It would hold about {int(longest[1]):,} tokens." if longest else ""
        return (
            f"the KV memory of a replica is too small for one request of the longest length: "
            f"engine.kv_memory is {size}, engine.max_model_len is {length}.{fits} "
            "Raise engine.kv_memory or lower engine.max_model_len."
        )
    return reason


# pydantic's frame around the message of a validator.
_PYDANTIC = re.compile(r"^\d+ validation errors? for \w+\n\s*(?:Value error, )?(?P<text>.*?) \[type=", re.DOTALL)


def _unframed(reason: str) -> str:
    match = _PYDANTIC.match(reason)
    return match["text"] if match else reason


_PLAN_TITLE = "Jenga's memory plan"


def memory_plan(lines: Iterable[str]) -> str | None:
    """The start-up table of `jenga.vllm_plugin` out of an engine's log, None if it is not there."""
    plan: list[str] = []
    prefix = None
    for line in lines:
        if prefix is None:
            start = line.find(_PLAN_TITLE)
            if start >= 0:
                # vLLM repeats the prefix on every line of one message.
                prefix = line[:start]
        elif line.startswith(prefix):
            plan.append(line[len(prefix) :].rstrip())
        else:
            break
    return "\n".join(plan) or None
