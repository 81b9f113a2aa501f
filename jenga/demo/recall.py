"""Key-value recall: prompts whose right answer is known, so that a wrong KV page is a wrong answer.

A *table* is ``k7=42; q3=19; ... `` with distinct keys (one letter, one digit) and values 00 to 99, four
tokens a pair.  Two questions can be asked of it:

- ``? k7=`` wants that key's value: ``42``;
- ``! k7=`` wants the table from that key to its end: ``42; q3=19; ...; ``, an answer as long as one likes.

Nothing here needs a tokenizer or a model: the text fixes its tokens (see `jenga.demo.tokenizer`).
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Literal

KEYS: tuple[str, ...] = tuple(a + d for a in string.ascii_lowercase + string.ascii_uppercase for d in string.digits)
VALUES: tuple[str, ...] = tuple(f"{n:02d}" for n in range(100))
TOKENS_PER_PAIR = 4
"""Key, ``=``, value and ``; ``."""
QUESTION_TOKENS = 3
"""Mark, key and ``=``."""

Verb = Literal["?", "!"]


@dataclass(frozen=True)
class Question:
    """One prompt and the only right answer to it."""

    text: str
    """The prompt: table and question."""
    answer: str
    """What the model must say, to the letter."""
    distance: int
    """Tokens from the asked value to the end of the text: beyond the sliding window, only
    full-attention layers can carry the answer."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as OpenAI chat messages."""
        return [{"role": "user", "content": self.text}]

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer, the closing ``<end>`` not counted."""
        # A recital has a "; " behind every value and names every key but the first, with its "=".
        return max(1, TOKENS_PER_PAIR * self.answer.count("; ") - 2)


@dataclass(frozen=True)
class Table:
    """Distinct keys with their values, in order."""

    pairs: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The table as it stands in a prompt, with a trailing ``; ``."""
        return "".join(f"{key}={value}; " for key, value in self.pairs)

    def ask(self, index: int, verb: Verb = "?") -> Question:
        """The question about pair number `index` (from 0; negative counts from the end).

        Raises IndexError when the table has no such pair.
        """
        key, value = self.pairs[index]
        later = self.pairs[index % len(self.pairs) + 1 :]
        answer = value if verb == "?" else value + "; " + Table(later).text
        # Behind the value: its own "; ", the later pairs, the question.
        distance = 1 + TOKENS_PER_PAIR * len(later) + QUESTION_TOKENS
        return Question(f"{self.text}{verb} {key}=", answer, distance)


def table(seed: int, pairs: int) -> Table:
    """A random table of `pairs` pairs, the same for the same seed on every machine.

    Raises ValueError when there are not that many distinct keys.
    """
    if not 1 <= pairs <= len(KEYS):
        raise ValueError(f"pairs={pairs}: a table has 1 to {len(KEYS)} pairs, one per distinct key")
    rng = random.Random(f"jenga recall {seed}")
    keys = rng.sample(KEYS, pairs)
    return Table(tuple((key, rng.choice(VALUES)) for key in keys))


def pairs_for(tokens: int) -> int:
    """The largest number of pairs whose prompt, chat template included, has at most `tokens` tokens."""
    template = 4  # <bos> <user> ... <end> <model>
    return max(1, min(len(KEYS), (tokens - template - QUESTION_TOKENS) // TOKENS_PER_PAIR))


def question(seed: int, pairs: int, *, beyond: int = 0, verb: Verb = "?") -> Question:
    """A random question about a random table of `pairs` pairs.

    The asked value lies more than `beyond` tokens before the end of the text.  Raises ValueError when the
    table is too short for that.
    """
    made = table(seed, pairs)
    far = [i for i in range(pairs) if 1 + TOKENS_PER_PAIR * (pairs - 1 - i) + QUESTION_TOKENS > beyond]
    if not far:
        raise ValueError(f"beyond={beyond} tokens: a table of {pairs} pairs is only {TOKENS_PER_PAIR * pairs} long")
    return made.ask(random.Random(f"jenga ask {seed}").choice(far), verb)
