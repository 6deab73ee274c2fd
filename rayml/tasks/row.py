"""A row `{"task", "input", "target", ...}`: one record of a data set, checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any

from rayml.errors import DataError
from rayml.tasks.kinds import NAMES, format_target, infer_kind, is_span
from rayml.tasks.task import Example, Parts, format_conversation

COLUMNS = "task", "input", "target", "options", "kind", "answers", "messages"
ROLES = "system", "developer", "user", "assistant"
CALLS = "tool_calls", "function_call"

Input = str | Mapping[str, str] | Sequence[Mapping[str, str] | tuple[str, str]]
"""What a model is to answer: a text, a dict of fields, or the messages of a dialogue, each `{"role", "content"}` or
(role, text)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One validated row."""

    task: str
    input: str
    target: str
    options: tuple[str, ...]
    where: str
    """Its place, for error messages."""
    kind: str = ""
    """Given, or inferred from its fields; "" for a label or a text."""
    parts: Parts = ()
    answers: tuple[str, ...] = ()


class RowError(ValueError):
    """What is wrong with a record, in a few words."""


def parse_row(record: Mapping[str, Any], columns: Mapping[str, str], default_task: str, where: str) -> Row:
    """Return the row of a record.

    Args:
        record: `input` is a text, fields `{name: text}`, or messages `[{"role", "content"}]`, and so is `messages`.
            A dialogue ends with its answer, unless there is a `target`: then the whole dialogue is the input. `target`
            is a text, or a list of labels, of spans `{"text", "type"}`, or of right answers to a question. Numbers,
            dates, true and false are taken as text. White space around targets and labels is dropped.
        columns: the record's names of fields, where they differ; `input.NAME` names a part of the input.
        default_task: for records without a task, where no column is named for it.

    Raises:
        RowError: it cannot be used.
    """

    def value(field: str) -> Any:
        return as_text(record.get(columns.get(field, field)))

    task = value("task")
    if task is None and "task" not in columns:
        task = default_task
    task = _check_text(task, columns.get("task", "task"))
    kind = value("kind") or ""
    if kind and kind not in NAMES:
        raise RowError(f"'kind' is {kind!r}; there are {', '.join(NAMES)}")
    target: Any = value("target")
    target_column = columns.get("target", "target")
    given = _input(record, columns)
    if isinstance(given, list):
        turns = _turns(given)
        if target is None:
            return _dialogue(task, turns, kind, where)
        if kind == "dialogue":
            raise RowError("a row of kind 'dialogue' has no target; it is the last of its messages, the assistant's")
        given = format_conversation(turns)
    parts: Parts = ()
    if isinstance(given, dict):
        parts = tuple((name, _check_text(as_text(text), f"input.{name}")) for name, text in given.items())
    text = "\n".join(text for _, text in parts) or _check_text(as_text(given), columns.get("input", "input"))
    others: list[Any] = []
    if isinstance(target, list) and (kind or _kind_of_answers(parts, target_column)) == "qa":
        kind, target, others = "qa", next(iter(target), ""), target[1:]
    verdict = isinstance(record.get(target_column), bool)
    kind = kind or infer_kind([name for name, _ in parts], target, verdict)
    is_list = isinstance(target, list)
    if is_list:
        target = _format_list(target, target_column)
    target = _check_text(target, target_column).strip()
    options, answers = (_texts(value(field) or [], field) for field in ("options", "answers"))
    answers = tuple(dict.fromkeys((*_texts(others, target_column), *answers)))
    if is_list:
        options = ()  # several labels may hold at once, so they do not compete
    if options and target not in options:
        raise RowError(f"target {target!r} is not among its options {list(options)}")
    return Row(task, text, target, options, where, kind, parts, answers)


def _kind_of_answers(parts: Parts, column: str) -> str:
    """Return "qa" for a question whose column of answers may hold a list: each is right by itself."""
    is_question = any(name == "question" for name, _ in parts)
    return "qa" if is_question and column.casefold() in ("answer", "answers") else ""


def _format_list(target: list[Any], column: str) -> str:
    """Return a target of labels or spans as text."""
    texts: list[str] = []
    for item in target:
        if not is_span(item) and not isinstance(item, str):
            raise RowError(f"{column!r} is not text, nor a list of labels, or of spans {{'text', 'type'}}")
        texts += [item] if isinstance(item, str) else [item["text"], item["type"]]
    for text in texts:
        _check_text(text, f"{column}: one of its labels or spans")
    return format_target(target)


def as_text(value: Any) -> Any:
    """Return a number, a date, or true or false, as text, also in a list; a missing value as None; others unchanged.

    >>> as_text(True), as_text(1.0), as_text([2, "b"]), as_text(float("nan")), as_text(date(2024, 1, 2))
    ('true', '1', ['2', 'b'], None, '2024-01-02')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, list | tuple):
        return [as_text(item) for item in value]
    return str(value) if isinstance(value, int | Decimal | date | time) else value


