"""One record of a data set, checked: a row `{"task", "input", "target", ...}`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayml.tasks.kinds import NAMES, kind_of, written
from rayml.tasks.task import Example, Parts, conversation

COLUMNS = "task", "input", "target", "options", "kind", "answers", "messages"
ROLES = "system", "developer", "user", "assistant"

Input = str | Mapping[str, str] | Sequence[Mapping[str, str] | tuple[str, str]]
"""What is to be answered: a text, fields by their names, or a dialogue's messages `{"role", "content"}`, which may also
stand as (role, text)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One validated row, and where it stood."""

    task: str
    input: str
    target: str
    options: tuple[str, ...]
    where: str
    kind: str = ""
    """As given, or as its fields tell; "": a label or a text."""
    parts: Parts = ()
    answers: tuple[str, ...] = ()


class RowError(ValueError):
    """What is wrong with a record, in a few words."""


def row_of(record: Mapping[str, Any], columns: Mapping[str, str], default_task: str, where: str) -> Row:
    """Return the row of a record.

    Args:
        record: `input` is a text, fields `{name: text}`, or messages `[{"role", "content"}]`, then without `target`,
            as is `messages`; `target` is a text, or a list of labels, or of spans `{"text", "type"}`.
        columns: the record's own names, where they differ; `input.NAME` names a part of the input.
        default_task: for records without a task, where no column is named for it.

    Raises:
        RowError: it cannot be used.
    """

    def value(name: str) -> Any:
        return record.get(columns.get(name, name))

    task = value("task")
    if task is None and "task" not in columns:
        task = default_task
    _text(task, columns.get("task", "task"))
    kind = value("kind") or ""
    if kind and kind not in NAMES:
        raise RowError(f"'kind' is {kind!r}; there are {', '.join(NAMES)}")
    given = _input(record, columns)
    if isinstance(given, list):
        return _dialogue(task, given, kind, where)
    parts = tuple(given.items()) if isinstance(given, dict) else ()
    for name, text in parts:
        _text(text, f"input.{name}")
    shown = "\n".join(text for _, text in parts) if parts else given
    _text(shown, columns.get("input", "input"))
    target, called = value("target"), columns.get("target", "target")
    kind = kind or kind_of([name for name, _ in parts], target)
    text = written(target)
    _text(text if text is not None or target is None else 0, called)
    options, answers = (_texts(value(name) or (), name) for name in ("options", "answers"))
    if isinstance(target, list):
        options = ()  # the labels of which several may hold: they do not compete
    if options and text not in options:
        raise RowError(f"target {text!r} is not among its options {list(options)}")
    return Row(task, shown, str(text), options, where, kind, parts, answers)


def unanswered(given: Input) -> Example:
    """Return the example of an input without a target."""
    if isinstance(given, str):
        return Example(given, "")
    if isinstance(given, Mapping):
        return Example("\n".join(given.values()), "", tuple(given.items()))
    turns = [(turn["role"], turn["content"]) if isinstance(turn, Mapping) else turn for turn in given]
    return Example(conversation(turns), "", (*turns, ("assistant", "")))


def is_dialogue(given: Any) -> bool:
    """Return whether an input is a dialogue: a list of messages, or of (role, text)."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        return False
    messages = [isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in given]
    return all(messages) or all(isinstance(turn, tuple) for turn in given)


def _input(record: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """Return the input: a text, a dict of parts, or a list of messages."""
    parts = {name.removeprefix("input."): record.get(own) for name, own in columns.items() if name.startswith("input.")}
    if parts:
        return parts
    given = record.get(columns.get("input", "input"))
    return record.get(columns.get("messages", "messages")) if given is None and "input" not in columns else given


def _text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise RowError(f"{name!r} is {'missing' if value is None else 'not text'}")
    if not value.strip():
        raise RowError(f"{name!r} is empty")


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise RowError(f"{name!r} is not a list of texts")
    return tuple(value)


def _dialogue(task: str, messages: list[Any], kind: str, where: str) -> Row:
    """Return the row of a conversation: what is asked is its last turn, the assistant's."""
    if kind not in ("", "dialogue"):
        raise RowError(f"'input' is a list of messages, and 'kind' is {kind!r}; messages are of kind 'dialogue'")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RowError(f"message {number}: expected a role among {', '.join(ROLES)}, got {str(message)[:60]}")
        _text(message.get("content"), f"message {number}: content")
        turns.append((message["role"], message["content"]))
    roles = [role for role, _ in turns]
    if "user" not in roles or roles[-1] != "assistant" or roles[0] == "assistant":
        raise RowError("a conversation has a user's turn, begins with none of the assistant's, and ends with one")
    return Row(task, conversation(turns[:-1]), turns[-1][1], (), where, "dialogue", tuple(turns))
