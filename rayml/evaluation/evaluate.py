"""Did meta-training help? The same episodes of held-out tasks, from the meta-trained and from an untrained start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rayml.evaluation.curves import Curve, Scorer
from rayml.evaluation.session import Session
from rayml.tasks.episodes import Sampler
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
    config = session.config
    rate = dict.fromkeys(session.rates, torch.tensor(config.inner.lr, device=session.device))
    at_a_time = config.tasks_per_worker if config.mode == "adapters" else 1
    scorer = Scorer(session.lm, session.encoder, config.algorithm.name, config.inner.steps)
    found = Evaluation([], [])
    for task in tasks:
        for first in range(0, episodes, at_a_time):
            indices = range(first, min(first + at_a_time, episodes))
            batch = [sampler.episode([task], index) for index in indices]
            for curves, (start, rates) in (
                (found.trained, (session.start, session.rates)),
                (found.untrained, (session.untrained, rate)),
            ):
                curves += scorer.curves(batch, start, rates)
            progress(len(batch))
    return found


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
