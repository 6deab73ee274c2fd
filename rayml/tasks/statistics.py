"""Scores over tasks: one number for tasks of several kinds, and intervals for answers that are grouped.

Intervals: users want to know how well a new task will do. Episodes of one task say little about another, so the
bootstrap draws tasks first, and episodes within them. If all answers were taken as independent, enough episodes of a
few tasks would make any difference look certain.

One score, the higher the better, decides in validation, patience, sweeps and `compare`. An accuracy and a loss have no
common unit, and one label task must not outweigh many tasks of text. So each kind gets a score between 0 and 1, and
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
        over_seeds = nested[:, rng.integers(seeds, size=seeds)].mean(1)  # [K, T, E]
        drawn_tasks = rng.integers(tasks, size=(tasks, 1))
        drawn_episodes = rng.integers(episodes, size=(tasks, episodes))
        means[sample] = over_seeds[:, drawn_tasks, drawn_episodes].mean((1, 2))
    lows, highs = np.percentile(means, [2.5, 97.5], axis=0)
    rows = zip(nested.mean((1, 2, 3)), lows, highs, strict=True)
    return [{"mean": float(mean), "low": float(low), "high": float(high)} for mean, low, high in rows]


def scores_by_task(curves: Sequence[Curve]) -> np.ndarray:
    """Return the scores of curves, `[points, tasks, episodes]`; every task has the same number of episodes."""
    group_by_metric: dict[str, list[list[float]]] = {}
    for curve in curves:
        group_by_metric.setdefault(curve.task, []).append(curve.scores)
    return np.moveaxis(np.array(list(group_by_metric.values())), -1, 0)


def interval_caption(tasks: int) -> str:
    """Return a caption on what the intervals of scores on this many tasks are over."""
    return "95 % intervals over " + (f"{tasks} tasks and their episodes" if tasks > 1 else "one task's episodes")


def format_interval(ends: Interval, sign: str = "") -> str:
    """Return an interval's mean and ends as text. For differences, `sign` is "+"."""
    return f"{ends['mean']:{sign}.2f} [{ends['low']:{sign}.2f}, {ends['high']:{sign}.2f}]"


class Group(NamedTuple):
    """Tasks with the same metric."""

    metric: str
    """`accuracy` of label tasks, or mean `loss` of a token of free text."""
    tasks: tuple[Task, ...]
    episodes: int


def group_by_metric(tasks: Sequence[Task], episodes: int) -> list[Group]:
    """Return the label tasks and those of free text, each group with its share of `episodes`, at least one."""
    result, given, seen = [], 0, 0
    for metric, is_label in (("accuracy", True), ("loss", False)):
        members = tuple(task for task in tasks if bool(task.options) == is_label)
        if members:
            seen += len(members)
            share = max(1, round(episodes * seen / len(tasks)) - given)
            given += share
            result.append(Group(metric, members, share))
    return result


def unit_score(metric: str, mean: float) -> float:
    """Return a mean score as a number between 0 and 1. For a loss it is exp(-loss): the geometric mean probability of a
    token, or one over the perplexity."""
    return mean if metric == "accuracy" else math.exp(-mean)


def overall_score(means: Mapping[str, float], tasks: Sequence[Task]) -> float:
    """Return the mean over tasks of the unit scores of their metrics.

    Args:
        means: by metric, for each kind of tasks that there is.
    """
    total = sum(unit_score(group.metric, means[group.metric]) * len(group.tasks) for group in group_by_metric(tasks, 0))
    return total / len(tasks)
