"""Sizes as people write them."""

from __future__ import annotations

import pytest

from jenga.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GiB", 40 << 30),
        ("40 gib", 40 << 30),
        ("1.5G", 1_500_000_000),
        ("512MB", 512_000_000),
        ("512Mi", 512 << 20),
        ("1048576", 1 << 20),
        ("7B", 7),
        ("2tib", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "40Gx", "-1GiB", "4,5GiB", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"--memory .* is not a size; write a number and a unit, such as 40GiB"):
        parse_size(text, "--memory")


def test_a_forgotten_unit() -> None:
    with pytest.raises(ValueError, match=r"--memory '40' has no unit and would be 40 bytes; write 40GiB"):
        parse_size("40", "--memory")


def test_no_memory() -> None:
    with pytest.raises(ValueError, match="no memory at all"):
        parse_size("0GiB")


def test_readable_sizes() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 1536, 40 << 30, 3 << 50)] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "40 GiB", "3072 TiB",
    ]  # fmt: skip
