"""One short run under NVIDIA's compute-sanitizer: does any kernel read or write memory that is not its own?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import correctness, models

REQUESTS, TOKENS = 6, 8
FOUND = 9
"""Exit status of compute-sanitizer where it found something."""


def run(out: Path, model: str, limit_s: float) -> bool:
    """Pressed Jenga, twice over a few prompts, eager, each allocation by itself; prints the sanitizer's last lines.

    Returns whether it found nothing.

    Raises:
        subprocess.TimeoutExpired: not done after `limit_s` seconds.
    """
    folder = out / "work"
    models.make(model, folder, small=True)
    case = correctness.Case(model, "sanitized", correctness.EAGER, correctness.V2)
    asked = correctness.spec(case, "pressed", folder, correctness.pressed_bytes(model))
    asked |= {"prompts": asked["prompts"][:REQUESTS], "max_tokens": TOKENS}
    given, taken = folder / "sanitize.spec.json", folder / "sanitize.json"
    given.write_text(json.dumps(asked))
    taken.unlink(missing_ok=True)
    # PyTorch's caching allocator hands out parts of large allocations, whose borders the sanitizer does not see.
    environment = os.environ | case.environment | {"JENGA": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", str(FOUND), "--target-processes", "all"]
    ended = subprocess.run(
        [*command, sys.executable, "-m", "benchmarks.gpu.generate", str(given), str(taken)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
    )
    (folder / "sanitize.log").write_text(ended.stdout)
    said = [line for line in ended.stdout.splitlines() if line.startswith("=========")]
    print("\n".join(said[-12:]), flush=True)
    made = json.loads(taken.read_text()) if taken.exists() else None
    if made is None:
        print(f"the engine did not come to its end: {folder / 'sanitize.log'}", flush=True)
        return False
    print(
        f"{model}: {made['checks']} steps checked, {made['evicted']} pages evicted, cached {made['cached']}", flush=True
    )
    return ended.returncode == 0
