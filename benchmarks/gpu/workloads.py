"""What clients ask for: seeded requests of random token ids, and how they arrive."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.models import VOCABULARY
from jenga.traces import read_mooncake

Tokens = list[int]


@dataclass(frozen=True)
class Client:
    """Asks one turn after the other; each prompt is all that was said before and what is new."""

    turns: tuple[tuple[Tokens, int], ...]
    """New prompt tokens, and tokens to generate."""


@dataclass(frozen=True)
class Workload:
    """Clients, and how many of them ask at a time (None: all at once)."""

    name: str
    clients: tuple[Client, ...]
    at_a_time: int | None = None
    possible: int = field(default=0)
    """Prompt tokens that a cache that forgets nothing could spare, where every client's first turns share prefixes."""


def _some(rng: random.Random, count: int) -> Tokens:
    return [rng.randrange(5, VOCABULARY) for _ in range(count)]


def chat(seed: int, requests: int) -> Workload:
    """Short, unlike prompts of 64 to 512 tokens, answers of 32 to 96, all at once."""
    rng = random.Random(seed)
    clients = [Client(((_some(rng, rng.randint(64, 512)), rng.randint(32, 96)),)) for _ in range(requests)]
    return Workload("short chat", tuple(clients))


def reasoning(seed: int, requests: int) -> Workload:
    """Short, unlike prompts of 64 to 256 tokens, long answers of 256 to 768, all at once."""
    rng = random.Random(seed)
    clients = [Client(((_some(rng, rng.randint(64, 256)), rng.randint(256, 768)),)) for _ in range(requests)]
    return Workload("long answers", tuple(clients))


def documents(seed: int, requests: int) -> Workload:
    """Long, unlike prompts of 6,000 to 12,000 tokens, summaries of 128 to 512, all at once."""
    rng = random.Random(seed)
    clients = [Client(((_some(rng, rng.randint(6000, 12000)), rng.randint(128, 512)),)) for _ in range(requests)]
    return Workload("long documents", tuple(clients))


def agents(seed: int, requests: int, shared: int = 8, length: int = 480, clients_at_a_time: int = 16) -> Workload:
    """One of a few system prompts of `length` tokens, then 48 to 160 of one's own; 16 to 48 are said in answer."""
    rng = random.Random(seed)
    prefixes = [_some(rng, length) for _ in range(shared)]
    clients = [
        Client(((prefixes[rng.randrange(shared)] + _some(rng, rng.randint(48, 160)), rng.randint(16, 48)),))
        for _ in range(requests)
    ]
    many = "" if clients_at_a_time == 16 else f", {clients_at_a_time} clients"
    name = f"{length:,}-token shared prefixes{many}"
    return Workload(name, tuple(clients), clients_at_a_time, (requests - shared) * length)


def conversations(seed: int, clients: int, turns: int = 10) -> Workload:
    """Conversations of ten turns: 40 to 120 new tokens each, 24 to 48 said in answer."""
    rng = random.Random(seed)
    made, possible = [], 0
    for _ in range(clients):
        said = [(_some(rng, rng.randint(40, 120)), rng.randint(24, 48)) for _ in range(turns)]
        before = 0
        for new, answer in said:
            possible += before
            before += len(new) + answer
        made.append(Client(tuple(said)))
    return Workload("conversations of 10 turns", tuple(made), 16, possible)


def mooncake(path: Path, requests: int, longest: int) -> Workload:
    """The first requests of Mooncake's conversation trace no longer than `longest` tokens, in order."""
    contents: dict[int, Tokens] = {}
    seen: set[int] = set()
    possible = 0
    clients: list[Client] = []
    for asked in read_mooncake(path):
        if asked.tokens > longest or asked.output_tokens < 2:
            continue
        prompt: Tokens = []
        known = next((i for i, block in enumerate(asked.blocks) if block not in seen), len(asked.blocks))
        possible += min(known * asked.block_tokens, asked.prompt_tokens - 1)
        seen.update(asked.blocks)
        for block in asked.blocks:
            if block not in contents:
                contents[block] = _some(random.Random(block), asked.block_tokens)
            prompt += contents[block]
        clients.append(Client(((prompt[: asked.prompt_tokens], min(asked.output_tokens, 128)),)))
        if len(clients) == requests:
            break
    return Workload("Mooncake conversation", tuple(clients), 16, possible)


NAMES: dict[str, Callable[[int, int], Workload]] = {
    "chat": chat,
    "reasoning": reasoning,
    "documents": documents,
    "agents": agents,
    "conversations": conversations,
}
