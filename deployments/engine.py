"""Engine replica: Ray's LLMServer and vLLM engine, with our metrics and a start-up error that tells why."""

import contextlib
import logging
import os
from pathlib import Path

from ray.serve.llm.deployment import LLMServer

from deployments.failures import in_our_terms, root_cause

logger = logging.getLogger("ray.serve")

# Read back at most this much of a replica's log when its engine fails.
_LOG_TAIL_BYTES = 1 << 20


class EngineStartError(RuntimeError):
    """The engine did not start; the message is for the person who wrote the configuration."""


class JengaServer(LLMServer):
    """One replica: an engine and what is told about it."""

    async def start(self) -> None:
        """Start the engine; raise EngineStartError with its own reason if that fails."""
        log = Path(f"/proc/{os.getpid()}/fd/2").resolve()
        begin = log.stat().st_size if log.is_file() else 0
        try:
            await super().start()
        except Exception as error:
            logger.exception("the engine did not start")
            reason = _reason_in(log, begin) or root_cause(str(error).splitlines()) or str(error)
            kwargs = self._llm_config.engine_kwargs
            raise EngineStartError(
                in_our_terms(
                    reason,
                    kv_memory=kwargs.get("kv_cache_memory_bytes"),
                    max_model_len=kwargs.get("max_model_len"),
                )
            ) from None


def _reason_in(log: Path, begin: int) -> str | None:
    """The root cause written to the log since ``begin`` (bytes), None if it cannot be had."""
    with contextlib.suppress(OSError):
        if log.is_file():
            with log.open("rb") as file:
                file.seek(max(begin, log.stat().st_size - _LOG_TAIL_BYTES))
                return root_cause(file.read().decode(errors="replace").splitlines())
    return None
