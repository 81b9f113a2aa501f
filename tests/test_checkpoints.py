"""What is worth keeping of a prompt: turns, junctions, ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jenga.checkpoints import (
    ANSWER_CUE,
    MAX_KNOWN_JUNCTIONS,
    PASS_TOKENS,
    TURN_GAP,
    SharedPrefixes,
    boundaries,
    turn_starts,
)
from jenga.hits import Hit

BOS, START, END = 1, 2, 3
MARKERS = frozenset((BOS, START, END))


def chat(*turns: int) -> list[int]:
    """A chat prompt whose turns have these many tokens, ending with the cue for an answer."""
    tokens = [BOS, START]
    for length in turns:
        tokens += [50] * length + [END, START]
    return tokens


def test_boundaries_of_a_prompt() -> None:
    def lengths(hit: Hit, tokens: int, hints: tuple[int, ...] = ()) -> tuple[int, ...]:
        return boundaries(hit, tokens, 16, hints).lengths

    # 100 tokens, pages of 16: the end is 96; junction 50 -> 48; a hint at 70 -> 64; nothing up to the hit itself.
    assert lengths(Hit(0, 0, None), 100) == (96,)
    assert lengths(Hit(16, 50, 1), 100, (70, 17)) == (48, 64, 96)
    assert lengths(Hit(96, 96, None), 100) == ()
    assert lengths(Hit(0, 0, None), 97) == (96,)
    assert lengths(Hit(0, 0, None), 96) == (80,), "an equal prompt must compute its last token"
    assert lengths(Hit(0, 0, None), 10, (9,)) == ()


def test_a_pause_must_spare_what_it_costs() -> None:
    def pauses(hit: int, tokens: int, *hints: int, **more: int) -> tuple[int, ...]:
        return boundaries(Hit(hit, hit, None), tokens, 32, hints, **more).pauses

    assert PASS_TOKENS == 256
    assert pauses(0, 542, 480) == (480,), "the last 32 tokens are not worth a pass"
    assert pauses(0, 740, 480) == (480, 736)
    assert pauses(0, 330, 96, 192) == (192,), "96 tokens are not worth it, 192 are; 128 of this prompt's own are not"
    assert pauses(0, 250) == ()
    assert pauses(0, 258) == (256,)
    assert pauses(0, 224, 192) == (192,), "a turn that starts in the last block is no less worth it"
    assert pauses(480, 542, 480) == ()
    assert pauses(0, 740, 480, pass_tokens=4000) == (480,), "what others share is resumed many times"
    assert pauses(0, 740, 96, pass_tokens=4000) == ()
    assert pauses(0, 740, 96, pass_tokens=192) == (96, 736), "half a pass, where passes cost little"
    assert pauses(0, 740, 64, pass_tokens=192) == (736,)
    assert pauses(0, 740, 480, pass_tokens=1) == (480, 736)
    assert pauses(0, 100, 32, 64, pass_tokens=1) == (32, 64, 96), "where a pass costs nothing, all are kept"


def test_the_turn_after_a_system_prompt() -> None:
    prompt = chat(478, 100)
    assert prompt[480:482] == [END, START]
    assert turn_starts(prompt, MARKERS, 16) == (482,)
    assert turn_starts(prompt, MARKERS, 482) == (482,)
    assert turn_starts(prompt, MARKERS, 483) == (), "all that is left is the cue for the answer"


def test_the_first_and_the_last_turn_of_a_conversation() -> None:
    prompt = chat(100, 40, 60, 30)
    assert turn_starts(prompt, MARKERS, 16) == (104, 208)
    assert turn_starts(prompt, MARKERS, 120) == (146, 208), "what is cached already needs no checkpoint"


def test_role_names_belong_to_the_marks_of_a_turn() -> None:
    prompt = [BOS, START, 7, 7, *[50] * 90, END, 9, START, 7, 7, *[60] * 40, END, 9, START, 7, 7]
    assert turn_starts(prompt, MARKERS, 16) == (97,)


def test_no_markers_no_turns() -> None:
    assert turn_starts([50] * 300, MARKERS, 16) == ()
    assert turn_starts([], MARKERS, 16) == ()
    assert turn_starts([BOS, *[50] * 300], MARKERS, 16) == ()


@given(st.lists(st.sampled_from([*MARKERS, 50, 51]), max_size=120), st.integers(1, 130))
def test_turns_start_behind_a_marker(tokens: list[int], after: int) -> None:
    found = turn_starts(tokens, MARKERS, after)
    assert list(found) == sorted(set(found))
    for start in found:
        assert tokens[start - 1] in MARKERS
        assert after <= start <= len(tokens) - ANSWER_CUE
    if found:
        behind = tokens[found[-1] : found[-1] + TURN_GAP]
        assert not MARKERS.intersection(behind), "a run of markers goes on"


def test_known_junctions_outlive_the_cache_and_are_bounded() -> None:
    known = SharedPrefixes(capacity=3)
    for key in "abcd":
        known.learn(key)
    assert len(known) == 3
    assert known.ends(["a", "x", "b", "y"]) == [3], "a was seen longest ago"
    known.learn("e")
    assert known.ends(["b", "c", "d", "e"]) == [4, 3][:MAX_KNOWN_JUNCTIONS], "c was forgotten: b had been asked for"
    assert known.ends(["b", "c", "d", "e"], first=4) == []
