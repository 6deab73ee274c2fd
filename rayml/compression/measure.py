"""Size, speed and held-out score of a run, before and after compression, on the same episodes, and a table of them."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from rayml.algorithms.inner_loop import expand
from rayml.lm.scorer import Queries, trained_curves
from rayml.model import MetaModel
from rayml.progress import Bar
from rayml.runs.reports import table as empty_table
from rayml.tasks.episodes import EVALUATION_SEED, Episode
from rayml.tasks.statistics import Curve, by_task, interval, resampled
from rayml.tasks.task import Task

REPEATS = 7


def measured(before: MetaModel, after: MetaModel, tasks: Sequence[Task], episodes: int, bar: Bar) -> dict[str, Any]:
    """Return size, speed and score of two sessions."""
    sampler = before.config.data.sampler(EVALUATION_SEED)
    curves = [
        trained_curves(model, tasks, sampler, episodes, bar(name, episodes * len(tasks)))
        for model, name in ((before, "scoring before"), (after, "scoring after"))
    ]
    timed = speeds([before, after], sampler.episode(tasks, 0))
    sizes = [{"weights_bytes": weights_bytes(model.base)} for model in (before, after)]
    return {
        "before": sizes[0] | {"bytes_in_dtype": bytes_in_dtype(before)} | timed[0],
        "after": sizes[1] | timed[1],
        "score": compared(*curves),
    }


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


def table(summary: dict[str, Any], title: str) -> Table:
    """Return a row for each number, in columns before and after compression."""
    metric, scores = summary["score"]["metric"], summary["score"]
    caption = f"seconds: median and quartiles, on this machine; scores: {resampled(scores['tasks'])}, both alike"
    look = {"padding": (0, 1), "title": title, "caption": caption, "caption_justify": "left"}
    found = empty_table(("", "before", "after"), left=[""], no_wrap=True, **look)
    sides = [summary[side] for side in ("before", "after")]
    found.add_row("base's weights on disk", *(megabytes(side["weights_bytes"]) for side in sides))
    found.add_row("  the first in the run's dtype", megabytes(summary["before"]["bytes_in_dtype"]), "")
    found.add_row("forward of an episode's queries", *(times(side["forward_seconds"]) for side in sides))
    found.add_row("adapting to an episode", *(times(side["adapt_seconds"]) for side in sides))
    for when, name in (("before", "as it stands"), ("after", "after adapting")):
        found.add_row(f"held-out {metric}, {name}", *(score(scores[side][when]) for side in ("before", "after")))
    apart = scores["difference"]
    difference = f"{apart['mean']:+.3f} [{apart['low']:+.3f}, {apart['high']:+.3f}]"
    found.add_row("  difference after adapting", "", difference)
    return found


def megabytes(count: int | None) -> str:
    return "not here" if count is None else f"{count / 1e6:.1f} MB"


def times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} s [{spread['low']:.3f}, {spread['high']:.3f}]"


def score(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} ± {(interval['high'] - interval['low']) / 2:.3f}"
