"""The request bodies, in OpenAI's format where OpenAI has one.

An unknown field is refused by its name. A null counts as a missing field, since OpenAI's clients send nulls. Fields of
OpenAI's for features that this server lacks are accepted with those values that do not use the feature.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayml.serving.errors import ApiError
from rayml.serving.store import NAME, UNNAMED
from rayml.tasks.episodes import relabel
from rayml.tasks.kinds import KindName, format_target, infer_kind
from rayml.tasks.row import query_example
from rayml.tasks.task import Example, format_conversation

INVISIBLE = "Zs", "Zl", "Zp", "Cc", "Cf"
"""Unicode's categories of spaces, control and zero-width characters. Emoji that are newer than Python are in none."""


def check_characters(text: str) -> str:
    """Refuse NUL characters and lone surrogates, which tokenizers cannot encode."""
    if "\x00" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode") from None
    return text


def is_blank(text: str) -> bool:
    """Return whether nothing of a text is visible: it has only spaces, control and zero-width characters."""
    return all(unicodedata.category(character) in INVISIBLE for character in text)


def check_not_blank(text: str) -> str:
    if is_blank(text):
        raise ValueError("is empty")
    return text


def check_unique(texts: list[str]) -> list[str]:
    duplicate = first_duplicate(texts)
    if duplicate is not None:
        raise ValueError(f"{duplicate[:60]!r} appears twice")
    return texts


def first_duplicate(texts: Iterable[str]) -> str | None:
    """Return the first text that appears twice, if any. A body may hold very many."""
    return next((text for text, count in Counter(texts).items() if count > 1), None)


def check_any_text(fields: dict[str, str]) -> dict[str, str]:
    if all(map(is_blank, fields.values())):
        raise ValueError("holds no text")
    return fields


Text = Annotated[str, AfterValidator(check_characters)]
VisibleText = Annotated[Text, AfterValidator(check_not_blank)]
Label = Annotated[VisibleText, AfterValidator(str.strip)]
Options = Annotated[list[Label], Field(min_length=2), AfterValidator(check_unique)]
Stop = Annotated[Text, Field(min_length=1)]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Fields = Annotated[dict[str, Text], Field(min_length=1, max_length=16), AfterValidator(check_any_text)]
"""The parts of an input by name, such as a premise and a hypothesis."""
Input = VisibleText | Fields
EmptyList = Annotated[list[Any], Field(max_length=0)]
"""For a feature of OpenAI's that this server lacks."""
COMPLETION_TOKENS = 64
"""The default length of a completion."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if type(body) is dict else body


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None
    """May be null in a message of the assistant, as it is in some of OpenAI's own responses."""
    name: str | None = None
    tool_calls: EmptyList | None = None
    annotations: EmptyList | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Span(Body):
    """A part of the input, such as a name, and what it is."""

    text: Label
    type: Label

    @classmethod
    def list_as_text(cls, items: "list[str | Span]") -> str:
        """Return a list of labels, or of spans, as the text that is learned."""
        return format_target([item.model_dump() if isinstance(item, cls) else item for item in items])


Items = Annotated[list[Label | Span], AfterValidator(Span.list_as_text)]


class ExampleBody(Body):
    """`{"input", "target"}`, or `{"messages"}`, whose last message is the assistant's answer."""

    input: Input | None = None
    target: Label | Items | None = None
    """A label or a text; or a list of labels, or of spans, which may be empty."""
    messages: list[Message] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ExampleBody":
        given = self.input is not None, self.target is not None, self.messages is not None
        if given not in ((True, True, False), (False, False, True)):
            raise ValueError("give input and target, or messages")
        if self.messages is not None and (len(self.messages) < 2 or self.messages[-1].role != "assistant"):
            raise ValueError("messages must end with the assistant's answer, and have another message before it")
        example = self.example()
        if is_blank(example.input) or is_blank(example.target):
            raise ValueError("the messages, or the fields, hold no text")
        return self

    def example(self, is_dialogue: bool = False) -> Example:
        """Return the task's example. Messages become one text, unless the task is a dialogue."""
        if self.messages is None:
            return relabel(query_example(self.input or ""), str(self.target))
        turns, answer = turns_of(self.messages[:-1]), self.messages[-1].text.strip()
        parts = (*turns, ("assistant", answer)) if is_dialogue else ()
        return Example(format_conversation(turns), answer, parts)


