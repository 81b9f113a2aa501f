"""Streams that fail raise what they failed of, in the replica.

vLLM ends them with an event of its own and `[DONE]`, as if they were whole: nobody behind it could try again, and a
client could not tell a cut answer from a whole one.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException

END = "data: [DONE]\n\n"
"""The last event of a whole stream, and of no other."""
# What vLLM's generators make an event of their failure with.
_TELLERS = ("create_streaming_error_response", "_convert_generation_error_to_streaming_response")


def raise_failures(serving: Any) -> None:
    """Have the streams of a serving object of vLLM's raise their failure.

    Raises AttributeError where vLLM tells failures in another way.
    """
    describe = serving.create_error_response

    def failed(error: Exception, *args: Any, **kwargs: Any) -> NoReturn:
        told = describe(error).error
        if told.code != 500:
            # Not the engine's fault; in words that any process can read.
            raise OpenAIHTTPException(told.code, told.message, told.type) from error
        raise error

    for name in _TELLERS:
        getattr(serving, name)
        setattr(serving, name, failed)


def is_whole(part: object) -> bool:
    """Whether a stream's part, one event or several, is its proper end."""
    last = part[-1] if isinstance(part, list) and part else part
    return isinstance(last, str) and last.endswith(END)
