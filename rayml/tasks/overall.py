"""One score of tasks of several kinds, the higher the better: validation, patience, sweeps and `compare` go by it.

An accuracy and a loss have no common unit, and one label task must not decide alone over many of text. So each kind is
scored between 0 and 1, and every task counts the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rayml.tasks.task import Task


class Group(NamedTuple):
    """Tasks that are scored alike."""

    metric: str
    """`accuracy` of answers chosen among labels, or mean `loss` of a token of text."""
    tasks: tuple[Task, ...]
    episodes: int


def groups(tasks: Sequence[Task], episodes: int) -> list[Group]:
    """Return the label tasks, and those of text, each with their share of so many episodes, and one at least."""
    found, drawn, seen = [], 0, 0
    for metric, is_label in (("accuracy", True), ("loss", False)):
        some = tuple(task for task in tasks if bool(task.options) == is_label)
        if some:
            seen += len(some)
            share = max(1, round(episodes * seen / len(tasks)) - drawn)
            drawn += share
            found.append(Group(metric, some, share))
    return found


def normalised(metric: str, mean: float) -> float:
    """Return a mean score as a number between 0 and 1: of a loss exp(-loss), the (geometric) mean probability of a
    token, which is one over the perplexity."""
    return mean if metric == "accuracy" else math.exp(-mean)


def overall(means: Mapping[str, float], tasks: Sequence[Task]) -> float:
    """Return the mean over tasks of what `normalised` makes of their metric's mean; both metrics have one in `means`
    where there are both kinds of tasks."""
    return sum(normalised(of.metric, means[of.metric]) * len(of.tasks) for of in groups(tasks, 0)) / len(tasks)
