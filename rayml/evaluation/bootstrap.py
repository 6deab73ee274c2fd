"""Intervals where answers are grouped: episodes within tasks, under several training seeds."""

import numpy as np

SAMPLES = 2000


def interval_over_tasks(values: np.ndarray) -> dict[str, float]:
    """Return the mean of `[S, T, E]` values (seeds, tasks, episodes) and its 95 % percentile bootstrap interval.

    Seeds, tasks, and episodes within each task drawn are drawn with replacement (Efron 1979; for nested data Davison
    and Hinkley 1997, section 3.8). The episodes are the same under all seeds, so they are drawn together.
    """
    seeds, tasks, episodes = values.shape
    rng = np.random.default_rng(0)
    means = np.empty(SAMPLES)
    for sample in range(SAMPLES):
        some = values[rng.integers(seeds, size=seeds)].mean(0)  # [T, E]
        drawn = rng.integers(tasks, size=(tasks, 1))
        within = rng.integers(episodes, size=(tasks, episodes))
        means[sample] = some[drawn, within].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
