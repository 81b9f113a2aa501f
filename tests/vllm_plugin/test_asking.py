"""Questions to an engine core go on whatever goes wrong, and end where there is nothing to ask."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from vllm.v1.engine import UtilityOutput
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError

from jenga.vllm_plugin import asking


def told_by_vllm(name: str, core: object) -> Exception:
    """What a front end gets of a question that fails, in vLLM's own words."""
    output = UtilityOutput(1)
    EngineCoreProc._invoke_utility_method(name, lambda: getattr(core, name)(), output, lambda _: None)
    return Exception(output.failure_message)


class Core:
    def jenga_memory(self) -> Any:
        return self.missing  # type: ignore[attr-defined]


def test_an_unknown_question_is_told_from_a_fault() -> None:
    assert asking.unknown_to_core(told_by_vllm("jenga_map", Core()))
    assert not asking.unknown_to_core(told_by_vllm("jenga_memory", Core())), "a fault in the plugin itself"
    assert not asking.unknown_to_core(Exception("Server shutting down"))


@pytest.mark.asyncio
@pytest.mark.parametrize("last", [EngineDeadError(), told_by_vllm("jenga_map", Core()), False], ids=repr)
async def test_faults_do_not_end_it(
    last: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asking, "PERIOD", 0.0)
    monkeypatch.setattr(asking, "ANSWER_S", 0.05)
    answers: list[Any] = [True, ValueError("a"), "busy", told_by_vllm("jenga_memory", Core()), True, last]

    async def ask() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer == "busy":
            await asyncio.Event().wait()
        return bool(answer)

    await asking.ask_on(ask, logging.getLogger("somebody"))
    assert answers == []
    assert [record.getMessage() for record in caplog.records if record.name == "somebody"] == [
        "Jenga's metrics are not up to date: ValueError: a"
    ]
