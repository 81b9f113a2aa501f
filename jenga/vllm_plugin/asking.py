"""How front ends ask a running engine core for its reports: at one pace, and whatever goes wrong."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable

from vllm.v1.engine.exceptions import EngineDeadError

from jenga.metrics.engine import PERIOD

ANSWER_S = 10.0
"""How long the answer to one question may take; a core that is busy with a long step is asked again."""

# vLLM hands on no type of an error in its engine core, only these words.
_UNKNOWN = re.compile(r"Call to (\w+) method failed: '\w+' object has no attribute '(\w+)'")


def unknown_to_core(error: BaseException) -> bool:
    """Whether vLLM says that its engine core does not know the question: it runs without the plugin (``JENGA=0``)."""
    said = _UNKNOWN.fullmatch(str(error))
    return said is not None and said[1] == said[2]


async def ask_on(ask: Callable[[], Awaitable[bool]], log: logging.Logger) -> None:
    """Call `ask` every `PERIOD` until it answers False, the engine is dead, or its core does not know the question.

    Anything else is told once and tried again: metrics must not hurt serving, and one fault must not end them.
    """
    complained = False
    while True:
        try:
            async with asyncio.timeout(ANSWER_S):
                if not await ask():
                    return
        except TimeoutError:
            pass
        except EngineDeadError:
            return
        except Exception as error:
            if unknown_to_core(error):
                return
            if not complained:
                log.warning("Jenga's metrics are not up to date: %s: %s", type(error).__name__, error)
            complained = True
        await asyncio.sleep(PERIOD)
