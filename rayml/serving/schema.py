"""What clients send, as OpenAI's API has it where OpenAI's API has it.

Unknown fields are refused, by name. A null is as good as nothing, as OpenAI's clients send them. Fields of OpenAI's
that ask for what is not done here are taken with the values that ask for nothing.
"""

import json
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayml.serving.errors import ApiError
from rayml.serving.store import NAME, UNNAMED
from rayml.tasks.episodes import relabel
from rayml.tasks.kinds import KindName
from rayml.tasks.row import unanswered
from rayml.tasks.task import Example, conversation


def clean(text: str) -> str:
    """Refuse what is no text: NUL, and halves of surrogate pairs."""
    if "\x00" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode") from None
    return text


def filled(text: str) -> str:
    if is_blank(text):
        raise ValueError("is empty")
    return text


def is_blank(text: str) -> bool:
    """Return whether nothing of a text is seen: spaces, and characters without a width."""
    return all(unicodedata.category(character)[0] in "ZC" for character in text)


def distinct(texts: list[str]) -> list[str]:
    if twice := next((text for index, text in enumerate(texts) if text in texts[:index]), None):
        raise ValueError(f"{twice[:60]!r} stands twice")
    return texts


Text = Annotated[str, AfterValidator(clean)]
Filled = Annotated[Text, AfterValidator(filled)]
Label = Annotated[Filled, AfterValidator(str.strip)]
Options = Annotated[list[Label], Field(min_length=2), AfterValidator(distinct)]
Stop = Annotated[Text, Field(min_length=1)]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if type(given) is dict else given


class TextPart(Body):
    type: Literal["text"]
    text: Text


Nothing = Annotated[list[Any], Field(max_length=0)]
"""A list of what is not done here."""


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None
    """The assistant's may be null, as in OpenAI's own answers."""
    name: str | None = None
    tool_calls: Nothing | None = None
    annotations: Nothing | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def some_filled(fields: dict[str, str]) -> dict[str, str]:
    if all(map(is_blank, fields.values())):
        raise ValueError("holds no text")
    return fields


Fields = Annotated[dict[str, Text], Field(min_length=1, max_length=16), AfterValidator(some_filled)]
"""An input's parts by their names, such as a premise and a hypothesis."""


class ExampleBody(Body):
    """`{"input", "target"}`, or `{"messages"}` whose last is the assistant's answer."""

    input: Filled | Fields | None = None
    target: Label | None = None
    messages: list[Message] | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> "ExampleBody":
        pair = self.input is not None and self.target is not None
        alone = self.input is None and self.target is None
        if not (pair and self.messages is None) and not (alone and self.messages is not None):
            raise ValueError("give input and target, or messages")
        if self.messages is not None and (len(self.messages) < 2 or self.messages[-1].role != "assistant"):
            raise ValueError("messages end with the assistant's answer, and have something before it")
        example = self.example()
        if is_blank(example.input) or is_blank(example.target):
            raise ValueError("the messages, or the fields, hold no text")
        return self

    def example(self, is_dialogue: bool = False) -> Example:
        """Return it as a task has it; messages as one text, unless the task is a dialogue."""
        if self.messages is None:
            return relabel(unanswered(self.input or ""), str(self.target))
        turns, answer = turns_of(self.messages[:-1]), self.messages[-1].text.strip()
        parts = (*turns, ("assistant", answer)) if is_dialogue else ()
        return Example(conversation(turns), answer, parts)


class AdapterRequest(Body):
    examples: list[ExampleBody]
    name: Name = UNNAMED
    options: Options | None = None
    """The labels; else the targets of the examples."""
    kind: KindName | None = None
    """What kind of task it is; else what the run was meta-trained on."""
    steps: Annotated[int, Field(ge=0)] | None = None
    """Inner steps; else the run's."""
    ttl_seconds: Annotated[float, Field(ge=1, le=10 * 365 * 86400)] | None = None
    """The adapter expires after this; else never."""
    background: bool = False
    """Answer 202 at once; `GET /v1/adapters/{id}` says how far it is. So does the header `Prefer: respond-async`."""

    @property
    def pairs(self) -> list[Any]:
        """What tells the examples from others: (input, target), or all turns of messages."""
        return [(e.input, e.target) if e.messages is None else turns_of(e.messages) for e in self.examples]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class Sampled(Body):
    """What completions and chat have in common. Greedy unless asked."""

    model: Text
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | list[Stop] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] = 1
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Sampled):
    prompt: Text | list[Text]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] = 1
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None


class ClassifyRequest(Body):
    model: Text
    input: Filled | Fields | list[Filled | Fields]
    options: Options | None = None
    """Choose among these; else among the adapter's labels."""
    truncate: bool = False
    """Cut the beginning of inputs that are longer than the adapter reads, instead of refusing them."""

    @property
    def inputs(self) -> list[str | dict[str, str]]:
        return self.input if isinstance(self.input, list) else [self.input]


def turns_of(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in messages]


def plain(prompt: str | dict[str, str] | Sequence[Message]) -> str | dict[str, str]:
    """Return what is asked as an adapter's input: a conversation as one text."""
    return prompt if isinstance(prompt, str | dict) else conversation(turns_of(prompt))


def parse(kind: type[Body], body: bytes) -> Any:
    """Return the request in a body.

    Raises:
        ApiError: 400, it is no JSON, or not such a request; with the field and what is allowed.
    """
    try:
        found = kind.model_validate_json(body)
        json.loads(body, object_pairs_hook=without_duplicates)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False, include_input=False)
        places = [place(one, body) for one in mistakes]
        # Of a union each member has its say: the one that came furthest, and did not stumble over the type at once.
        mistake, names = max(
            zip(mistakes, places, strict=True), key=lambda pair: (len(pair[1]), not pair[0]["type"].endswith("_type"))
        )
        field = ".".join(names)
        message = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            known = f"; there are {', '.join(kind.model_fields)}" if len(mistake["loc"]) == 1 else ""
            message = f"unknown field{known}"
        raise ApiError(400, f"{field}: {message}" if field else message, field or None, mistake["type"]) from None
    except DuplicateKeyError as error:
        raise ApiError(400, f"{error}: stands twice", str(error), "duplicate_key") from None
    return found


class DuplicateKeyError(Exception):
    """A key that stands twice in a JSON object: readers do not agree on which one counts."""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKeyError(next(key for key in keys if keys.count(key) > 1)[:60])
    return found


def place(mistake: Any, body: bytes) -> list[str]:
    """Return the client's field that pydantic speaks of: members of a union stand in its place, and are none of it."""
    try:
        node = json.loads(body)
    except (ValueError, RecursionError):
        return []
    names = []
    for part in mistake["loc"]:
        if part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int):
            node = node[part]
            names.append(str(part))
        elif isinstance(node, dict) and mistake["type"] == "missing" and part == mistake["loc"][-1]:
            names.append(str(part))
    return names
