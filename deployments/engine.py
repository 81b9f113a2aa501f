"""Engine replica: Ray's LLMServer and vLLM engine, with our metrics and a start-up error that tells why."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.llm.deployment import LLMServer

from deployments import autoscaling, keys, logs, streams
from deployments.cache_router import KV_STREAM
from deployments.events import Resting, SnapshotServer, Source
from deployments.failures import in_our_terms, root_cause
from deployments.memory_map import MemoryWatch
from deployments.metrics import Exporter
from deployments.router_metrics import Predictions
from jenga.metrics import Sample
from jenga.metrics.engine import EngineReport, report_samples
from jenga.metrics.memory import LIVE_CAUSES
from jenga.vllm_plugin.asking import ANSWER_S, ask_on

logger = logging.getLogger("ray.serve")

# Read back at most this much of a replica's log when its engine fails.
_LOG_TAIL_BYTES = 1 << 20
# How often the engine's death is looked for, and how long the errors of its requests have to be sent.
_WATCH_S = 0.2
_LAST_WORDS_S = 0.3
# Steps of the fraction of memory in use that routers are told.
_STEPS = 20
# vLLM's own metrics have it too.
_LABELS = ("model_name",)


class EngineStartError(RuntimeError):
    """The engine did not start; the message is for the person who wrote the configuration."""


class JengaServer(LLMServer):
    """One replica: an engine and what is told about it."""

    _kv_in_use = 0.0
    _kv_stream: dict[str, Any] | None = None
    _resting: Resting
    _snapshots = ""
    _report: dict[str, Any] | None = None
    _load: dict[str, float] | None = None

    async def start(self) -> None:
        """Start the engine; raise EngineStartError with its own reason if that fails."""
        log = Path(f"/proc/{os.getpid()}/fd/2").resolve()
        begin = log.stat().st_size if log.is_file() else 0
        # vLLM's event publisher listens on this address; by itself it would look for one that reaches the internet.
        os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())
        try:
            with logs.kept_open():
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
        for serving in (self.engine._oai_serving_chat, self.engine._oai_serving_completion):
            streams.raise_failures(serving)
        replica = serve.get_replica_context().replica_id.unique_id
        self._memory_watch = MemoryWatch(self._ask_core, replica, self._llm_config.model_id)
        self._metrics = asyncio.create_task(self._export_metrics())
        self._watch = asyncio.create_task(self._end_with_the_engine())
        if self._llm_config.engine_kwargs.get("kv_events_config"):
            self._resting = Resting()
            self._snapshots = SnapshotServer(self._snapshot).start(ray.util.get_node_ip_address())
            await self._locate_stream()
            self._compare_predictions()

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine is dead.

        vLLM's own exception would have the controller import vLLM to read it: 450 MiB, measured.
        """
        try:
            await super().check_health()
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None

    async def _end_with_the_engine(self) -> None:
        """End this process soon after its engine has died.

        Ray learns of a dead process at once, of a failed health check after several periods, and until then an engine
        that fails every request fast looks idle to every router.
        """
        while not self.engine._engine_client.errored:
            await asyncio.sleep(_WATCH_S)
        logger.error("the engine died: this replica ends, and Ray starts another one")
        await asyncio.sleep(_LAST_WORDS_S)
        os._exit(1)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What routers learn of this replica: Ray's own, the part of the KV memory in use, and where its events are."""
        told = {**await super().record_routing_stats(), autoscaling.KV_IN_USE: self._kv_in_use}
        if self._snapshots:
            await self._locate_stream()
            told[KV_STREAM] = self._kv_stream
        return told

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `deployments.autoscaling` decides by; nothing while the engine has not reported."""
        return self._load or {}

    async def memory(self, replica: str | None, large: int | None) -> dict[str, Any] | bytes | None:
        """What the memory map's routes ask of every replica: `MemoryWatch.answer`."""
        return await self._memory_watch.answer(self._report, replica, large)

    async def _ask_core(self, question: str, *arguments: Any) -> Any:
        return await self.engine._engine_client.engine_core.call_utility_async(question, *arguments)

    async def _snapshot(self) -> dict[str, Any] | None:
        """Everything that this replica's engine has cached."""
        data: dict[str, Any] | None = await self._ask_core("jenga_cache_snapshot")
        return data

    async def _locate_stream(self) -> None:
        """Learn where the engine's event stream is, and how far."""
        try:
            stream = await asyncio.wait_for(self._ask_core("jenga_event_stream"), ANSWER_S)
        except TimeoutError:
            return  # busy with a long step; the stream is where it was
        except Exception as error:
            # No plugin in the core (JENGA=0): routers then place by load.
            logger.warning("no KV event stream of this engine: %s", error)
            stream = None
        self._kv_stream = (
            stream
            and self._resting.told(
                Source(stream["events"], stream["replay"], self._snapshots, stream["epoch"], stream["sequence"])
            ).to_dict()
        )

    def _compare_predictions(self) -> None:
        """Compare each request's cached tokens with what its router expected."""
        client = self.engine._engine_client
        generate = client.generate
        replica = serve.get_replica_context().replica_id.unique_id
        predictions = Predictions(Exporter(_LABELS), self._whose())

        async def compared(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            predicted = keys.take_prediction(sampling_params, replica)
            async for output in generate(prompt, sampling_params, *args, **kwargs):
                if predicted is not None and output.num_cached_tokens is not None:
                    predictions.record(predicted, output.num_cached_tokens)
                    predicted = None
                yield output

        client.generate = compared

    def _whose(self) -> dict[str, str]:
        """Labels of all metrics of this replica, besides Ray's."""
        return dict(zip(_LABELS, [self._llm_config.model_id], strict=True))

    def _samples(self, data: Mapping[str, Any]) -> Iterator[Sample]:
        """Samples of what `jenga_memory` answered; lazily, so that the exporter meets its faults."""
        report = EngineReport.from_dict(data)
        causes = report.memory.by_cause()
        in_use = sum(causes[cause] for cause in LIVE_CAUSES) / report.memory.buffer_bytes
        self._load = {
            autoscaling.KV_IN_USE: in_use,
            autoscaling.RESIDENT: report.requests.resident,
            autoscaling.WAITING: report.requests.waiting,
            autoscaling.ADMITTED: report.hits.requests,
        }
        # In steps, because every change is sent to every router.
        self._kv_in_use = round(in_use * _STEPS) / _STEPS
        yield from report_samples(report)

    async def _export_metrics(self) -> None:
        """Ask the engine core for its memory now and then, and hand the samples to Ray.

        The core answers between two steps, so what is exported is consistent, also when it idles.
        """
        exporter = Exporter(_LABELS)

        async def ask() -> bool:
            data = await self._ask_core("jenga_memory")
            if data is None:
                # vLLM's own manager is in charge.
                if "policy" in (self._llm_config.deployment_config.get("autoscaling_config") or {}):
                    logger.warning("no memory reports of this engine: replicas stay as they are; use signal: requests")
                return False
            self._report = data
            exporter.publish(self._samples(data), self._whose())
            return True

        await ask_on(ask, logger)


def _reason_in(log: Path, begin: int) -> str | None:
    """The root cause written to the log since ``begin`` (bytes), None if it cannot be had."""
    with contextlib.suppress(OSError):
        if log.is_file():
            with log.open("rb") as file:
                file.seek(max(begin, log.stat().st_size - _LOG_TAIL_BYTES))
                return root_cause(file.read().decode(errors="replace").splitlines())
    return None
