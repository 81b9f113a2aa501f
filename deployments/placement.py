"""Which replica takes a request: the longest known prefix, unless that replica is too busy.

Pure Python without Ray.  A prompt is cut into chunks and each chunk is named by the hash of
everything up to its end, so equal names mean equal prefixes.  The table remembers, for each
replica, the names of the chunks it was sent: a guess of what its cache holds, bounded by dropping
what was used longest ago.
"""

import random
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Generic, TypeVar

from deployments.autoscaling import KV_IN_USE

Replica = TypeVar("Replica", bound=Hashable)
Prompt = str | Sequence[int]


def load_of(queue: int | None, stats: Mapping[str, object]) -> float:
    """A replica's load: requests in progress, and below one request the KV memory in use."""
    used = stats.get(KV_IN_USE, 0.0)
    return (queue or 0) + (min(max(used, 0.0), 0.99) if isinstance(used, int | float) else 0.0)


@dataclass(frozen=True)
class Policy:
    """Constants of the placement.

    chunk: characters, or token ids, hashed together.
    max_chunks: chunks of one prompt that are looked at; what follows does not place a request.
    max_entries: chunks remembered per replica.
    load_factor, load_slack: affinity holds while load <= load_factor * least load + load_slack.
    affinity: whether known prefixes count at all.
    """

    chunk: int = 64
    max_chunks: int = 512
    max_entries: int = 65_536
    load_factor: float = 2.0
    load_slack: float = 4.0
    affinity: bool = True


def chunk_names(prompt: Prompt, policy: Policy) -> list[bytes]:
    """Names of the leading whole chunks of ``prompt``; costs one pass over at most
    ``policy.chunk * policy.max_chunks`` characters or tokens.

    Text and token ids never share a name.
    """
    is_text = isinstance(prompt, str)
    digest = blake2b(b"text" if is_text else b"tokens", digest_size=16)
    names = []
    for start in range(0, min(len(prompt), policy.chunk * policy.max_chunks), policy.chunk):
        part = prompt[start : start + policy.chunk]
        if len(part) < policy.chunk:
            break
        # Separators keep [1, 23] and [12, 3] apart; `surrogatepass` because JSON may hold lone surrogates.
        data = part if isinstance(part, str) else ",".join(map(str, part)) + ";"
        digest.update(data.encode("utf-8", "surrogatepass"))
        names.append(digest.digest())
    return names


class PrefixPlacement(Generic[Replica]):
    """Ranks replicas for each request and remembers what was sent where."""

    def __init__(self, policy: Policy, rng: random.Random | None = None) -> None:
        self._policy = policy
        self._rng = rng or random.Random()
        self._known: dict[Replica, OrderedDict[bytes, None]] = {}

    def matched(self, names: Sequence[bytes], replica: Replica) -> int:
        """How many leading chunks ``replica`` was sent before."""
        known = self._known.get(replica)
        if not known:
            return 0
        count = 0
        for name in names:
            if name not in known:
                break
            count += 1
        return count

    def rank(self, names: Sequence[bytes], loads: Mapping[Replica, float]) -> list[list[Replica]]:
        """Ranks of replicas, best first; within a rank the least loaded is to be taken.

        ``loads`` holds the load (see ``load_of``) of every replica that may be chosen.  The first
        rank is the replica of the longest known prefix if its load permits; the next is two
        replicas at random (power of two choices), the last is all, so that a full replica never
        blocks a request.
        """
        if not loads:
            return []
        replicas = list(loads)
        two = self._rng.sample(replicas, min(2, len(replicas)))
        # Of equally long queues the first is taken.
        ranks = [sorted(two, key=lambda replica: loads[replica])]
        if len(replicas) > 2:
            ranks.append(replicas)
        if affine := self._affine(names, loads):
            ranks.insert(0, [affine[0]])
        return ranks

    def _affine(self, names: Sequence[bytes], loads: Mapping[Replica, float]) -> list[Replica]:
        """At most one replica worth going to for its cache."""
        if not self._policy.affinity or not names:
            return []
        bound = self._policy.load_factor * min(loads.values()) + self._policy.load_slack
        matches = {replica: self.matched(names, replica) for replica in loads}
        # Where two know equally much, the less loaded one.
        best = min(loads, key=lambda replica: (-matches[replica], loads[replica]))
        return [best] if matches[best] and loads[best] <= bound else []

    def record(self, names: Sequence[bytes], replica: Replica) -> None:
        """Remember that a prompt went to ``replica``."""
        known = self._known.setdefault(replica, OrderedDict())
        # Tail first: the head of a prompt is then the youngest, and outlives its own tail.
        for name in reversed(names):
            known[name] = None
            known.move_to_end(name)
        while len(known) > self._policy.max_entries:
            known.popitem(last=False)

    def keep(self, replicas: Iterable[Replica]) -> None:
        """Forget every replica that is not among ``replicas``."""
        alive = set(replicas)
        for gone in self._known.keys() - alive:
            del self._known[gone]

    @property
    def entries(self) -> int:
        """Chunks remembered, over all replicas."""
        return sum(len(known) for known in self._known.values())


def prompt_of(body: object) -> Prompt | None:
    """What places a completion or chat request: its prompt, or its messages as text.

    Of several prompts the first counts: all of them go to one replica.  None if there is neither.
    """
    prompt = getattr(body, "prompt", None)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt:
        first = prompt[0]
        if isinstance(first, int):
            return prompt
        return first if isinstance(first, str | list) else None
    messages = getattr(body, "messages", None)
    return "\x1e".join(map(_message_text, messages)) if messages else None


def _message_text(message: object) -> str:
    """Role and text of one chat message; parts that are no text count by their kind."""
    if not isinstance(message, Mapping):
        return str(message)
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(
            part.get("text") or f"[{part.get('type')}]" if isinstance(part, Mapping) else str(part) for part in content
        )
    return f"{message.get('role')}\x1f{content or ''}"
