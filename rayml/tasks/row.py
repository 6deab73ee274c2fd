"""One record of a data set, checked: a row `{"task", "input", "target", ...}`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any

from rayml.errors import DataError
from rayml.tasks.kinds import NAMES, is_span, kind_of, written
from rayml.tasks.task import Example, Parts, conversation

COLUMNS = "task", "input", "target", "options", "kind", "answers", "messages"
ROLES = "system", "developer", "user", "assistant"
CALLS = "tool_calls", "function_call"

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
        record: `input` is a text, fields `{name: text}`, or messages `[{"role", "content"}]`, as is `messages`: a
            dialogue, which ends with its answer, or, beside a `target`, what is asked about as a whole. `target` is a
            text, or a list of labels, or of spans `{"text", "type"}`. Numbers, dates, true and false are their text;
            what stands around a target, or a label, is no part of it.
        columns: the record's own names, where they differ; `input.NAME` names a part of the input.
        default_task: for records without a task, where no column is named for it.

    Raises:
        RowError: it cannot be used.
    """

    def value(name: str) -> Any:
        return as_text(record.get(columns.get(name, name)))

    task = value("task")
    task = _text(default_task if task is None and "task" not in columns else task, columns.get("task", "task"))
    kind = value("kind") or ""
    if kind and kind not in NAMES:
        raise RowError(f"'kind' is {kind!r}; there are {', '.join(NAMES)}")
    given = _input(record, columns)
    if isinstance(given, list):
        turns = _turns(given)
        if value("target") is None:
            return _dialogue(task, turns, kind, where)
        if kind == "dialogue":
            raise RowError("a row of kind 'dialogue' has no target; it is the last of its messages, the assistant's")
        given = conversation(turns)
    parts = (
        tuple((name, _text(as_text(text), f"input.{name}")) for name, text in given.items())
        if isinstance(given, dict)
        else ()
    )
    shown = "\n".join(text for _, text in parts) if parts else _text(as_text(given), columns.get("input", "input"))
    target, called = value("target"), columns.get("target", "target")
    kind = kind or kind_of([name for name, _ in parts], target)
    if isinstance(target, list):
        if not all(is_span(one) or isinstance(one, str) for one in target):
            raise RowError(f"{called!r} is not text, nor a list of labels, or of spans {{'text', 'type'}}")
        for text in [
            text for one in target for text in ([one] if isinstance(one, str) else [one["text"], one["type"]])
        ]:
            _text(text, f"{called}: one of its labels or spans")
        target = written(target)
    text = _text(target, called).strip()
    options, answers = (_texts(value(name) or [], name) for name in ("options", "answers"))
    if isinstance(value("target"), list):
        options = ()  # the labels of which several may hold: they do not compete
    if options and text not in options:
        raise RowError(f"target {text!r} is not among its options {list(options)}")
    return Row(task, shown, text, options, where, kind, parts, answers)


def as_text(value: Any) -> Any:
    """Return a number, a date, or true or false, as its text, also in a list; what is not there as None, and others as
    given.

    >>> as_text(True), as_text(1.0), as_text([2, "b"]), as_text(float("nan")), as_text(date(2024, 1, 2))
    ('true', '1', ['2', 'b'], None, '2024-01-02')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, list | tuple):
        return [as_text(one) for one in value]
    return str(value) if isinstance(value, int | Decimal | date | time) else value


def unanswered(given: Input, fields: Sequence[str] | None = None) -> Example:
    """Return the example of an input without a target.

    Args:
        fields: of the task's inputs, in its order; none, where they are texts; None: take any.

    Raises:
        DataError: it is no input, or none of such fields.
    """
    try:
        if isinstance(given, str):
            given = {fields[0]: given} if fields is not None and len(fields) == 1 else given
        elif not isinstance(given, Mapping):
            if not is_dialogue(given):
                raise RowError(f"expected a text, fields as a dict, or messages, got {str(given)[:60]!r}")
            turns = [(turn["role"], turn["content"]) if isinstance(turn, Mapping) else turn for turn in given]
            for _, text in turns:
                _whole(text, "content")
            given = conversation(turns)
            if not fields:
                return Example(given, "", (*turns, ("assistant", "")))
        there = list(given) if isinstance(given, Mapping) else []
        if fields is not None and {*there} != {*fields}:
            told = [f"the fields {', '.join(names)}" if names else "a text" for names in (fields, there)]
            raise RowError(f"expected {told[0]}, got {told[1]}")
        if isinstance(given, str):
            return Example(_whole(given, "input"), "")
        parts = tuple((name, _whole(as_text(given[name]), f"input.{name}")) for name in fields or there)
        return Example("\n".join(text for _, text in parts), "", parts)
    except RowError as error:
        raise DataError(f"an input cannot be used: {error}") from None


def is_dialogue(given: Any) -> bool:
    """Return whether an input is a dialogue: a list of messages, or of (role, text)."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        return False
    messages = [isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in given]
    return all(messages) or all(isinstance(turn, tuple) and len(turn) == 2 for turn in given)


def _input(record: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """Return the input: a text, a dict of parts, or a list of messages."""
    parts = {name.removeprefix("input."): record.get(own) for name, own in columns.items() if name.startswith("input.")}
    if parts:
        return parts
    given = record.get(columns.get("input", "input"))
    return record.get(columns.get("messages", "messages")) if given is None and "input" not in columns else given


def _text(value: Any, name: str) -> str:
    if not _whole(value, name).strip():
        raise RowError(f"{name!r} is empty")
    return str(value)


def _whole(value: Any, name: str) -> str:
    """Return a text, or raise RowError if it is none, or not of whole characters."""
    if not isinstance(value, str):
        raise RowError(f"{name!r} is {'missing' if value is None else 'not text'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise RowError(f"{name!r} holds half of a character ({half!r}); `rayml data convert` puts � there") from None
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RowError(f"{name!r} is not a list of texts")
    return tuple(dict.fromkeys(_text(text, name).strip() for text in value))


def _turns(messages: list[Any]) -> list[tuple[str, str]]:
    """Return the role and the text of every message."""
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RowError(f"message {number}: expected a role among {', '.join(ROLES)}, got {str(message)[:60]}")
        if message.get("weight") == 0 and message["role"] == "assistant":
            raise RowError(
                f"message {number}: has weight 0, and every turn of the assistant's is learned; leave it out"
            )
        called = next((name for name in CALLS if message.get(name)), None)
        if called:
            raise RowError(f"message {number}: {called!r} is not learned; write it as the message's content")
        turns.append((message["role"], _text(message.get("content"), f"message {number}: content")))
    return turns


def _dialogue(task: str, turns: list[tuple[str, str]], kind: str, where: str) -> Row:
    """Return the row of a conversation: what is asked is its last turn, the assistant's."""
    if kind not in ("", "dialogue"):
        raise RowError(f"'input' is a list of messages, and 'kind' is {kind!r}; messages are of kind 'dialogue'")
    roles = [role for role, _ in turns]
    if "user" not in roles or roles[-1] != "assistant" or roles[0] == "assistant":
        raise RowError("a conversation has a user's turn, begins with none of the assistant's, and ends with one")
    return Row(task, conversation(turns[:-1]), turns[-1][1], (), where, "dialogue", tuple(turns))
