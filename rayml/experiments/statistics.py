"""Intervals where answers are grouped: episodes within tasks, under several training seeds.

What a user wants to know is how well a task does that nobody has seen. Episodes of one task say little of another, so
tasks are drawn first, and episodes within them: taken as if all were independent, ever more episodes of the same few
tasks would make any difference look sure.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rayml.experiments.scorer import Curve

SAMPLES = 2000
Interval = dict[str, float]


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


def by_task(curves: Sequence["Curve"]) -> np.ndarray:
    """Return the scores of curves of as many episodes of each task, `[points, tasks, episodes]`."""
    groups: dict[str, list[list[float]]] = {}
    for curve in curves:
        groups.setdefault(curve.task, []).append(curve.scores)
    return np.moveaxis(np.array(list(groups.values())), -1, 0)


def resampled(tasks: int) -> str:
    """Say in a caption what the intervals of scores on so many tasks were drawn from."""
    return "95 % intervals over " + (f"{tasks} tasks and their episodes" if tasks > 1 else "one task's episodes")
