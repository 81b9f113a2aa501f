"""The engine cores' reports on the ``/metrics`` of plain ``vllm serve``.

vLLM makes a `JengaStatLogger` through the entry point group ``vllm.stat_logger_plugins``, in the process that serves
HTTP.  What it hands a stat logger does not include Jenga's report, which is in the engine core's process, so the logger
asks for it: `attach` gives it the way there.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from jenga.metrics.engine import EngineReport, report_samples
from jenga.metrics.prometheus import Exporter
from jenga.vllm_plugin import registered
from jenga.vllm_plugin.adapter import check_seam
from jenga.vllm_plugin.asking import ask_on

logger = init_logger("vllm.jenga")

_exporter: Exporter | None = None


def exporter() -> Exporter:
    """This process's metrics (a name can be registered only once); labels as vLLM's own metrics have them."""
    global _exporter
    if _exporter is None:
        _exporter = Exporter(("model_name", "engine"))
    return _exporter


class JengaStatLogger(AggregateStatLoggerBase):
    """Publishes every engine core's report (`ask_on`); does nothing with ``JENGA=0``, or until attached."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.model_name = str(vllm_config.model_config.served_model_name)
        self.engines = engine_indexes
        self._client: weakref.ref[Any] | None = None
        self._task: asyncio.Task[None] | None = None
        if registered():
            install()

    def attach(self, client: Any) -> None:
        """Ask through `client`, an asynchronous engine core client, from now on.  Needs a running event loop."""
        if self._task is None:
            self._client = weakref.ref(client)
            self._task = asyncio.get_running_loop().create_task(ask_on(self._ask_once, logger))

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Called with every step's outputs, which say nothing of Jenga."""

    def log_engine_initialized(self) -> None:
        """Nothing to say: the plan was logged when it was made."""

    async def _ask_once(self) -> bool:
        client = self._client() if self._client is not None else None
        return client is not None and not client.resources.engine_dead and await self.ask(client)

    async def ask(self, client: Any) -> bool:
        """Ask every engine core and publish the answers; False if Jenga manages none of them."""
        answers = await client.call_utility_all_async("jenga_memory")
        for engine, answer in zip(self.engines, answers, strict=True):
            if answer is not None:
                samples = report_samples(EngineReport.from_dict(answer))
                exporter().publish(samples, {"model_name": self.model_name, "engine": str(engine)})
        return any(answer is not None for answer in answers)


def install() -> None:
    """Let `AsyncLLM` attach Jenga's logger to its engine core client when it begins to read outputs.

    With several HTTP processes only the first one asks, or counters would be counted in each.

    Raises:
        RuntimeError: vLLM was changed there.
    """
    from vllm.v1.engine.async_llm import AsyncLLM  # loaded wherever a stat logger is made, and not needed elsewhere

    original: Callable[[AsyncLLM], None] = AsyncLLM._run_output_handler
    if getattr(original, "attaches_jenga", False):
        return
    check_seam(original, ("self",))

    @wraps(original)
    def _run_output_handler(self: AsyncLLM) -> None:
        original(self)
        made = self.logger_manager.stat_loggers if self.logger_manager is not None else []
        for one in made:
            if isinstance(one, JengaStatLogger) and self.engine_core.client_index == 0:
                one.attach(self.engine_core)

    setattr(_run_output_handler, "attaches_jenga", True)  # noqa: B010
    setattr(AsyncLLM, "_run_output_handler", _run_output_handler)  # noqa: B010
