"""Reading and making traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jenga.traces import SYNTHETIC, TraceError, TraceRequest, agents, arrivals, chat, documents, read_mooncake

LINES = [
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 2500, "input_length": 1030, "output_length": 700, "hash_ids": [0, 1, 3]},
]


def write(folder: Path, lines: list[object]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_reads_mooncake(tmp_path: Path) -> None:
    first, second = read_mooncake(write(tmp_path, LINES))
    assert (first.prompt_tokens, first.output_tokens, first.arrival_s, first.blocks) == (1100, 5, 0.0, (0, 1, 2))
    assert second.arrival_s == 2.5
    assert len(list(read_mooncake(write(tmp_path, LINES), limit=1))) == 1


def test_keys_are_equal_exactly_where_prefixes_are(tmp_path: Path) -> None:
    first, second = read_mooncake(write(tmp_path, LINES))
    for size in (16, 100, 512, 528):
        a, b = first.keys(size), second.keys(size)
        assert len(a) == 1105 // size
        assert len(b) == 1730 // size
        shared = 1024 // size
        assert a[:shared] == b[:shared]
        assert not set(a[shared:]) & set(b[shared:])
        assert len(set(b)) == len(b)


def test_generated_tokens_are_nobody_elses_even_where_the_last_block_reaches(tmp_path: Path) -> None:
    # 1100 + 5 tokens end inside block 2, but the id of block 2 says nothing of the five that were generated.
    first, again = read_mooncake(write(tmp_path, [LINES[0], LINES[0]]))
    assert first.keys(5)[:220] == again.keys(5)[:220]
    assert first.keys(5)[220] != again.keys(5)[220]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json\n", "line 2"),
        ({"timestamp": 0, "input_length": 0, "output_length": 5, "hash_ids": []}, "input_length"),
        ({"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [1]}, "need 2 hash_ids"),
        ({"timestamp": 0, "input_length": 5, "hash_ids": [1]}, "output_length"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path, [LINES[0], line])
    with pytest.raises(TraceError, match=message) as raised:
        list(read_mooncake(path))
    assert str(path) in str(raised.value)
    assert "line 2" in str(raised.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.jsonl"):
        list(read_mooncake(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("name", sorted(SYNTHETIC))
def test_synthetic_traces_repeat_with_their_seed(name: str) -> None:
    make = SYNTHETIC[name]
    assert list(make(40, 1)) == list(make(40, 1)) != list(make(40, 2))


def test_chats_share_nothing_and_have_the_promised_lengths() -> None:
    served = list(chat(200))
    keys = [k for r in served for k in r.keys(16)]
    assert len(set(keys)) == len(keys)
    assert all(64 <= r.prompt_tokens <= 512 and 1 <= r.output_tokens <= 96 for r in served)


def longest_shared(request: TraceRequest, before: list[TraceRequest]) -> int:
    keys = set(request.keys(16))
    return max((len(keys & set(r.keys(16))) for r in before), default=0)


def test_documents_are_asked_about_more_than_once() -> None:
    served = list(documents(40))
    again = sum(1 for i, r in enumerate(served) if longest_shared(r, served[:i]) * 16 > 8000)
    assert again >= 20


def test_a_turn_repeats_what_was_said_answers_included() -> None:
    served = list(agents(60, concurrent=1, kinds=1))
    second, first = served[1], served[0]
    assert longest_shared(second, [first]) == first.tokens // 16
    assert second.prompt_tokens > first.tokens


def test_arrivals() -> None:
    served = list(chat(2000))
    assert {r.arrival_s for r in arrivals(served, None)} == {0.0}
    times = [r.arrival_s for r in arrivals(served, 4.0)]
    assert times == sorted(times)
    assert 450 < times[-1] < 550
    with pytest.raises(TraceError, match="-1"):
        list(arrivals(served, -1.0))
