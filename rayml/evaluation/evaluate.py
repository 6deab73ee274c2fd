"""Did meta-training help? The same episodes of held-out tasks, from the meta-trained and from an untrained start."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rayml.evaluation.curves import Curve
from rayml.evaluation.session import Session
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.task import Task

BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class Evaluation:
    """Curves of the same episodes, in the same order, from both starts."""

    trained: list[Curve]
    untrained: list[Curve]


def evaluate(
    session: Session,
    tasks: Sequence[Task],
    sampler: Sampler,
    episodes: int,
    progress: Callable[[int], None],
) -> Evaluation:
    """Adapt to `episodes` episodes of each task from both starts, by the run's own algorithm and inner steps.

    Every task gets the same number of episodes. The untrained start's rate is what `inner.lr` says. `progress` is told
    after each few episodes how many are done.
    """
    rate = dict.fromkeys(session.rates, torch.tensor(session.config.inner.lr, device=session.device))
    found = Evaluation([], [])
    scorer = session.scorer()
    for batch in batches(session, tasks, sampler, episodes):
        found.trained.extend(scorer.curves(batch, session.start, session.rates))
        found.untrained.extend(scorer.curves(batch, session.untrained, rate))
        progress(len(batch))
    return found


def trained_curves(session: Session, tasks: Sequence[Task], sampler: Sampler, episodes: int) -> list[Curve]:
    """Return the curves of the same episodes from the trained start alone."""
    scorer = session.scorer()
    found = [scorer.curves(b, session.start, session.rates) for b in batches(session, tasks, sampler, episodes)]
    return [curve for curves in found for curve in curves]


def batches(session: Session, tasks: Sequence[Task], sampler: Sampler, episodes: int) -> Iterator[list[Episode]]:
    """Yield `episodes` episodes of each task, as many at a time as a worker adapts side by side."""
    at_a_time = session.config.tasks_per_worker if session.lm.lora else 1
    for task in tasks:
        for first in range(0, episodes, at_a_time):
            yield [sampler.episode([task], index) for index in range(first, min(first + at_a_time, episodes))]


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """Return what `evaluation.json` holds: per task and overall, each number with a 95 % interval over episodes.

    "overall" is the accuracy over label tasks, or the loss where there is none; "overall_loss" is the loss over free
    text where there are both.
    """
    groups = {name: _only(evaluation, task=name) for name in dict.fromkeys(c.task for c in evaluation.trained)}
    by_kind = [
        summary(part) for part in (_only(evaluation, is_accuracy=kind) for kind in (True, False)) if part.trained
    ]
    return {
        "overall": by_kind[0],
        "overall_loss": by_kind[1] if len(by_kind) > 1 else None,
        "tasks": {name: summary(group) for name, group in groups.items()},
    }


def _only(evaluation: Evaluation, **wanted: Any) -> Evaluation:
    """Return the curves whose attributes have the wanted values."""

    def keep(curve: Curve) -> bool:
        return all(getattr(curve, name) == value for name, value in wanted.items())

    return Evaluation(list(filter(keep, evaluation.trained)), list(filter(keep, evaluation.untrained)))


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return before, after and the curves, from both starts, and the paired differences."""
    trained, untrained = (
        np.array([curve.scores for curve in curves]) for curves in (evaluation.trained, evaluation.untrained)
    )
    return {
        "metric": "accuracy" if evaluation.trained[0].is_accuracy else "loss",
        "episodes": len(trained),
        "before": interval(trained[:, 0]),
        "after": interval(trained[:, -1]),
        "untrained_before": interval(untrained[:, 0]),
        "untrained_after": interval(untrained[:, -1]),
        "gain": interval(trained[:, -1] - trained[:, 0]),
        "over_untrained": interval(trained[:, -1] - untrained[:, -1]),
        "curve": [interval(trained[:, step]) for step in range(trained.shape[1])],
        "untrained_curve": [interval(untrained[:, step]) for step in range(untrained.shape[1])],
    }


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean of `[E]` values and its 95 % percentile bootstrap interval (Efron 1979)."""
    draws = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
