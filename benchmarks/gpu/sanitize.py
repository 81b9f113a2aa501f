"""One short run under NVIDIA's compute-sanitizer: does any kernel read or write memory that is not its own?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import correctness, models

REQUESTS, TOKENS = 6, 8


def run(out: Path, model: str, limit_s: float) -> bool:
    """Pressed Jenga, twice over a few prompts, eager, each allocation by itself; prints the sanitizer's last lines.

    Returns whether it came to its end within `limit_s` seconds and found nothing.

    Raises:
        FileNotFoundError: there is no compute-sanitizer.
    """
    if shutil.which("compute-sanitizer") is None:
        raise FileNotFoundError("compute-sanitizer is not on PATH: it comes with NVIDIA's CUDA toolkit")
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
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    log = folder / "sanitize.log"
    with log.open("w") as out_:
        # A session of its own, so that at the limit no process keeps the GPU.
        running = subprocess.Popen(
            [*command, sys.executable, "-m", "benchmarks.gpu.generate", str(given), str(taken)],
            env=environment,
            stdout=out_,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = running.wait(limit_s)
        except subprocess.TimeoutExpired:
            print(f"not done after {limit_s:.0f} s (--limit): {log}", flush=True)
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("=========")]
    print("\n".join(said[-12:]), flush=True)
    made = json.loads(taken.read_text()) if taken.exists() else None
    if made is None:
        print(f"the engine did not come to its end: {log}", flush=True)
        return False
    print(
        f"{model}: {made['checks']} steps checked, {made['evicted']} pages evicted, cached {made['cached']}", flush=True
    )
    return status == 0
