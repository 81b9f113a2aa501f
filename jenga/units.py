"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

_FACTORS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGTP", start=1)
    for suffix, base in (("iB", 1024), ("i", 1024), ("B", 1000), ("", 1000))
}
_LOWER = {unit.lower(): factor for unit, factor in _FACTORS.items()}
_LEAST_BARE = 1 << 20
"""Bytes from which a number without a unit is taken for what it says."""
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size(text: str, setting: str = "size") -> int:
    """Bytes of a size such as ``40GiB``, ``512MB`` or ``1048576``.

    Raises:
        ValueError: not a size, not positive, or a small number without a unit; the message names `setting` and the
            value.
    """
    match = _PATTERN.fullmatch(text)
    factor = _LOWER.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"{setting} {text!r} is not a size; write a number and a unit, such as 40GiB, 512MB or 1048576"
        )
    size = int(float(match[1]) * factor)
    if not match[2] and 0 < size < _LEAST_BARE:
        raise ValueError(
            f"{setting} {text!r} has no unit and would be {size} bytes; write {text.strip()}GiB or the like"
        )
    if size < 1:
        raise ValueError(f"{setting} {text!r} is no memory at all; give at least one byte, such as 40GiB")
    return size


def format_size(size: float) -> str:
    """A size in bytes with a binary unit and three digits or so."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.4g} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