class AdapterRequest(Body):
    examples: list[ExampleBody]
    name: Name = UNNAMED
    options: Options | None = None
    """The labels. By default, the targets of the examples."""
    kind: KindName | None = None
    """The kind of task. By default, the kind that the run was meta-trained on."""
    steps: Annotated[int, Field(ge=0)] | None = None
    """Inner steps. By default, as many as the run's."""
    ttl_seconds: Annotated[float, Field(ge=1, le=10 * 365 * 86400)] | None = None
    """The time after which the adapter expires. By default, it never does."""
    background: bool = False
    """Answer 202 at once, and learn in the background; `GET /v1/adapters/{id}` shows the progress. The header
    `Prefer: respond-async` does the same."""

    @model_validator(mode="before")
    @classmethod
    def _add_kind(cls, body: Any) -> Any:
        """Add the kind of examples whose targets are lists, as in files of examples."""
        examples = body.get("examples") if type(body) is dict else None
        targets = [e.get("target") for e in examples if type(e) is dict] if type(examples) is list else []
        lists = sorted((target for target in targets if type(target) is list), key=len)
        if not lists:
            return body
        kind = infer_kind((), lists[-1])
        if body.get("kind") not in (None, kind):
            raise ValueError(f"targets that are lists are of kind {kind!r}, not {body['kind']!r}")
        return body | {"kind": kind}

    @property
    def pairs(self) -> list[Any]:
        """The contents of the examples, for the adapter's id: (input, target), or the turns of the messages."""
        return [
            (example.input, example.target) if example.messages is None else turns_of(example.messages)
            for example in self.examples
        ]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class Sampled(Body):
    """The fields that completions and chat have in common. Decoding is greedy by default."""

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

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


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

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def top_count(self) -> int | None:
        """The number of most probable tokens to show beside each token; None to show no log-probabilities."""
        return self.logprobs


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None

    @property
    def prompts(self) -> list[list[Message]]:
        return [self.messages]

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_count(self) -> int | None:
        """As `CompletionRequest.top_count`."""
        return self.top_logprobs if self.logprobs else None


class ClassifyRequest(Body):
    model: Text
    input: Input | list[Input]
    options: Options | None = None
    """The labels to choose among. By default, the adapter's own."""
    truncate: bool = False
    """Cut off the beginning of an input that is longer than the adapter reads, instead of refusing it."""

    @property
    def inputs(self) -> list[str | dict[str, str]]:
        return self.input if isinstance(self.input, list) else [self.input]


def turns_of(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in messages]


def as_input(prompt: str | Sequence[Message]) -> str:
    """Return a prompt as the input of an adapter's task. A conversation becomes one text.

    Raises:
        ApiError: 400, it is empty.
    """
    text = prompt if isinstance(prompt, str) else format_conversation(turns_of(prompt))
    if is_blank(text):
        field = "prompt" if isinstance(prompt, str) else "messages"
        raise ApiError(400, f"{field}: is empty", field)
    return text


def parse(kind: type[Body], body: bytes) -> Any:
    """Return the request of a JSON body.

    Raises:
        ApiError: 400, it is not JSON, or not such a request. The error names the field, and what is allowed.
    """
    try:
        request = kind.model_validate_json(body)
        json.loads(body, object_pairs_hook=refuse_duplicate_keys)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False, include_input=False)
        content = read_json(body)  # once, since a long body may have a mistake in every line
        paths = [client_path(mistake, content) for mistake in mistakes]
        # pydantic reports a mistake for each member of a union. Report the member that matched the deepest, and that
        # did not fail because of its type alone.
        mistake, path = max(
            zip(mistakes, paths, strict=True), key=lambda pair: (len(pair[1]), not pair[0]["type"].endswith("_type"))
        )
        field = ".".join(path)
        message = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            known_fields = f"; the fields are {', '.join(kind.model_fields)}" if len(mistake["loc"]) == 1 else ""
            message = f"unknown field{known_fields}"
        raise ApiError(400, f"{field}: {message}" if field else message, field or None, mistake["type"]) from None
    return request


def refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. If a key appears twice it is refused: parsers disagree on which of the values counts."""
    key = first_duplicate(key for key, _ in pairs)
    if key is not None:
        raise ApiError(400, f"{key[:60]}: appears twice", key[:60], "duplicate_key")
    return dict(pairs)


def read_json(body: bytes) -> Any:
    """Return the content of a body; None if it is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def client_path(mistake: Any, node: Any) -> list[str]:
    """Return the path to the field of a mistake in the client's body: pydantic's, without its names of union
    members."""
    path = []
    for key in mistake["loc"]:
        if key in node if isinstance(node, dict) else isinstance(node, list) and isinstance(key, int):
            node = node[key]
            path.append(str(key))
        elif isinstance(node, dict) and mistake["type"] == "missing" and key == mistake["loc"][-1]:
            path.append(str(key))
    return path
