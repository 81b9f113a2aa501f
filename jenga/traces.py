"""Request traces: what arrives when, how long it is, and what its prompt shares with others.

A prompt's contents are given as one id per block of `block_tokens` tokens; an id stands for its block *and everything
before it*, so equal ids mean equal prefixes (the format of Mooncake's traces, FAST'25).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOONCAKE_BLOCK_TOKENS = 512
_SYNTHETIC_BLOCK_TOKENS = 16


class TraceError(ValueError):
    """A trace cannot be read or made; the message names the file and line, or the setting, and the remedy."""


@dataclass(frozen=True)
class TraceRequest:
    """One request."""

    serial: int
    """Position in the trace, from 0; unique."""
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    block_tokens: int
    known_tokens: int
    """Tokens that `blocks` speaks of: the prompt and, in synthetic conversations, the answer as well."""
    image_tokens: int = 0
    """Tokens of the images that the prompt starts with; they are nobody else's."""

    @property
    def tokens(self) -> int:
        """Length at the end, in tokens."""
        return self.prompt_tokens + self.output_tokens

    def keys(self, page_tokens: int) -> list[int]:
        """Contents of every complete page of `page_tokens` tokens (see `jenga.prefix_cache.Keys`).

        Equal for two requests exactly where their blocks say that all tokens up to the page's end are equal.
        """
        size, blocks = self.block_tokens, self.blocks
        ends = range(page_tokens, self.known_tokens + 1, page_tokens)
        keys = [blocks[(end - 1) // size] * size + (end - 1) % size for end in ends]
        own = -((self.serial + 1) << 32)  # what is generated is nobody else's
        keys.extend(own + end for end in range((len(keys) + 1) * page_tokens, self.tokens + 1, page_tokens))
        return keys


class _MooncakeLine(BaseModel):
    """One line of a trace file."""

    model_config = ConfigDict(extra="ignore")  # other producers add fields of their own

    timestamp: float = Field(ge=0)
    """Milliseconds since the trace began."""
    input_length: int = Field(ge=1)
    output_length: int = Field(ge=1)
    hash_ids: list[int]


def read_mooncake(path: Path, limit: int | None = None) -> Iterator[TraceRequest]:
    """The first `limit` requests of a trace in Mooncake's format (JSON lines).

    Raises:
        TraceError: the file is missing, or a line is not a request.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, limit)):
                yield _parse(path, number, line)
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}; give a file in Mooncake's format") from None


def _parse(path: Path, number: int, line: str) -> TraceRequest:
    try:
        item = _MooncakeLine.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the line"
        raise TraceError(
            f"{path}, line {number + 1}: {where}: {first['msg']}; expected a JSON object with timestamp (ms), "
            "input_length, output_length and hash_ids (one per 512 tokens of the prompt)"
        ) from None
    blocks = -(-item.input_length // MOONCAKE_BLOCK_TOKENS)
    if len(item.hash_ids) != blocks:
        raise TraceError(
            f"{path}, line {number + 1}: {item.input_length} tokens need {blocks} hash_ids (one per "
            f"{MOONCAKE_BLOCK_TOKENS} tokens), not {len(item.hash_ids)}"
        )
    return TraceRequest(
        serial=number,
        arrival_s=item.timestamp / 1000,
        prompt_tokens=item.input_length,
        output_tokens=item.output_length,
        blocks=tuple(item.hash_ids),
        block_tokens=MOONCAKE_BLOCK_TOKENS,
        known_tokens=item.input_length,
    )


def chat(requests: int, seed: int = 0, image_tokens: int = 0) -> Iterator[TraceRequest]:
    """Short independent chats: 64 to 512 tokens in, 1 to 96 out."""
    rng, ids = random.Random(seed), _Ids()
    for serial in range(requests):
        prompt, output = rng.randint(64, 512), rng.randint(1, 96)
        yield _request(serial, ids.extend((), prompt), prompt, output, image_tokens=image_tokens)


def documents(requests: int, seed: int = 0, questions: int = 4) -> Iterator[TraceRequest]:
    """Long documents (8k to 64k tokens), `questions` questions of 32 to 256 tokens on each, 64 to 512 tokens out.

    The questions on one document are spread among those on about eight others.
    """
    rng, ids = random.Random(seed), _Ids()
    open_documents: list[tuple[tuple[int, ...], int, int]] = []
    for serial in range(requests):
        if len(open_documents) < 8:
            length = rng.randint(8_192, 65_536)
            open_documents.append((ids.extend((), length), length, questions))
        pick = rng.randrange(len(open_documents))
        blocks, length, left = open_documents[pick]
        if left > 1:
            open_documents[pick] = (blocks, length, left - 1)
        else:
            del open_documents[pick]
        prompt = length + rng.randint(32, 256)
        whole = blocks[: length // _SYNTHETIC_BLOCK_TOKENS]
        yield _request(serial, ids.extend(whole, prompt), prompt, rng.randint(64, 512))


def agents(requests: int, seed: int = 0, kinds: int = 4, concurrent: int = 32) -> Iterator[TraceRequest]:
    """Agents: conversations of many turns that start with one of `kinds` system prompts (1k to 6k tokens).

    A turn's prompt is all that was said before, the answers included, and 32 to 1024 new tokens (tool output); answers
    have 16 to 256 tokens.  `concurrent` conversations take turns at random; one ends after 4 to 20 turns.
    """
    rng, ids = random.Random(seed), _Ids()
    systems = []
    for _ in range(kinds):
        length = rng.randint(1_024, 6_144)
        systems.append((ids.extend((), length), length))
    talks: list[tuple[tuple[int, ...], int, int]] = []
    for serial in range(requests):
        if len(talks) < concurrent:
            talks.append((*rng.choice(systems), rng.randint(4, 20)))
        pick = rng.randrange(len(talks))
        blocks, said, turns = talks[pick]
        prompt = said + rng.randint(32, 1_024)
        output = rng.randint(16, 256)
        blocks = ids.extend(blocks[: said // _SYNTHETIC_BLOCK_TOKENS], prompt + output)
        if turns > 1:
            talks[pick] = (blocks, prompt + output, turns - 1)
        else:
            del talks[pick]
        yield _request(serial, blocks, prompt, output, answer_known=True)


SYNTHETIC = {"chat": chat, "documents": documents, "agents": agents}
"""Traces that need no file, by name."""


def arrivals(trace: Iterable[TraceRequest], rate: float | None, seed: int = 0) -> Iterator[TraceRequest]:
    """The trace with Poisson arrivals at `rate` requests per second; without a rate, all wait from the start.

    Raises:
        TraceError: the rate is not positive.
    """
    if rate is not None and rate <= 0:
        raise TraceError(f"a rate of {rate} requests per second is not positive; leave it out to saturate the engine")
    rng, now = random.Random(seed), 0.0
    for request in trace:
        if rate is not None:
            now += rng.expovariate(rate)
        yield replace(request, arrival_s=now)


def scaled(trace: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The trace with its own times, stretched so that `rate` requests arrive per second on average.

    Raises:
        TraceError: the rate is not positive, or all requests arrive at once.
    """
    if rate <= 0:
        raise TraceError(f"a rate of {rate} requests per second is not positive")
    first, last = min(r.arrival_s for r in trace), max(r.arrival_s for r in trace)
    if first == last:
        raise TraceError("all requests of the trace arrive at once, so their times cannot be scaled to a rate")
    stretch = len(trace) / rate / (last - first)
    return [replace(r, arrival_s=(r.arrival_s - first) * stretch) for r in trace]


def whole_blocks(trace: Iterable[TraceRequest]) -> list[TraceRequest]:
    """The trace with every prompt cut to the whole blocks that it is known by, and one token of its own.

    What two prompts share is known only in whole blocks, so the last, partial one always looks like nobody else's, and
    a conversation never seems to go on where its last prompt ended: what is kept there would be kept in vain.
    """
    cut = []
    for request in trace:
        whole = request.prompt_tokens // request.block_tokens
        tokens = whole * request.block_tokens
        if whole:
            blocks = request.blocks[:whole]
            request = replace(request, prompt_tokens=tokens + 1, known_tokens=tokens, blocks=blocks)
        cut.append(request)
    return cut


class _Ids:
    """Hands out block ids that nobody else has."""

    def __init__(self) -> None:
        self._next = 0

    def extend(self, blocks: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """`blocks` and as many new ones as cover `tokens` tokens."""
        more = -(-tokens // _SYNTHETIC_BLOCK_TOKENS) - len(blocks)
        first, self._next = self._next, self._next + more
        return blocks + tuple(range(first, first + more))


def _request(
    serial: int, blocks: tuple[int, ...], prompt: int, output: int, *, answer_known: bool = False, image_tokens: int = 0
) -> TraceRequest:
    known = prompt + output if answer_known else prompt
    return TraceRequest(serial, 0.0, prompt, output, blocks, _SYNTHETIC_BLOCK_TOKENS, known, image_tokens)
