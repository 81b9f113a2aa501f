"""Pages that no hit can get to, against a plain model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jenga.reach import Reach, page_before


def test_pages_of_one_group_form_a_chain() -> None:
    dense = [(1, 16)]
    assert page_before(dense, 1, 16) is None
    assert page_before(dense, 1, 48) == (1, 1)
    assert page_before(dense, 0, 48) == (1, 2), "a window's page ends with the third page of full attention"
    assert page_before(dense, 0, 40) == (1, 1), "a page half way stands behind the last whole one"
    assert page_before(dense, 0, 8) is None
    assert page_before([], 0, 48) is None, "without full attention nothing is cut off"


@given(st.lists(st.sampled_from([4, 8, 12, 16]), min_size=1, max_size=4), st.integers(1, 60))
def test_the_chain_passes_every_page_once(sizes: list[int], tokens: int) -> None:
    dense = list(enumerate(sizes))
    last = page_before(dense, len(sizes), tokens)
    passed = []
    while last is not None:
        group, index = last
        passed.append((group, index))
        last = page_before(dense, group, (index + 1) * sizes[group])
    expected = [(g, i) for g, size in dense for i in range(tokens // size)]
    assert passed == sorted(expected, key=lambda p: ((p[1] + 1) * sizes[p[0]], p[0]), reverse=True)


class Prefixes(RuleBasedStateMachine):
    """Prefixes are words, a page stands behind the word without its last letter."""

    def __init__(self) -> None:
        super().__init__()
        self.reach: Reach[str] = Reach()
        self.cached: set[str] = set()
        self.held: set[str] = set()

    @rule(word=st.text("ab", min_size=1, max_size=5), held=st.booleans())
    def compute(self, word: str, held: bool) -> None:
        for end in range(1, len(word) + 1):
            self.cached.add(word[:end])
            self.reach.add(word[:end], word[: end - 1] or None)
        if held:
            self.held.add(word)

    @precondition(lambda self: self.cached - self.held)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        for word in data.draw(st.lists(st.sampled_from(sorted(self.cached - self.held)), min_size=1, unique=True)):
            self.drop(word)
        self.reach.sweep(self.drop)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        word = data.draw(st.sampled_from(sorted(self.held)))
        self.held.remove(word)
        if not self.reach.reachable(word):
            self.drop(word)
        self.reach.sweep(self.drop)

    def drop(self, word: str) -> None:
        if word in self.held or word not in self.cached:
            return
        self.cached.remove(word)
        self.reach.remove(word)

    @rule()
    def clear(self) -> None:
        self.cached.clear()
        self.held.clear()
        self.reach.clear()

    @invariant()
    def what_is_cached_can_be_reached_or_is_held(self) -> None:
        for word in self.cached - self.held:
            assert len(word) == 1 or word[:-1] in self.cached, word

    @invariant()
    def nothing_else_is_remembered(self) -> None:
        assert len(self.reach) == sum(len(word) > 1 for word in self.cached)
        for word in self.cached:
            assert set(self.reach.behind(word)) == {w for w in self.cached if w[:-1] == word}
        expected = {word for word in self.cached if len(word) > 1 and word[:-1] not in self.cached}
        assert {word for word in self.cached if not self.reach.reachable(word)} == expected


TestPrefixes = Prefixes.TestCase
