"""OpenAI's completions and chat by vLLM's own serving classes.

Two things differ from vLLM: how a prompt is made for an adapter, and that responses name the model as the client did.
"""

import json
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.exceptions import EngineDeadError

from rayml.lm.chat import ANSWERS
from rayml.serving.errors import ApiError
from rayml.serving.queries import task_prompt
from rayml.serving.settings import Serving
from rayml.serving.vllm.versions import Version
from rayml.tasks.task import format_conversation


@dataclass(frozen=True)
class Target:
    """The model that a request asks."""

    name: str
    """As the client wrote it."""
    version: Version | None
    """Of the adapter; None for the bare base."""


TARGET: ContextVar[Target] = ContextVar("target")
"""The target of the request that is being handled."""


class Models(OpenAIServingModels):
    """Names the model in responses as the client did."""

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return TARGET.get().name


class TaskRenderer(OnlineRenderer):
    """Puts a text into an adapter's prompt, as an input of its task. Tokens stay as they are."""

    async def render_completion(self, request: Any, **kwargs: Any) -> Any:
        version = TARGET.get().version
        if version and not is_tokens(request.prompt):
            texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
            request.prompt = [task_prompt(version.adapter, text) for text in texts]
        return await super().render_completion(request, **kwargs)

    async def render_chat(self, request: Any, **kwargs: Any) -> Any:
        version = TARGET.get().version
        if version and version.adapter.card.kind == "dialogue":
            request.chat_template_kwargs = ANSWERS | (request.chat_template_kwargs or {})  # as in learning
        if version is None or version.adapter.card.kind == "dialogue":
            return await super().render_chat(request, **kwargs)
        if request.tools:
            return create_error_response("this adapter's prompt shows no tools; ask the base", param="tools")
        turns = [(message["role"], text_of(message.get("content"))) for message in request.messages]
        return [], [tokens_input(task_prompt(version.adapter, format_conversation(turns)))]


def is_tokens(prompt: Any) -> bool:
    """Return whether a prompt is a list of tokens, or a list of such lists."""
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], str)


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


class Protocol:
    """Completions and chat on one engine.

    Args:
        engine: vLLM's `AsyncLLM`.
        name: what clients call the base.
    """

    def __init__(self, engine: Any, serving: Serving, name: str, base: str):
        self.limits, self.seed = serving.limits, serving.seed
        self.models = Models(engine, [BaseModelPath(name=name, model_path=base)])
        self.name = name
        shared: dict[str, Any] = {"chat_template": None, "chat_template_content_format": "auto"}
        shared |= {"tool_parser": serving.answerers.tools, "enable_auto_tools": serving.answerers.tools is not None}
        renderer = TaskRenderer(engine.model_config, engine.renderer, request_logger=None, **shared)
        common = {"online_renderer": renderer, "request_logger": None}
        completions = OpenAIServingCompletion(engine, self.models, **common)
        chat = OpenAIServingChat(engine, self.models, "assistant", **common, **shared)
        self._kinds = {
            "completions": (CompletionRequest, completions.create_completion),
            "chat": (ChatCompletionRequest, chat.create_chat_completion),
        }

    async def respond(self, kind: str, body: dict[str, Any], version: Version | None) -> Any:
        """Return the response as a JSON text, or its events.

        Raises:
            ApiError: vLLM refuses the request, or it exceeds a limit of the server.
            EngineDeadError: the engine is gone.
        """
        request_type, create = self._kinds[kind]
        TARGET.set(Target(str(body["model"]), version))
        try:
            request = request_type.model_validate(body | {"model": version.name if version else self.name})
        except ValidationError as error:
            mistake = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(map(str, mistake["loc"]))
            raise ApiError(400, f"{field}: {mistake['msg']}", field or None, mistake["type"]) from None
        self._check_limits(request)
        if request.seed is None:
            request.seed = self.seed
        try:
            response = await create(request)
        except (ApiError, EngineDeadError):
            raise
        except Exception as error:
            response = create_error_response(error)
        if isinstance(response, ErrorResponse):
            raise ApiError(response.error.code, response.error.message, response.error.param)
        strips = version is not None and not getattr(request, "echo", False)
        if not hasattr(response, "model_dump"):
            return strip_events(response) if strips else response
        content = response.model_dump(mode="json")
        return json.dumps(strip_choices(content, set()) if strips else content, ensure_ascii=False)

    def _check_limits(self, request: Any) -> None:
        prompt = getattr(request, "prompt", None)
        prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        texts = len(prompts) * (request.n or 1)
        if texts > self.limits.inputs:
            raise ApiError(422, f"prompt, n: {texts} texts requested; at most {self.limits.inputs}", "n")
        max_tokens = max(getattr(request, "max_completion_tokens", None) or 0, request.max_tokens or 0)
        if max_tokens > self.limits.max_tokens:
            raise ApiError(422, f"max_tokens: at most {self.limits.max_tokens}", "max_tokens")


async def strip_events(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield events with `strip_choices` applied to their bodies."""
    started: set[int] = set()
    async for event in events:
        data = event.removeprefix("data: ").strip()
        if data.startswith("{"):
            event = f"data: {json.dumps(strip_choices(json.loads(data), started), ensure_ascii=False)}\n\n"
        yield event


def strip_choices(body: dict[str, Any], started: set[int]) -> dict[str, Any]:
    """Remove the space that an adapter puts before its target, from every choice whose text has not `started`."""
    for choice in body.get("choices", ()):
        holder = choice.get("message") or choice.get("delta") or choice
        key = "text" if "text" in choice else "content"
        if holder.get(key) and choice["index"] not in started:
            holder[key] = holder[key].lstrip()
            started |= {choice["index"]} if holder[key] else set()
    return body
