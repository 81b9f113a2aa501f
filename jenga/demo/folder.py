"""A model folder as Hugging Face and vLLM expect it, written whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

STAMP = "jenga-demo.json"
"""Written last: names the recipe and every file's size, so that a torn or outdated folder is seen."""


class DemoModelError(Exception):
    """A demo model cannot be made; the message is for the user."""


def is_complete(folder: Path, recipe: dict[str, object]) -> bool:
    """Whether `folder` holds what `recipe` makes, all of it."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        return bool(stamp["recipe"] == recipe) and all(
            (folder / name).stat().st_size == size for name, size in stamp["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write(folder: Path, recipe: dict[str, object], fill: Callable[[Path], None], force: bool) -> None:
    """Let `fill` write the model's files, then put them in place of `folder` in one step.

    Raises DemoModelError when `folder` holds something that is no demo model and `force` is not set, or
    cannot be written.
    """
    # A stamp, whole or torn, says that the folder is ours to replace.
    foreign = folder.exists() and not (folder / STAMP).exists() and (not folder.is_dir() or any(folder.iterdir()))
    if foreign and not force:
        raise DemoModelError(f"{folder} exists and is no demo model; move it away, or replace it with --force")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise DemoModelError(f"cannot write below {folder.parent}: {error.strerror}; name another --out") from error
    try:
        fill(scratch)
        sizes = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
        (scratch / STAMP).write_text(json.dumps({"recipe": recipe, "files": sizes}, indent=2) + "\n")
        scratch.chmod(0o755)
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
