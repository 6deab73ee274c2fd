"""Size, speed and held-out score of a run, before and after compression, on the same episodes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayml.evaluation.curves import Curve, Queries
from rayml.evaluation.evaluate import trained_curves
from rayml.evaluation.statistics import by_task, interval
from rayml.meta.adapt import expand
from rayml.model import MetaModel
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.task import Task

REPEATS = 7


def weights_bytes(base: str) -> int | None:
    """Return the bytes of a base's safetensors; None for a base that is no folder of this machine."""
    return sum(file.stat().st_size for file in Path(base).glob("*.safetensors")) or None


def bytes_in_dtype(session: MetaModel) -> int:
    """Return the bytes of a base that is not quantised in the run's own dtype; tied weights count once."""
    return sum(p.numel() * p.element_size() for p in session.lm.module.parameters())


def speeds(sessions: Sequence[MetaModel], episode: Episode) -> list[dict[str, Any]]:
    """Return for each session the seconds of a forward of an episode's queries, and of adapting to its support.

    The sessions take turns, so that what else the machine does falls on all alike; the first turn is not counted.
    """
    forward: list[list[float]] = [[] for _ in sessions]
    inner: list[list[float]] = [[] for _ in sessions]
    for turn in range(REPEATS + 1):
        for place, session in enumerate(sessions):
            times = seconds(session, answering(session, episode)), seconds(session, adapting(session, episode))
            if turn:
                forward[place].append(times[0])
                inner[place].append(times[1])
    return [
        {"forward_seconds": spread(ours), "adapt_seconds": spread(theirs)}
        for ours, theirs in zip(forward, inner, strict=True)
    ]


def answering(session: MetaModel, episode: Episode) -> Callable[[], Any]:
    """Return what answers an episode's queries from the start, encoded anew: a batch remembers its frozen layers."""
    fast = expand(session.start, 1)
    return lambda: Queries(session.lm, session.encoder, [episode]).outputs(fast)


def adapting(session: MetaModel, episode: Episode) -> Callable[[], Any]:
    """Return what adapts to an episode as the run does, its support encoded anew: nothing is remembered of it."""

    scorer = session.scorer()
    return lambda: list(scorer.adapted(scorer.prepare([episode]), session.start, session.rates, scorer.steps))


def seconds(session: MetaModel, run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    if session.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def spread(times: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def scores(
    session: MetaModel, tasks: Sequence[Task], sampler: Sampler, episodes: int, done: Callable[[int], None]
) -> list[Curve]:
    """Return the curves of `episodes` episodes of each task."""
    found: list[Curve] = []
    for task in tasks:
        found += trained_curves(session, [task], sampler, episodes)
        done(episodes)
    return found


def compared(before: Sequence[Curve], after: Sequence[Curve]) -> dict[str, Any]:
    """Return both runs' scores before and after adapting, and the paired difference between them after adapting.

    Of the label tasks, or, where there are none, the losses of free text.
    """
    label = any(curve.is_accuracy for curve in before)
    old, new = (by_task([c for c in curves if c.is_accuracy == label]) for curves in (before, after))
    return {
        "metric": "accuracy" if label else "loss",
        "tasks": old.shape[1],
        "episodes": old.shape[1] * old.shape[2],
        "before": {"before": interval(old[0]), "after": interval(old[-1])},
        "after": {"before": interval(new[0]), "after": interval(new[-1])},
        "difference": interval(new[-1] - old[-1]),
    }
