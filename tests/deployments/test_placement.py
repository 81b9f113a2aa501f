"""Placement by load and prefix affinity, without Ray."""

import random
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.autoscaling import KV_IN_USE
from deployments.placement import Policy, PrefixPlacement, chunk_names, load_of, prompt_of

POLICY = Policy(chunk=4, max_chunks=8, max_entries=16, load_factor=2.0, load_slack=1.0)


def placement(policy: Policy = POLICY) -> PrefixPlacement[str]:
    return PrefixPlacement(policy, random.Random(0))


def names(text: str) -> list[bytes]:
    return chunk_names(text, POLICY)


prompts = st.one_of(st.text("ab", max_size=48), st.lists(st.integers(0, 3), max_size=48))


@given(prompts, prompts)
def test_names_agree_exactly_as_far_as_the_prompts_do(left: str | list[int], right: str | list[int]) -> None:
    pair = chunk_names(left, POLICY), chunk_names(right, POLICY)
    common = 0
    if isinstance(left, str) == isinstance(right, str):
        while common < min(len(left), len(right)) and left[common] == right[common]:
            common += 1
    shared = 0
    while shared < min(map(len, pair)) and pair[0][shared] == pair[1][shared]:
        shared += 1
    assert shared == min(common // POLICY.chunk, POLICY.max_chunks)
    # Equality later on is impossible too: a name covers everything before it.
    assert not set(pair[0][shared:]) & set(pair[1][shared:])


def test_text_and_token_ids_share_no_name() -> None:
    assert not set(chunk_names("1,2,3,4,", POLICY)) & set(chunk_names([1, 2, 3, 4], POLICY))
    assert chunk_names([1, 23, 4, 5], POLICY) != chunk_names([12, 3, 4, 5], POLICY)


def test_only_whole_chunks_within_the_bound_are_named() -> None:
    assert len(names("x" * 3)) == 0
    assert len(names("x" * 11)) == 2
    assert len(names("x" * 1000)) == POLICY.max_chunks


def test_a_lone_surrogate_is_named_like_any_text() -> None:
    assert len(names("\ud800abc")) == 1


def test_the_longest_known_prefix_wins() -> None:
    table = placement()
    table.record(names("aaaa"), "short")
    table.record(names("aaaabbbb"), "long")
    ranks = table.rank(names("aaaabbbbcccc"), {"short": 0, "long": 1, "other": 0})
    assert ranks[0] == ["long"]


def test_of_two_that_know_equally_much_the_less_loaded_wins() -> None:
    table = placement()
    for replica in ("a", "b"):
        table.record(names("same" * 4), replica)
    assert table.rank(names("same" * 4), {"a": 1, "b": 0})[0] == ["b"]


def test_affinity_ends_where_its_replica_is_too_busy() -> None:
    table = placement()
    table.record(names("aaaa"), "busy")
    bound = POLICY.load_factor * 3 + POLICY.load_slack
    assert table.rank(names("aaaa"), {"busy": bound, "idle": 3})[0] == ["busy"]
    assert table.rank(names("aaaa"), {"busy": bound + 1, "idle": 3})[0] != ["busy"]


def test_least_loaded_policy_ignores_prefixes() -> None:
    table = placement(Policy(chunk=4, affinity=False))
    table.record(names("aaaa"), "a")
    assert all(len(table.rank(names("aaaa"), {"a": 0, "b": 0})[0]) == 2 for _ in range(20))


def test_unknown_prompts_spread_over_all_replicas() -> None:
    table = placement()
    first = {rank for i in range(200) for rank in table.rank(names(f"{i:08d}"), dict.fromkeys("abcd", 0))[0]}
    assert first == set("abcd")


def test_a_replica_that_left_is_neither_chosen_nor_remembered() -> None:
    table = placement()
    table.record(names("aaaa"), "gone")
    table.record(names("aaaa"), "here")
    table.keep(["here", "new"])
    assert table.matched(names("aaaa"), "gone") == 0
    assert table.matched(names("aaaa"), "here") == 1
    assert table.rank(names("aaaa"), {"here": 0, "new": 0})[0] == ["here"]


def test_of_equal_queues_the_one_with_more_free_memory_comes_first() -> None:
    loads = {"full": load_of(2, {KV_IN_USE: 0.9}), "empty": load_of(2, {KV_IN_USE: 0.1}), "idle": load_of(None, {})}
    assert loads["idle"] < loads["empty"] < loads["full"] < 3
    del loads["idle"]
    assert all(placement().rank([], loads)[0] == ["empty", "full"] for _ in range(20))
    assert load_of(1, {KV_IN_USE: "nonsense"}) == 1
    assert load_of(1, {KV_IN_USE: 7}) < 2


def test_without_replicas_there_is_nothing_to_rank() -> None:
    assert placement().rank(names("aaaa"), {}) == []


def test_the_head_of_a_prompt_outlives_its_tail() -> None:
    table = placement(Policy(chunk=4, max_chunks=8, max_entries=4))
    old = names("a" * 16)
    table.record(old, "r")
    table.record(names("b" * 8), "r")
    assert table.matched(old, "r") == 2


replicas = st.sampled_from("abcde")


@settings(max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("route"), st.text("xy", max_size=40), st.dictionaries(replicas, st.integers(0, 9))),
            st.tuples(st.just("keep"), st.sets(replicas), st.none()),
        ),
        max_size=40,
    )
)
def test_memory_is_bounded_and_only_offered_replicas_are_ranked(steps: list[tuple]) -> None:
    table = placement()
    seen: set[str] = set()
    for kind, value, loads in steps:
        if kind == "keep":
            table.keep(value)
            seen &= value
            continue
        chunks = names(value)
        ranks = table.rank(chunks, loads)
        assert {r for rank in ranks for r in rank} <= set(loads)
        assert bool(ranks) == bool(loads)
        if not loads:
            continue
        # Everybody is in some rank, so a replica that has room is always found.
        assert {r for rank in ranks for r in rank} == set(loads) or len(loads) <= 2
        bound = POLICY.load_factor * min(loads.values()) + POLICY.load_slack
        if len(ranks[0]) == 1 and len(loads) > 1:
            chosen = ranks[0][0]
            assert loads[chosen] <= bound
            assert table.matched(chunks, chosen) == max(table.matched(chunks, r) for r in loads) > 0
        target = ranks[0][0]
        table.record(chunks, target)
        seen.add(target)
        assert table.matched(chunks, target) == len(chunks)
        assert table.entries <= POLICY.max_entries * len(seen)


def test_prompts_of_every_request_form() -> None:
    def body(**fields: object) -> SimpleNamespace:
        return SimpleNamespace(**fields)

    assert prompt_of(body(prompt="text")) == "text"
    assert prompt_of(body(prompt=[1, 2])) == [1, 2]
    assert prompt_of(body(prompt=["first", "second"])) == "first"
    assert prompt_of(body(prompt=[[1], [2]])) == [1]
    assert prompt_of(body(prompt=[])) is None
    assert prompt_of(body(prompt=None, messages=None)) is None
    assert prompt_of(object()) is None
    chat = prompt_of(body(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]))
    longer = prompt_of(
        body(
            messages=[
                {"role": "system", "content": "s"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": [{"type": "text", "text": "t"}, {"type": "image_url"}]},
            ]
        )
    )
    assert isinstance(chat, str)
    assert isinstance(longer, str)
    assert longer.startswith(chat)
    assert longer.endswith("t[image_url]")
