"""From rows to tasks: group, tell labels from free text, and keep each text once."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from rayml.tasks.read import Row
from rayml.tasks.task import Example, Task, normalized


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
    more on average; else it is free text.
    """
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    duplicates = Duplicates()
    return tuple(_task(name, by_task[name], duplicates) for name in sorted(by_task)), duplicates


def _task(name: str, rows: list[Row], duplicates: Duplicates) -> Task:
    options = _options(rows)
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
        examples.append(Example(same[0].input, same[0].target))
    return Task(name, tuple(examples), options)


def _options(rows: list[Row]) -> tuple[str, ...]:
    """Return the classes in a fixed order, or () for free text."""
    given = dict.fromkeys(option for row in rows for option in row.options)
    if given:
        return tuple(given)
    targets = sorted({row.target for row in rows})
    return tuple(targets) if 2 <= len(targets) <= len(rows) / 2 else ()


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