def query_example(given: Input, fields: Sequence[str] | None = None) -> Example:
    """Return the example of an input without a target.

    Args:
        fields: the names and the order of the task's fields; empty if its inputs are texts; None to take any.

    Raises:
        DataError: it is no input, or has other fields.
    """
    try:
        if isinstance(given, str):
            given = {fields[0]: given} if fields is not None and len(fields) == 1 else given
        elif not isinstance(given, Mapping):
            if not is_dialogue(given):
                raise RowError(f"expected a text, fields as a dict, or messages, got {str(given)[:60]!r}")
            turns = [(turn["role"], turn["content"]) if isinstance(turn, Mapping) else turn for turn in given]
            for _, text in turns:
                _check_unicode(text, "content")
            given = format_conversation(turns)
            if not fields:
                return Example(given, "", (*turns, ("assistant", "")))
        names = list(given) if isinstance(given, Mapping) else []
        if fields is not None and {*names} != {*fields}:
            expected, got = (f"the fields {', '.join(some)}" if some else "a text" for some in (fields, names))
            raise RowError(f"expected {expected}, got {got}")
        if isinstance(given, str):
            return Example(_check_unicode(given, "input"), "")
        parts = tuple((name, _check_unicode(as_text(given[name]), f"input.{name}")) for name in fields or names)
        return Example("\n".join(text for _, text in parts), "", parts)
    except RowError as error:
        raise DataError(f"an input cannot be used: {error}") from None


def is_dialogue(given: Any) -> bool:
    """Return whether an input is a dialogue: a list of messages, or of (role, text). Pairs (input, target) are none."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        return False
    messages = [isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in given]
    return all(messages) or all(isinstance(turn, tuple) and len(turn) == 2 and turn[0] in ROLES for turn in given)


def _input(record: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """Return the input: a text, a dict of parts, or a list of messages."""
    parts = {
        field.removeprefix("input."): record.get(column)
        for field, column in columns.items()
        if field.startswith("input.")
    }
    if parts:
        return parts
    value = record.get(columns.get("input", "input"))
    return record.get(columns.get("messages", "messages")) if value is None and "input" not in columns else value


def _check_text(value: Any, name: str) -> str:
    if not _check_unicode(value, name).strip():
        raise RowError(f"{name!r} is empty")
    return str(value)


def _check_unicode(value: Any, name: str) -> str:
    """Return a text; raise RowError if it is none, or has halves of characters (lone surrogates)."""
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
    return tuple(dict.fromkeys(_check_text(text, name).strip() for text in value))


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
        call = next((name for name in CALLS if message.get(name)), None)
        if call:
            raise RowError(f"message {number}: {call!r} is not learned; write it as the message's content")
        turns.append((message["role"], _check_text(message.get("content"), f"message {number}: content")))
    return turns


def _dialogue(task: str, turns: list[tuple[str, str]], kind: str, where: str) -> Row:
    """Return the row of a conversation. Its target is the last turn, the assistant's."""
    if kind not in ("", "dialogue"):
        raise RowError(f"'input' is a list of messages, and 'kind' is {kind!r}; messages are of kind 'dialogue'")
    roles = [role for role, _ in turns]
    if "user" not in roles or roles[-1] != "assistant" or roles[0] == "assistant":
        raise RowError("a conversation has a user's turn, begins with none of the assistant's, and ends with one")
    return Row(task, format_conversation(turns[:-1]), turns[-1][1], (), where, "dialogue", tuple(turns))
