"""Size, speed and held-out score of a run, before and after compression, on the same episodes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayml.algorithms.inner_loop import expand
from rayml.lm.scorer import Queries, trained_curves
from rayml.model import MetaModel
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.statistics import Curve, by_task, interval
from rayml.tasks.task import Task

REPEATS = 7


def weights_bytes(base: str) -> int | None:
    """Return the bytes of a base's safetensors; None for a base that is no folder of this machine."""
    return sum(file.stat().st_size for file in Path(base).glob("*.safetensors")) or None


def bytes_in_dtype(model: MetaModel) -> int:
    """Return the bytes of a base that is not quantised in the run's own dtype; tied weights count once."""
    return sum(p.numel() * p.element_size() for p in model.lm.module.parameters())


def speeds(sessions: Sequence[MetaModel], episode: Episode) -> list[dict[str, Any]]:
    """Return for each session the seconds of a forward of an episode's queries, and of adapting to its support.

    The sessions take turns, so that what else the machine does falls on all alike; the first turn is not counted.
    """
    forward: list[list[float]] = [[] for _ in sessions]
    inner: list[list[float]] = [[] for _ in sessions]
    for turn in range(REPEATS + 1):
        for index, model in enumerate(sessions):
            times = seconds(model, answering(model, episode)), seconds(model, adapting(model, episode))
            if turn:
                forward[index].append(times[0])
                inner[index].append(times[1])
    return [
        {"forward_seconds": spread(ours), "adapt_seconds": spread(theirs)}
        for ours, theirs in zip(forward, inner, strict=True)
    ]


def answering(model: MetaModel, episode: Episode) -> Callable[[], Any]:
    """Return what answers an episode's queries from the start, encoded anew: a batch remembers its frozen layers."""
    fast = expand(model.start, 1)
    return lambda: Queries(model.lm, model.encoder, [episode]).outputs(fast)


def adapting(model: MetaModel, episode: Episode) -> Callable[[], Any]:
    """Return what adapts to an episode as the run does, its support encoded anew: nothing is remembered of it."""

    scorer = model.scorer()
    return lambda: list(scorer.adapted(scorer.prepare([episode]), model.start, model.inner_lrs, scorer.steps))


def seconds(model: MetaModel, run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def spread(times: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def scores(
    model: MetaModel, tasks: Sequence[Task], sampler: Sampler, episodes: int, done: Callable[[int], None]
) -> list[Curve]:
    """Return the curves of `episodes` episodes of each task."""
    found: list[Curve] = []
    for task in tasks:
        found += trained_curves(model, [task], sampler, episodes)
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
