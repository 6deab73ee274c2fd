"""What clients send, as OpenAI's API has it where OpenAI's API has it. Unknown fields are refused, by name."""

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
    if not text.strip():
        raise ValueError("is empty")
    return text


Text = Annotated[str, AfterValidator(clean)]
Filled = Annotated[Text, AfterValidator(filled)]
Label = Annotated[Filled, AfterValidator(str.strip)]
Stop = Annotated[Text, Field(min_length=1)]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Fields = Annotated[dict[str, Text], Field(min_length=1, max_length=16)]
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
        if not (example.input.strip() and example.target.strip()):
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
    options: list[Label] | None = None
    """The labels; else the targets of the examples."""
    kind: KindName | None = None
    """What kind of task it is; else what the run was meta-trained on."""
    steps: Annotated[int, Field(ge=0)] | None = None
    """Inner steps; else the run's."""
    ttl_seconds: Annotated[float, Field(gt=0, le=10 * 365 * 86400)] | None = None
    """The adapter expires after this; else never."""

    @property
    def pairs(self) -> list[Any]:
        """What tells the examples from others: (input, target), or all turns of messages."""
        return [(e.input, e.target) if e.messages is None else turns_of(e.messages) for e in self.examples]


class StreamOptions(Body):
    include_usage: bool = False


class Sampled(Body):
    """What completions and chat have in common. Greedy unless asked."""

    model: Text
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | list[Stop] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Sampled):
    prompt: Text | list[Text]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0


class ClassifyRequest(Body):
    model: Text
    input: Text | Fields | list[Text | Fields]
    options: list[Label] | None = None
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
        return kind.model_validate_json(body)
    except ValidationError as error:
        mistake = error.errors(include_url=False, include_context=False, include_input=False)[0]
        ours = "function-", "list[", "str", "constrained-"  # names of a union's members are no field of the client's
        field = ".".join(str(part) for part in mistake["loc"] if not str(part).startswith(ours))
        message = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            known = f"; there are {', '.join(kind.model_fields)}" if len(mistake["loc"]) == 1 else ""
            message = f"unknown field{known}"
        raise ApiError(400, f"{field}: {message}" if field else message, field or None, mistake["type"]) from None
