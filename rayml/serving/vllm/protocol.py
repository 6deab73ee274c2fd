"""OpenAI's completions and chat by vLLM's own serving classes.

Ours alone is what an adapter's prompt is made of, and by what name the client asked.
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
from rayml.serving.queries import unlimited
from rayml.serving.settings import Serving
from rayml.serving.vllm.versions import Version
from rayml.tasks.row import unanswered
from rayml.tasks.task import conversation


@dataclass(frozen=True)
class Asking:
    """Whom the request at hand asks."""

    name: str
    """As the client wrote it."""
    version: Version | None
    """None: the bare base."""


ASKING: ContextVar[Asking] = ContextVar("asking")


class Models(OpenAIServingModels):
    """Calls a model in answers what the client calls it."""

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return ASKING.get().name


class TaskRenderer(OnlineRenderer):
    """Shows a text to an adapter as an input of its task, and tokens as they are."""

    async def render_completion(self, request: Any, **more: Any) -> Any:
        version = ASKING.get().version
        if version and not is_tokens(request.prompt):
            texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
            request.prompt = [shown_to(version, text) for text in texts]
        return await super().render_completion(request, **more)

    async def render_chat(self, request: Any, **more: Any) -> Any:
        version = ASKING.get().version
        if version and version.adapter.card.kind == "dialogue":
            request.chat_template_kwargs = ANSWERS | (request.chat_template_kwargs or {})  # as it was learned
        if version is None or version.adapter.card.kind == "dialogue":
            return await super().render_chat(request, **more)
        if request.tools:
            return create_error_response("this adapter's prompt shows no tools; ask the base", param="tools")
        turns = [(message["role"], text_of(message.get("content"))) for message in request.messages]
        return [], [tokens_input(shown_to(version, conversation(turns)))]


def is_tokens(prompt: Any) -> bool:
    """Return whether a prompt is tokens, or a list of such."""
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], str)


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


def shown_to(version: Version, text: str) -> list[int]:
    return unlimited(version.adapter.encoder).asked(unanswered(text), version.adapter.shown)


class Protocol:
    """Answers completions and chat on one engine.

    Args:
        engine: vLLM's `AsyncLLM`.
        name: of the base, to clients.
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
        """Return the answer as a JSON text, or its events.

        Raises:
            ApiError: what vLLM refuses, or a limit of the server does.
            EngineDeadError: the engine is gone.
        """
        shape, create = self._kinds[kind]
        asking = Asking(str(body["model"]), version)
        ASKING.set(asking)
        try:
            request = shape.model_validate(body | {"model": version.name if version else self.name})
        except ValidationError as error:
            mistake = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(map(str, mistake["loc"]))
            raise ApiError(400, f"{field}: {mistake['msg']}", field or None, mistake["type"]) from None
        self._check(request)
        if request.seed is None:
            request.seed = self.seed
        try:
            answer = await create(request)
        except (ApiError, EngineDeadError):
            raise
        except Exception as error:
            answer = create_error_response(error)
        if isinstance(answer, ErrorResponse):
            raise ApiError(answer.error.code, answer.error.message, answer.error.param)
        strips = version is not None and not getattr(request, "echo", False)
        if not hasattr(answer, "model_dump"):
            return stripped(answer) if strips else answer
        found = answer.model_dump(mode="json")
        return json.dumps(with_stripped(found, set()) if strips else found, ensure_ascii=False)

    def _check(self, request: Any) -> None:
        prompts = getattr(request, "prompt", None)
        given = prompts if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else [prompts]
        texts = len(given) * (request.n or 1)
        if texts > self.limits.inputs:
            raise ApiError(422, f"prompt, n: {texts} texts asked for; at most {self.limits.inputs}", "n")
        most = max(getattr(request, "max_completion_tokens", None) or 0, request.max_tokens or 0)
        if most > self.limits.max_tokens:
            raise ApiError(422, f"max_tokens: at most {self.limits.max_tokens}", "max_tokens")


async def stripped(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield events whose texts begin without the space that stands before a target."""
    begun: set[int] = set()
    async for event in events:
        told = event.removeprefix("data: ").strip()
        if told.startswith("{"):
            event = f"data: {json.dumps(with_stripped(json.loads(told), begun), ensure_ascii=False)}\n\n"
        yield event


def with_stripped(body: dict[str, Any], begun: set[int]) -> dict[str, Any]:
    """Take the space off the beginning of every choice that has not `begun`."""
    for choice in body.get("choices", ()):
        holder = choice.get("message") or choice.get("delta") or choice
        key = "text" if "text" in choice else "content"
        if holder.get(key) and choice["index"] not in begun:
            holder[key] = holder[key].lstrip()
            begun |= {choice["index"]} if holder[key] else set()
    return body
