"""The prefix tree of prompts on their way against a list of them."""

from __future__ import annotations

import random

from jenga.routing.prompts import PromptTree


def in_common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def prompt(rng: random.Random) -> list[int]:
    """Names that stand for all before them, in few branches, so that prompts often share a beginning."""
    parts: list[int] = []
    for _ in range(rng.randrange(0, 30)):
        parts.append(0 if rng.random() < 0.8 else rng.randrange(3))
    return [hash(tuple(parts[: i + 1])) for i in range(len(parts))]


def test_prefixes_in_common_with_what_is_on_its_way() -> None:
    rng = random.Random(3)
    for _ in range(40):
        tree = PromptTree()
        known: dict[str, tuple[int, list[int]]] = {}
        for _ in range(150):
            request, action = str(rng.randrange(30)), rng.random()
            if action < 0.6:
                known[request] = 3 << 2 * rng.randrange(4), prompt(rng)  # a replica has two lanes
                tree.add(request, *known[request])
            elif action < 0.97:
                known.pop(request, None)
                tree.settle(request)
            else:
                gone = 1 << rng.randrange(8)
                known = {name: held for name, held in known.items() if not held[0] & gone}
                tree.forget(gone)
            asked = prompt(rng)
            expected: dict[int, int] = {}
            for lanes, keys in known.values():
                expected[lanes] = max(expected.get(lanes, 0), in_common(keys, asked))
            found: dict[int, int] = {}
            for lanes, blocks in tree.shared(asked):
                for replica in range(4):
                    if lanes & 3 << 2 * replica:
                        assert 3 << 2 * replica not in found
                        found[3 << 2 * replica] = blocks
            assert found == {lanes: blocks for lanes, blocks in expected.items() if blocks}
        for request in list(known):
            tree.settle(request)
        assert not tree._top, "nothing is left behind"
