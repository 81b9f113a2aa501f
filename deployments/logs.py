"""Ray Serve's log of this process, kept open while vLLM sets up its own.

vLLM configures logging with `logging.config.dictConfig`, which closes every handler of the process.  From then on
Serve's would write nothing and keep each record in memory for ever; and a controller that was restarted could not take
the replica over ("'NoneType' object has no attribute 'baseFilename'").
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler

SERVE = "ray.serve"


@contextmanager
def kept_open() -> Iterator[None]:
    """Inside, vLLM may make an engine or its configuration; afterwards Serve's log goes on."""
    buffers = [handler for handler in logging.getLogger(SERVE).handlers if isinstance(handler, MemoryHandler)]
    for buffer in buffers:
        # Not put right afterwards: a controller may come at any time of an engine's start.
        buffer.close = buffer.flush  # type: ignore[method-assign]
    try:
        yield
    finally:
        for buffer in buffers:
            del buffer.close
