"""Which prefixes an engine can resume, in a form that travels: what `jenga.hits` needs beside the caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jenga.checkpoints import PASS_TOKENS
from jenga.hits import GroupCache, Hit, longest_common_hit
from jenga.policies import CachedTest, LayerPolicy, policy_class

SCHEMA = 1
_FAR = 1 << 40


@dataclass(frozen=True)
class GroupRule:
    """One layer group, in the engine's order (events name it by its number)."""

    name: str
    policy: LayerPolicy
    page_tokens: int

    @property
    def dense(self) -> bool:
        """Whether a prompt's every page is held while the request runs, and a hit needs all of them."""
        return self.policy.token_pages and self.policy.resident_from(_FAR, self.page_tokens) == 0


@dataclass(frozen=True)
class HitRule:
    """The engine's layer groups and the granularity of its hits.

    Raises:
        ValueError: a page or the alignment is not a multiple of what it must be, or a pass costs nothing.
    """

    groups: tuple[GroupRule, ...]
    alignment: int
    """Hits are multiples of this many tokens."""
    hash_tokens: int
    """Tokens per block hash; every page is a whole number of them, and is named by its last."""
    root: str
    """Hash that every chain of block hashes starts from, in hexadecimal: engines whose roots differ (another hash
    algorithm or seed) name equal blocks differently."""
    turn_marks: frozenset[int] = frozenset()
    """Special tokens, at whose runs turns start and the engine keeps what a hit needs (`jenga.checkpoints`)."""
    pass_tokens: int = PASS_TOKENS
    """What one more forward pass costs the engine, in tokens: it pauses for a state only where that spares more."""

    def __post_init__(self) -> None:
        if self.pass_tokens < 1:
            raise ValueError(f"pass_tokens {self.pass_tokens} is no positive number of tokens")
        for group in self.groups:
            if group.page_tokens < 1 or self.hash_tokens < 1 or group.page_tokens % self.hash_tokens:
                raise ValueError(
                    f"group {group.name}: pages of {group.page_tokens} tokens are no multiple of the "
                    f"{self.hash_tokens} tokens per block hash"
                )
            if self.alignment < 1 or self.alignment % group.page_tokens:
                raise ValueError(
                    f"alignment {self.alignment} is no multiple of group {group.name}'s {group.page_tokens} tokens"
                )

    @property
    def naming(self) -> tuple[int, str]:
        """What the names of blocks depend on: engines with the same name equal blocks alike."""
        return self.hash_tokens, self.root

    def hit(self, cached: Sequence[CachedTest], prompt_tokens: int) -> Hit:
        """The hit of a prompt, given which of its pages each group has."""
        return self.evaluate(self.caches(cached), prompt_tokens)

    def caches(self, cached: Sequence[CachedTest]) -> list[GroupCache]:
        """The groups as `jenga.hits` sees them, with these tests of what is cached."""
        return [GroupCache(g.policy, g.page_tokens, test) for g, test in zip(self.groups, cached, strict=True)]

    def evaluate(self, caches: Sequence[GroupCache], prompt_tokens: int) -> Hit:
        """The hit of a prompt, given `caches`.

        The last token is always computed, or there would be nothing to sample from.
        """
        return longest_common_hit(caches, max(0, prompt_tokens - 1), self.alignment)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the way between processes."""
        return {
            "schema": SCHEMA,
            "groups": [
                {
                    "name": group.name,
                    "kind": group.policy.kind,
                    "parameters": asdict(group.policy),  # type: ignore[call-overload]  # policies are dataclasses
                    "page_tokens": group.page_tokens,
                }
                for group in self.groups
            ],
            "alignment": self.alignment,
            "hash_tokens": self.hash_tokens,
            "root": self.root,
            "turn_marks": sorted(self.turn_marks),
            "pass_tokens": self.pass_tokens,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HitRule:
        """The inverse of `to_dict`.

        Raises:
            ValueError: another schema, a layer type nobody registered, parameters that do not fit it, or a field
                that is missing.
        """
        try:
            if data["schema"] != SCHEMA:
                raise ValueError(f"hit rule of schema {data['schema']}, this is {SCHEMA}")
            groups = tuple(
                GroupRule(group["name"], policy_class(group["kind"])(**group["parameters"]), int(group["page_tokens"]))
                for group in data["groups"]
            )
            marks = frozenset(int(token) for token in data.get("turn_marks", ()))
            return cls(
                groups,
                int(data["alignment"]),
                int(data["hash_tokens"]),
                str(data["root"]),
                marks,
                int(data.get("pass_tokens", PASS_TOKENS)),  # an older engine does not tell
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no hit rule: {type(error).__name__}: {error}") from error
