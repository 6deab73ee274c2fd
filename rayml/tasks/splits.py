"""Meta-train, meta-val and meta-test: splits of tasks, or of the classes of one task with many."""

import fnmatch
import glob
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rayml.errors import DataError
from rayml.tasks.task import Task, normalize_text

NAMES = ("train", "val", "test")


class Splits(NamedTuple):
    """Splits that share no task; or no class, where a task is split by class."""

    train: tuple[Task, ...]
    val: tuple[Task, ...]
    test: tuple[Task, ...]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Which task, or class, goes into which split. Patterns are shell patterns of task names."""

    val: float
    test: float
    """Shares of the tasks, or classes."""
    train_tasks: tuple[str, ...] = ()
    val_tasks: tuple[str, ...] = ()
    test_tasks: tuple[str, ...] = ()
    by_class: tuple[str, ...] = ()

    def by_hash(self, name: str) -> str:
        """Return the split of a name. It depends on nothing else, so that adding tasks never moves another."""
        digest = hashlib.sha256(name.encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        return "test" if position < self.test else "val" if position < self.test + self.val else "train"

    def split_of(self, name: str) -> str:
        """Return the split of a task: by the patterns, else by its hash."""
        for split, patterns in (("test", self.test_tasks), ("val", self.val_tasks), ("train", self.train_tasks)):
            if _matches(name, patterns):
                return split
        return self.by_hash(name)


def split_tasks(tasks: Sequence[Task], rule: SplitRule) -> Splits:
    """Put every task, or every class of a task that `rule.by_class` names, into one split.

    Raises:
        DataError: a pattern matches no task, or a task to split by class has no classes.
    """
    _check_patterns(tasks, rule)
    splits: dict[str, list[Task]] = {name: [] for name in NAMES}
    for task in tasks:
        if not _matches(task.name, rule.by_class):
            splits[rule.split_of(task.name)].append(task)
            continue
        if not task.options:
            raise DataError(f"data.splits.by_class: task {task.name!r} is free text, it has no classes to split")
        split_of = {option: rule.by_hash(f"{task.name}/{option}") for option in task.options}
        for split in NAMES:
            options = tuple(option for option in task.options if split_of[option] == split)
            if len(options) >= 2:  # there is nothing to tell a single class from
                splits[split].append(task.only(options))
    return Splits(*(tuple(splits[name]) for name in NAMES))


def splits_advice(tasks: Sequence[Task], rule: SplitRule) -> str:
    """Return advice for a rule that leaves nothing to train on: the settings that would."""
    large = [task.name for task in tasks if len(task.options) >= 6]
    by_class = replace(rule, by_class=tuple(glob.escape(name) for name in large))
    names = shlex.quote(json.dumps(list(by_class.by_class), ensure_ascii=False))
    rules = {
        f"hold out classes, not tasks: data.splits.by_class={names}": by_class,
        "train on all: data.splits.val=0 data.splits.test=0": replace(rule, val=0.0, test=0.0),
    }
    advice = [text for text, changed in rules.items() if split_tasks(tasks, changed).train]
    return " or ".join(advice) or "data.splits.train_tasks names some; or add tasks"


def _check_patterns(tasks: Sequence[Task], rule: SplitRule) -> None:
    for key in ("train_tasks", "val_tasks", "test_tasks", "by_class"):
        for pattern in getattr(rule, key):
            if not any(fnmatch.fnmatchcase(task.name, pattern) for task in tasks):
                names = ", ".join(task.name for task in tasks[:10])
                raise DataError(f"data.splits.{key}: {pattern!r} matches no task; there are {names}")


def find_leaks(splits: Splits) -> list[tuple[str, str, str]]:
    """Return (text, place, other place) for every text that is in two splits, in its normalized form.

    Tasks of different names may hold the same corpus: this is the usual leak (`sick` in MetaICL, `rte` in CrossFit).
    """
    first: dict[str, tuple[str, str]] = {}
    leaked = []
    for split, tasks in zip(NAMES, splits, strict=True):
        for task in tasks:
            for example in task.examples:
                place = first.setdefault(normalize_text(example.input), (split, task.name))
                if place[0] != split:
                    leaked.append((example.input, "/".join(place), f"{split}/{task.name}"))
    return leaked


def refuse_leaks(who: str, train: Sequence[Task], test: Sequence[Task]) -> None:
    """Raise DataError if test tasks hold a text that `who` was, or would be, trained on."""
    leaked = find_leaks(Splits(tuple(train), (), tuple(test)))
    if leaked:
        text, here, there = leaked[0]
        raise DataError(f"{who}: {len(leaked)} text(s) are trained on, such as {text[:60]!r} ({here}, {there})")
