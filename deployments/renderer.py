"""Prompts as token ids, by vLLM's own renderer: chat template and tokeniser run once, in the ingress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import _get_vllm_engine_config
from ray.serve.llm import LLMConfig
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.renderers import renderer_from_config
from vllm.renderers.chat_utils import has_non_text_content, load_chat_template
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.renderers.online_renderer import OnlineRenderer

from deployments import logs


class PromptRenderer:
    """One model's renderer, set up as its engines set up theirs."""

    def __init__(self, config: LLMConfig) -> None:
        """Load tokeniser and chat template.

        Raises whatever vLLM raises where the model's files cannot be read.
        """
        engine = config.get_engine_config()
        with logs.kept_open():
            _, vllm_config = _get_vllm_engine_config(config, device_type="cpu")
        front = FrontendArgs(**engine.frontend_kwargs)
        self._model = vllm_config.model_config
        self._renderer = OnlineRenderer(
            self._model,
            renderer_from_config(vllm_config),
            request_logger=None,
            chat_template=load_chat_template(front.chat_template),
            chat_template_content_format=front.chat_template_content_format,
            trust_request_chat_template=front.trust_request_chat_template,
            enable_auto_tools=front.enable_auto_tool_choice,
            exclude_tools_when_tool_choice_none=front.exclude_tools_when_tool_choice_none,
            tool_parser=front.tool_call_parser,
            default_chat_template_kwargs=front.default_chat_template_kwargs,
        )

    async def token_ids(self, payload: Mapping[str, Any]) -> list[int] | None:
        """The prompt of a request's JSON body as the engine will see it, in tokens.

        None where one sequence of tokens does not tell it: images, several prompts, echo, embeddings.

        Raises whatever vLLM raises for a body that it refuses.
        """
        if payload.get("echo"):
            return None
        prompt = payload.get("prompt")
        if "messages" not in payload and isinstance(prompt, list) and not all(type(token) is int for token in prompt):
            return None
        prompts = await self._prompts(payload)
        return list(prompts[0]) if len(prompts) == 1 and prompts[0] else None

    async def lengths(self, payload: Mapping[str, Any]) -> list[int]:
        """Tokens of each prompt of a request's JSON body, without those that hold more than text.

        Raises whatever vLLM raises for a body that it refuses.
        """
        return [len(ids) for ids in await self._prompts(payload)]

    async def _prompts(self, payload: Mapping[str, Any]) -> list[Sequence[int]]:
        """The prompts of a body that are text or tokens and nothing else."""
        if "messages" in payload:
            if has_non_text_content(payload["messages"]):
                return []
            chat = ChatCompletionRequest.model_validate(dict(payload))
            answer = await self._renderer.render_chat(chat, skip_mm_cache=True)
            rendered: list[Any] = [] if isinstance(answer, ErrorResponse) else answer[1]
        elif payload.get("prompt_embeds") is not None:
            return []
        else:
            request = CompletionRequest.model_validate(dict(payload))
            rendered = await self._renderer.preprocess_completion(
                request, prompt_input=payload.get("prompt"), prompt_embeds=None, skip_mm_cache=True
            )
        return [extract_prompt_components(self._model, each).token_ids or [] for each in rendered]
