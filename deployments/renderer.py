"""Prompts as token ids, by vLLM's own renderer: chat template and tokeniser run once, in the ingress."""

from __future__ import annotations

from collections.abc import Mapping
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


class PromptRenderer:
    """One model's renderer, set up as its engines set up theirs."""

    def __init__(self, config: LLMConfig) -> None:
        """Load tokeniser and chat template.

        Raises whatever vLLM raises where the model's files cannot be read.
        """
        engine = config.get_engine_config()
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
        if "messages" in payload:
            return await self._chat(payload)
        prompt = payload.get("prompt")
        if payload.get("echo") or payload.get("prompt_embeds") is not None:
            return None
        if isinstance(prompt, list) and not all(type(token) is int for token in prompt):
            return None
        request = CompletionRequest.model_validate(dict(payload))
        rendered = await self._renderer.preprocess_completion(
            request, prompt_input=prompt, prompt_embeds=None, skip_mm_cache=True
        )
        return self._only(rendered)

    async def _chat(self, payload: Mapping[str, Any]) -> list[int] | None:
        if has_non_text_content(payload["messages"]) or payload.get("echo"):
            return None
        rendered = await self._renderer.render_chat(
            ChatCompletionRequest.model_validate(dict(payload)), skip_mm_cache=True
        )
        return None if isinstance(rendered, ErrorResponse) else self._only(rendered[1])

    def _only(self, rendered: list[Any]) -> list[int] | None:
        if len(rendered) != 1:
            return None
        ids = extract_prompt_components(self._model, rendered[0]).token_ids
        return list(ids) if ids else None
