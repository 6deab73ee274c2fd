"""Compare size, speed and held-out score of a run before and after compression, on the same episodes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from rayml.algorithms.inner_loop import expand
from rayml.lm.scorer import EpisodeQueries, trained_curves
from rayml.model import MetaModel
from rayml.progress import Bar
from rayml.runs.reports import table as empty_table
from rayml.tasks.episodes import EVALUATION_SEED, Episode
from rayml.tasks.statistics import Curve, interval, interval_caption, scores_by_task
from rayml.tasks.task import Task

REPEATS = 7


def compare(before: MetaModel, after: MetaModel, tasks: Sequence[Task], episodes: int, bar: Bar) -> dict[str, Any]:
    """Return the sizes, speeds and scores of two models."""
    sampler = before.config.data.sampler(EVALUATION_SEED)
    curves = [
        trained_curves(model, tasks, sampler, episodes, bar(name, episodes * len(tasks)))
        for model, name in ((before, "scoring before"), (after, "scoring after"))
    ]
    speeds = measure_speeds([before, after], sampler.episode(tasks, 0))
    sizes = [{"weights_bytes": weights_bytes(model.base)} for model in (before, after)]
    return {
        "before": sizes[0] | {"bytes_in_dtype": bytes_in_dtype(before)} | speeds[0],
        "after": sizes[1] | speeds[1],
        "score": compare_scores(*curves),
    }


def weights_bytes(base: str) -> int | None:
    """Return the bytes of a base's safetensors; None if the base is not a local folder."""
    return sum(file.stat().st_size for file in Path(base).glob("*.safetensors")) or None


def bytes_in_dtype(model: MetaModel) -> int:
    """Return the bytes of an unquantised base in the run's dtype; tied weights count once."""
    return sum(p.numel() * p.element_size() for p in model.lm.module.parameters())


def measure_speeds(models: Sequence[MetaModel], episode: Episode) -> list[dict[str, Any]]:
    """Return for each model the seconds of a forward of an episode's queries, and of adapting to its support.

    The models take turns, so that other load on the machine affects all of them. The first turn is a warm-up.
    """
    forward: list[list[float]] = [[] for _ in models]
    adapting: list[list[float]] = [[] for _ in models]
    for turn in range(REPEATS + 1):
        for index, model in enumerate(models):
            times = time_call(model, answer_call(model, episode)), time_call(model, adapt_call(model, episode))
            if turn:
                forward[index].append(times[0])
                adapting[index].append(times[1])
    return [
        {"forward_seconds": quartiles(forward_times), "adapt_seconds": quartiles(adapt_times)}
        for forward_times, adapt_times in zip(forward, adapting, strict=True)
    ]


def answer_call(model: MetaModel, episode: Episode) -> Callable[[], Any]:
    """Return a call that answers an episode's queries from the start. They are encoded anew: a batch caches states."""
    fast = expand(model.start, 1)
    return lambda: EpisodeQueries(model.lm, model.encoder, [episode]).outputs(fast)


def adapt_call(model: MetaModel, episode: Episode) -> Callable[[], Any]:
    """Return a call that adapts to an episode as the run does. Its support is encoded anew, without cached states."""

    scorer = model.scorer()
    return lambda: list(scorer.adapted(scorer.prepare([episode]), model.start, model.inner_lrs, scorer.steps))


def time_call(model: MetaModel, call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def quartiles(times: Sequence[float]) -> dict[str, float]:
    """Return the median, and the quartiles as low and high."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def compare_scores(before: Sequence[Curve], after: Sequence[Curve]) -> dict[str, Any]:
    """Return both runs' scores before and after adapting, and the paired difference of those after adapting.

    The scores are accuracies of the label tasks; if there are none, losses of free text.
    """
    is_accuracy = any(curve.is_accuracy for curve in before)
    old, new = (
        scores_by_task([curve for curve in curves if curve.is_accuracy == is_accuracy]) for curves in (before, after)
    )
    return {
        "metric": "accuracy" if is_accuracy else "loss",
        "tasks": old.shape[1],
        "episodes": old.shape[1] * old.shape[2],
        "before": {"before": interval(old[0]), "after": interval(old[-1])},
        "after": {"before": interval(new[0]), "after": interval(new[-1])},
        "difference": interval(new[-1] - old[-1]),
    }


def table(summary: dict[str, Any], title: str) -> Table:
    """Return a table with a row for each number, before and after compression."""
    scores = summary["score"]
    caption = f"seconds: median and quartiles, on this machine; scores: {interval_caption(scores['tasks'])}, both alike"
    style = {"padding": (0, 1), "title": title, "caption": caption, "caption_justify": "left"}
    rows = empty_table(("", "before", "after"), left=[""], no_wrap=True, **style)
    sides = [summary[side] for side in ("before", "after")]
    rows.add_row("base's weights on disk", *(megabytes(side["weights_bytes"]) for side in sides))
    rows.add_row("  in the run's dtype", megabytes(summary["before"]["bytes_in_dtype"]), "")
    rows.add_row("forward of an episode's queries", *(seconds(side["forward_seconds"]) for side in sides))
    rows.add_row("adapting to an episode", *(seconds(side["adapt_seconds"]) for side in sides))
    for when, name in (("before", "before adapting"), ("after", "after adapting")):
        rows.add_row(
            f"held-out {scores['metric']}, {name}", *(score(scores[side][when]) for side in ("before", "after"))
        )
    ends = scores["difference"]
    difference = f"{ends['mean']:+.3f} [{ends['low']:+.3f}, {ends['high']:+.3f}]"
    rows.add_row("  difference after adapting", "", difference)
    return rows


def megabytes(count: int | None) -> str:
    return "not here" if count is None else f"{count / 1e6:.1f} MB"


def seconds(times: dict[str, float]) -> str:
    return f"{times['median']:.3f} s [{times['low']:.3f}, {times['high']:.3f}]"


def score(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} ± {(interval['high'] - interval['low']) / 2:.3f}"
