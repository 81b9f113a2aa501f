"""What Ray offers under names of its own: found here, or missed in words that say what is to be done."""

from __future__ import annotations

from typing import Any

import ray

KNOWN = "2.60"
"""Ray whose private names were looked at."""


class RayChangedError(RuntimeError):
    """This Ray lacks something private that is used here; the message names it, what needs it and the remedy."""


def private(owner: Any, name: str, needed_by: str) -> Any:
    """`owner.name`.

    Raises RayChangedError if there is none; `needed_by` says what does not work then.
    """
    found = getattr(owner, name, None)
    if found is None:
        kind = owner if isinstance(owner, type) else type(owner)
        raise RayChangedError(
            f"Ray {ray.__version__} has no {kind.__module__}.{kind.__qualname__}.{name}, which {needed_by} needs: "
            f"install Ray {KNOWN}"
        )
    return found
