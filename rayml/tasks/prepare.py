"""Prepare tasks from a config's data section, so that episodes can be drawn from them."""

import logging
import random
from dataclasses import replace

from rayml.errors import DataError
from rayml.sections import Data
from rayml.tasks.read import read_rows
from rayml.tasks.splits import Splits, find_leaks, split_tasks, splits_advice
from rayml.tasks.table import build_tasks, without_small_classes
from rayml.tasks.task import Example, Task

log = logging.getLogger(__name__)


def prepare_tasks(data: Data) -> tuple[Task, ...]:
    """Return the tasks of `data.path`, each text once, ready to draw episodes from.

    Raises:
        DataError: the data is unreadable, or a class is too small for an episode.
    """
    tasks, duplicates = build_tasks(read_rows(data.path, data.columns, data.kind))
    if duplicates.conflicting:
        log.warning("%d text(s) have two labels and are left out; see `rayml data check`", len(duplicates.conflicting))
    if data.drop_small_classes:
        tasks = without_small_classes(tasks, data.shots + data.queries)
    if not tasks:
        raise DataError(f"{', '.join(data.path)}: no task has two classes of shots + queries examples")
    data.sampler(seed=0).check(tasks)
    return tasks


def limit_classes(task: Task, most: int) -> Task:
    """Return a task with at most `most` examples of each class, in their order; the same ones every time."""
    rng, sample = random.Random(task.name), set[Example]()
    for examples in task.classes.values():
        sample.update(rng.sample(examples, min(most, len(examples))))
    return replace(task, examples=tuple(example for example in task.examples if example in sample))


def prepare_splits(data: Data) -> Splits:
    """Return meta-train, meta-val and meta-test tasks.

    Raises:
        DataError: as for `prepare_tasks`; or there is no task to train on, or one text is in two splits.
    """
    tasks = prepare_tasks(data)
    splits = split_tasks(tasks, data.splits.rule())
    if not splits.train:
        raise DataError(f"no task is left for meta-train: {splits_advice(tasks, data.splits.rule())}")
    if data.most_per_class:
        splits = splits._replace(train=tuple(limit_classes(task, data.most_per_class) for task in splits.train))
    leaked = find_leaks(splits)
    if leaked:
        text, here, there = leaked[0]
        raise DataError(
            f"{len(leaked)} text(s) are in two splits, such as {text[:60]!r} in {here} and {there}; "
            "`rayml data check` lists them"
        )
    return splits
