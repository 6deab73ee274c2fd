"""From rows to tasks: group, tell labels from free text, and keep each text once."""

import logging
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rayml.errors import DataError
from rayml.tasks.kinds import NOTHING
from rayml.tasks.row import Row
from rayml.tasks.task import Example, Task, normalized

log = logging.getLogger(__name__)
LABELS = "label", "pair", "relation"
"""Kinds whose targets are classes, however often each comes."""
FREE_TEXT = "multilabel", "ner", "translation", "summary", "dialogue", "text"
"""Kinds whose targets are written, and never chosen among."""
LONG_LABEL = 24
"""Characters, which most labels stay below, and most texts do not."""


@dataclass
class Duplicates:
    """What was left out of the tasks, so that one text never stands in both support and query."""

    repeated: dict[str, int] = field(default_factory=dict)
    """By task: rows that repeat an earlier one's text and target."""
    conflicting: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    """(task, text, its targets): one text under two labels. None of its rows is used."""


def build_tasks(rows: Iterable[Row]) -> tuple[tuple[Task, ...], Duplicates]:
    """Group rows into tasks, sorted by name, each text once.

    A task is a label task when its rows carry `options`, or when it has two targets or more and each stands twice or
    more on average; else it is free text. So is a task of a kind that is never chosen among.

    Raises:
        DataError: a task with rows of several kinds, inputs of several fields, or labels that look the same.
    """
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    duplicates = Duplicates()
    tasks = tuple(_task(name, by_task[name], duplicates) for name in sorted(by_task))
    doubtful = [task.name for task in tasks if not any(row.kind for row in by_task[task.name]) and is_doubtful(task)]
    if doubtful:
        more = f" and {len(doubtful) - 1} more" * (len(doubtful) > 1)
        log.warning(
            f"task {doubtful[0]!r}{more}: targets are taken for free text: there are not two or more that come back. "
            "If they are labels, give several examples of each, or `options` in the rows"
        )
    return tasks, duplicates


def _task(name: str, rows: list[Row], duplicates: Duplicates) -> Task:
    empty = {id(row) for row in rows if row.kind == "multilabel" and row.target == NOTHING}  # no labels, or no spans
    kinds = {row.kind: row for row in rows if id(row) not in empty} or {rows[0].kind: rows[0]}
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise DataError(
            f"task {name!r} has rows of two kinds: {one.kind or 'label or text'!r} at {one.where} and "
            f"{other.kind or 'label or text'!r} at {other.where}; give each kind a task of its own"
        )
    (kind,) = kinds
    rows = rows if kind == "dialogue" else in_one_order(name, rows, kind)
    options = () if kind in FREE_TEXT else _options(rows, kind)
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        by_text.setdefault(normalized(row.input), []).append(row)
    examples = []
    for same in by_text.values():
        targets = tuple(dict.fromkeys(row.target for row in same))
        if len(targets) > 1 and options:
            duplicates.conflicting.append((name, same[0].input, targets))
            continue
        if len(same) > 1:
            duplicates.repeated[name] = duplicates.repeated.get(name, 0) + len(same) - 1
        examples.append(Example(same[0].input, same[0].target, same[0].parts, same[0].answers))
    return Task(name, tuple(examples), options, kind or ("label" if options else "text"))


def is_doubtful(task: Task) -> bool:
    """Return whether a task of free text may have been meant for labels: its targets are as short."""
    return task.kind == "text" and all(len(one.target) <= LONG_LABEL for one in task.examples)


def in_one_order(name: str, rows: list[Row], kind: str) -> list[Row]:
    """Return rows whose inputs have their fields in the order of the first.

    Raises:
        DataError: fields of other names; a question may be without its context.
    """
    named: dict[frozenset[str], Row] = {}
    for row in rows:
        named.setdefault(frozenset(field for field, _ in row.parts), row)
    if len(named) > 1 and kind != "qa":
        one, other = list(named.values())[:2]
        there = [", ".join(field for field, _ in row.parts) or "none, but a text" for row in (one, other)]
        raise DataError(
            f"task {name!r} has inputs of several fields: {there[0]} at {one.where}, and {there[1]} at {other.where}; "
            "give all the same, or a task of their own"
        )
    order = list(dict.fromkeys(field for row in rows for field, _ in row.parts))
    by_name = [(row, dict(row.parts)) for row in rows]
    parts = [tuple((field, own[field]) for field in order if field in own) for _, own in by_name]
    return [
        replace(row, parts=of, input="\n".join(text for _, text in of)) if of else row
        for row, of in zip(rows, parts, strict=True)
    ]


def _options(rows: list[Row], kind: str) -> tuple[str, ...]:
    """Return the classes in a fixed order, or () for free text."""
    given = tuple(dict.fromkeys(option for row in rows for option in row.options))
    targets = tuple(sorted({row.target for row in rows}))
    come_back = len(targets) <= len(rows) / 2 if kind == "" else kind in LABELS
    options = given or (targets if len(targets) >= 2 and come_back else ())
    seen: dict[str, str] = {}
    for option in options:
        other = seen.setdefault(as_seen(option), option)
        if other != option:
            raise DataError(
                f"task {rows[0].task!r}: labels {other!a} and {option!a} are other characters, and look the "
                "same; write them as one"
            )
    return options


def as_seen(text: str) -> str:
    """Return a text without what nobody sees: how accents are composed, the width of spaces, marks of no width."""
    shown = (character for character in text if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFC", " ".join("".join(shown).split()))


def without_small_classes(tasks: Iterable[Task], need: int) -> tuple[Task, ...]:
    """Return the tasks without classes of fewer than `need` examples, and without tasks that then have nothing to tell
    apart (one class, or too little free text)."""
    kept = []
    for task in tasks:
        large = tuple(name for name, examples in task.classes.items() if len(examples) >= need)
        if task.options and len(large) >= 2:
            kept.append(task.only(large))
        elif not task.options and large:
            kept.append(task)
    return tuple(kept)
