"""No engine without its server: an engine core whose parent was killed ends itself.

A replica that is killed takes nothing along: vLLM's engine core would live on for ever, with its memory (on a GPU, all
of it, so that no new engine starts there).  Ray kills a worker's children where its raylet lives to do so, which it
does not where a node lost its head.  vLLM loads this as a plugin in every process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0
_LAST_WORDS_S = 10.0


def register() -> None:
    """Watch over this process's parent, if `multiprocessing` started this process."""
    if multiprocessing.parent_process() is not None:
        threading.Thread(target=_watch, args=(os.getppid(),), name="orphans", daemon=True).start()


def _watch(parent: int) -> None:
    # Not the sentinel of multiprocessing: brothers that were forked hold its other end open.
    while os.getppid() == parent:
        time.sleep(_PERIOD_S)
    logger.error("the process %d that served this engine is gone; the engine ends", parent)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_WORDS_S)
    os.kill(os.getpid(), signal.SIGKILL)
