"""Run by the environment's own Python: prints, as JSON, the state of every installed distribution.

``versions`` maps normalised names to versions, ``damaged`` maps the names of those whose files are
missing or cut short (an install that was killed) to the directory of their metadata.
"""

import json
import re
import sys
import sysconfig
from importlib.metadata import Distribution
from pathlib import Path


def normalised(name: str) -> str:
    """The name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_damaged(distribution: Distribution) -> bool:
    """Whether a file of the distribution is missing or has not the size that its RECORD states."""
    if not distribution.files:
        return True
    for file in distribution.files:
        if "__pycache__" in file.parts:  # compiled on the user's side, and harmless when absent
            continue
        path = Path(str(file.locate()))
        if not path.exists() or (file.size is not None and path.stat().st_size != file.size):
            return True
    scripts = Path(sys.executable).parent
    return any(not (scripts / e.name).exists() for e in distribution.entry_points if e.group == "console_scripts")


def main() -> None:
    """Print the report."""
    versions: dict[str, str] = {}
    damaged: dict[str, str] = {}
    for metadata in sorted(Path(sysconfig.get_path("purelib")).glob("*.dist-info")):
        distribution = Distribution.at(metadata)
        name = normalised(distribution.metadata["Name"] or metadata.name.partition("-")[0])
        versions[name] = distribution.version or ""
        if is_damaged(distribution):
            damaged[name] = str(metadata)
    print(json.dumps({"versions": versions, "damaged": damaged}))


if __name__ == "__main__":
    main()
