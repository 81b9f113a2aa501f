"""Engines in processes of their own, forked from one that has imported vLLM already (imports take half a minute)."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

PRELOADED = (
    "vllm",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
)


def preload() -> None:
    """Import what every engine imports, without touching the GPU or loading plugins.

    Raises:
        RuntimeError: the imports made a CUDA context, which no fork survives.
    """
    if importlib.util.find_spec("flashinfer") is None:  # vLLM takes it for granted
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    if torch.cuda.is_initialized():
        raise RuntimeError("importing vLLM initialised CUDA, so that engines cannot be forked")


@dataclass(frozen=True)
class Job:
    """A function to run in a child."""

    main: Callable[..., Any]
    arguments: tuple[Any, ...]
    environment: Mapping[str, str]
    log: Path
    """Takes the child's output."""
    limit_s: float


def run(jobs: Sequence[Job], at_a_time: int = 1) -> Iterator[tuple[int, str]]:
    """Run the jobs in order, some at a time; yields each one's number as it ends, with "" or its last words.

    Children are started from this thread alone, since a fork beside other threads can inherit their locks.
    """
    waiting = list(enumerate(jobs))[::-1]
    running: dict[Any, tuple[int, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < at_a_time:
            number, job = waiting.pop()
            child = multiprocessing.get_context("fork").Process(target=_child, args=(job,))
            child.start()
            running[child.sentinel] = number, child, time.monotonic() + job.limit_s
        ended = connection.wait(list(running), timeout=1.0)
        for sentinel, (number, child, until) in list(running.items()):
            late = time.monotonic() > until
            if sentinel not in ended and not late:
                continue
            job = jobs[number]
            if sentinel not in ended:
                os.killpg(child.pid, signal.SIGKILL)
            child.join()
            del running[sentinel]
            failed = f"no end after {job.limit_s:.0f} s\n" if late and sentinel not in ended else ""
            yield number, failed + last_words(job.log) if failed or child.exitcode else ""


def _child(job: Job) -> None:
    os.setpgrp()
    with job.log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(job.environment)
    code = 0
    try:
        job.main(*job.arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def last_words(log: Path) -> str:
    """What an engine's log says of its end: the lines that name an error, and the last ones."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([each[:400] for each in lines if "Error" in each][:8] + lines[-6:])
