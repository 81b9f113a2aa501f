"""Settings of the plugin: the ``jenga`` entry of vLLM's ``--additional-config``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from jenga.checkpoints import GPU_PASS_TOKENS, PASS_TOKENS


def default_pass_tokens() -> int:
    """What a forward pass is taken to cost on this machine, in tokens."""
    return GPU_PASS_TOKENS if current_platform.is_cuda_alike() else PASS_TOKENS


class Checkpoints(BaseModel):
    """What windows and recurrent states are kept for, besides the ends of prompts and seen junctions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    turns: bool = Field(default=True, description="the start of the first and the last turn of a chat prompt")
    answers: bool = Field(default=True, description="the end of the answer, for the next turn of a conversation")
    pass_tokens: int = Field(
        default_factory=default_pass_tokens,
        ge=1,
        description="what one more forward pass costs, in tokens: a prefill pauses only where a state spares more",
    )


class Events(BaseModel):
    """What KV events carry."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    contents: bool = Field(
        default=True, description="token ids and salts of the blocks stored; an index of Jenga's needs neither"
    )


class Settings(BaseModel):
    """All settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    events: Events = Events()


def read(config: VllmConfig) -> Settings:
    """The settings of an engine.

    Raises:
        ValueError: an unknown setting or a bad value; the message names it.
    """
    extra: Any = config.additional_config
    given = extra.get("jenga", {}) if isinstance(extra, dict) else {}
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("additional_config", "jenga", *map(str, first["loc"])))
        raise ValueError(
            f"{where} = {first['input']!r}: {first['msg']}. Known: checkpoints.turns, checkpoints.answers, "
            "events.contents (true or false), checkpoints.pass_tokens (a number of tokens, 1 or more)."
        ) from None
