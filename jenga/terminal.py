"""Where tables are printed."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 160
"""Columns of a file or pipe, which has no width of its own: figures must not be cut there."""


def table_console() -> Console:
    """A console on standard output, as wide as the terminal or wide enough for every table."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if known else Console(width=_WIDE)
