"""From rows to tasks: group the rows, tell labels from free text, and keep each text once."""

import logging
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rayml.errors import DataError
from rayml.tasks.kinds import NOTHING
from rayml.tasks.row import Row
from rayml.tasks.task import Example, Task, normalize_text

log = logging.getLogger(__name__)
LABELS = "label", "pair", "relation"
"""Kinds whose targets are classes, however often each occurs."""
FREE_TEXT = "multilabel", "ner", "translation", "summary", "dialogue", "text"
"""Kinds whose targets are always written, never chosen."""
LONGEST_LABEL = 24
"""Characters. Most labels are shorter, and most texts longer."""


@dataclass
class Duplicates:
    """Rows that are left out, so that no text is in both support and query."""

    repeated: dict[str, int] = field(default_factory=dict)
    """By task: how many rows repeat an earlier one's text and target."""
    conflicting: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    """(task, text, its targets): one text under two labels. None of its rows is used."""


def build_tasks(rows: Iterable[Row]) -> tuple[tuple[Task, ...], Duplicates]:
    """Group rows into tasks, sorted by name, each text once.

    A task is a label task if its rows have `options`, or if it has at least two targets, each occurring twice or more
    on average. Otherwise, and if its kind is one of `FREE_TEXT`, it is free text.

    Raises:
        DataError: a task has rows of several kinds, inputs of different fields, labels that look the same, or a target
            that is none of its options.
    """
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    duplicates = Duplicates()
    tasks = tuple(_build_task(name, by_task[name], duplicates) for name in sorted(by_task))
    doubtful = [
        task.name for task in tasks if has_short_texts(task) and not any(row.kind for row in by_task[task.name])
    ]
    if doubtful:
        more = f" and {len(doubtful) - 1} more" * (len(doubtful) > 1)
        log.warning(
            f"task {doubtful[0]!r}{more}: targets are taken for free text: there are not two or more that come back. "
            "If they are labels, give several examples of each, or `options` in the rows"
        )
    return tasks, duplicates


def _build_task(name: str, rows: list[Row], duplicates: Duplicates) -> Task:
    # An empty list may be one of spans as well as one of labels, so it does not tell the kind.
    telling = [row for row in rows if not (row.kind == "multilabel" and row.target == NOTHING)]
    row_of_kind = {row.kind: row for row in telling or rows[:1]}
    if len(row_of_kind) > 1:
        first, second = list(row_of_kind.values())[:2]
        raise DataError(
            f"task {name!r} has rows of two kinds: {first.kind or 'label or text'!r} at {first.where} and "
            f"{second.kind or 'label or text'!r} at {second.where}; give each kind a task of its own"
        )
    (kind,) = row_of_kind
    rows = rows if kind == "dialogue" else align_parts(name, rows, kind)
    options = () if kind in FREE_TEXT else _options(rows, kind)
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        by_text.setdefault(normalize_text(row.input), []).append(row)
    examples = []
    for same_text in by_text.values():
        first = same_text[0]
        targets = tuple(dict.fromkeys(row.target for row in same_text))
        if len(targets) > 1 and options:
            duplicates.conflicting.append((name, first.input, targets))
            continue
        if len(same_text) > 1:
            duplicates.repeated[name] = duplicates.repeated.get(name, 0) + len(same_text) - 1
        examples.append(Example(first.input, first.target, first.parts, first.answers))
    return Task(name, tuple(examples), options, kind or ("label" if options else "text"))


def has_short_texts(task: Task) -> bool:
    """Return whether a task of free text may have been meant for labels: all its targets are as short."""
    return task.kind == "text" and all(len(example.target) <= LONGEST_LABEL for example in task.examples)


def align_parts(name: str, rows: list[Row], kind: str) -> list[Row]:
    """Return rows with the parts of their inputs in one order, that of the first row.

    Raises:
        DataError: rows have different parts. Only a question may lack its context.
    """
    first_with: dict[frozenset[str], Row] = {}
    for row in rows:
        first_with.setdefault(frozenset(part for part, _ in row.parts), row)
    if len(first_with) > 1 and kind != "qa":
        first, second = list(first_with.values())[:2]
        fields = [", ".join(part for part, _ in row.parts) or "none, but a text" for row in (first, second)]
        raise DataError(
            f"task {name!r} has inputs of several fields: {fields[0]} at {first.where}, and {fields[1]} at "
            f"{second.where}; give all the same, or a task of their own"
        )
    order = list(dict.fromkeys(part for row in rows for part, _ in row.parts))
    aligned = []
    for row in rows:
        texts = dict(row.parts)
        parts = tuple((part, texts[part]) for part in order if part in texts)
        aligned.append(replace(row, parts=parts, input="\n".join(text for _, text in parts)) if parts else row)
    return aligned


def _options(rows: list[Row], kind: str) -> tuple[str, ...]:
    """Return the classes in a fixed order, or () for free text."""
    given = tuple(dict.fromkeys(option for row in rows for option in row.options))
    targets = tuple(sorted({row.target for row in rows}))
    are_labels = kind in LABELS or (kind == "" and len(targets) <= len(rows) / 2)
    options = given or (targets if len(targets) >= 2 and are_labels else ())
    known = {*options}
    stray = next((row for row in rows if options and row.target not in known), None)
    if stray:
        raise DataError(
            f"task {stray.task!r}: target {stray.target!r} at {stray.where} is none of the options of the task's other "
            f"rows: {', '.join(options[:10])}"
        )
    by_look: dict[str, str] = {}
    for option in options:
        other = by_look.setdefault(visible(option), option)
        if other != option:
            raise DataError(
                f"task {rows[0].task!r}: labels {other!a} and {option!a} are other characters, and look the "
                "same; write them as one"
            )
    return options


def visible(text: str) -> str:
    """Return a text without invisible differences: composed accents, the width of spaces, and zero-width characters."""
    shown = (character for character in text if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFC", " ".join("".join(shown).split()))


def without_small_classes(tasks: Iterable[Task], need: int) -> tuple[Task, ...]:
    """Return the tasks without classes of fewer than `need` examples.

    Tasks with fewer than two classes left, or with too little free text, are dropped.
    """
    result = []
    for task in tasks:
        large = tuple(name for name, examples in task.classes.items() if len(examples) >= need)
        if task.options and len(large) >= 2:
            result.append(task.only(large))
        elif not task.options and large:
            result.append(task)
    return tuple(result)
