"""Scores over tasks: of several kinds as one number, and intervals where answers are grouped.

Intervals: what a user wants to know is how well a task does that nobody has seen. Episodes of one task say little of
another, so tasks are drawn first, and episodes within them: taken as if all were independent, ever more episodes of the
same few tasks would make any difference look sure.

One score, the higher the better, is what validation, patience, sweeps and `compare` go by: an accuracy and a loss have
no common unit, and one label task must not decide alone over many of text. So each kind is scored between 0 and 1, and
every task counts the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rayml.tasks.task import Task

SAMPLES = 2000
Interval = dict[str, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """One episode's query scores after 0, 1, ..., k inner steps."""

    task: str
    index: int
    is_accuracy: bool
    """Accuracy for a label task (higher is better), else mean loss per target token (lower is better)."""
    scores: list[float]


def interval(values: np.ndarray) -> Interval:
    """Return the mean of `[E]`, `[T, E]` or `[S, T, E]` values (seeds, tasks, episodes), and its interval."""
    return intervals(values[None])[0]


def intervals(values: np.ndarray) -> list[Interval]:
    """Return the means of K quantities, `[K, E]`, `[K, T, E]` or `[K, S, T, E]`, and their intervals.

    They are 95 % percentile intervals of a hierarchical bootstrap: seeds, tasks, and episodes within each task drawn
    are drawn with replacement (Efron 1979; for nested data Davison and Hinkley 1997, section 3.8); of one task, its
    episodes. Seeds and quantities share their episodes, so these are drawn together.
    """
    nested = values.reshape(len(values), *(1,) * (4 - values.ndim), *values.shape[1:])
    _, seeds, tasks, episodes = nested.shape
    rng = np.random.default_rng(0)
    means = np.empty((SAMPLES, len(values)))
    for sample in range(SAMPLES):
        some = nested[:, rng.integers(seeds, size=seeds)].mean(1)  # [K, T, E]
        drawn = rng.integers(tasks, size=(tasks, 1))
        within = rng.integers(episodes, size=(tasks, episodes))
        means[sample] = some[:, drawn, within].mean((1, 2))
    lows, highs = np.percentile(means, [2.5, 97.5], axis=0)
    ends = zip(nested.mean((1, 2, 3)), lows, highs, strict=True)
    return [{"mean": float(mean), "low": float(low), "high": float(high)} for mean, low, high in ends]


def by_task(curves: Sequence[Curve]) -> np.ndarray:
    """Return the scores of curves of as many episodes of each task, `[points, tasks, episodes]`."""
    groups: dict[str, list[list[float]]] = {}
    for curve in curves:
        groups.setdefault(curve.task, []).append(curve.scores)
    return np.moveaxis(np.array(list(groups.values())), -1, 0)


def resampled(tasks: int) -> str:
    """Say in a caption what the intervals of scores on so many tasks were drawn from."""
    return "95 % intervals over " + (f"{tasks} tasks and their episodes" if tasks > 1 else "one task's episodes")


def bounds(of: dict[str, float], sign: str = "") -> str:
    """Return an interval's mean and ends; differences have a `sign` of "+"."""
    return "{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]".format(sign=sign, **of)


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
