"""From what was answered to the numbers of `compare.json` and `evaluation.json`. Nothing else goes in."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayml.algorithms.methods import BASELINE
from rayml.experiments.evaluate import EpisodeAnswers, Evaluation
from rayml.experiments.metrics import calibration_error, metrics_of, scores, span_report
from rayml.tasks.statistics import Curve, by_task, interval, intervals

Result = dict[str, Any]


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Return, for each kind of tasks, a row for each method, in the order that they come in.

    Differences are to multi-task learning, or to the first method where that is not there, paired by episode.
    """
    names = list(dict.fromkeys(result["method"] for result in results))
    found: dict[str, Any] = {"baseline": BASELINE if BASELINE in names else names[0], "kinds": {}}
    for kind in dict.fromkeys(kind_of(e) for r in results for e in r["episodes"]):
        groups = {name: [only(r, kind) for r in results if r["method"] == name] for name in names}
        found["kinds"][kind] = summarize_kind(groups, kind, found["baseline"])
    return found


def kind_of(episode: dict[str, Any]) -> str:
    """Return what an episode is summed up with: its kind, or, of answers chosen among options, `label`."""
    if is_label(episode):
        return episode.get("kind") if episode.get("kind") in ("pair", "relation") else "label"  # type: ignore[return-value]
    return episode.get("kind") or "text"


def is_label(episode: dict[str, Any]) -> bool:
    return "confidence" in episode["queries"][0]


def only(result: Result, kind: str) -> Result:
    """Return the result with its episodes of one kind, and the scores of each."""
    kept = [e for e in result["episodes"] if kind_of(e) == kind]
    return result | {"episodes": [e | {"scores": scores(kind, e["queries"])} for e in kept]}


def summarize_kind(groups: dict[str, list[Result]], kind: str, baseline: str) -> dict[str, Any]:
    """Return the tasks, the metric that decides, and each method's row."""
    tasks = list(dict.fromkeys(e["task"] for group in groups.values() for r in group for e in r["episodes"]))
    chosen = is_label(next(e for group in groups.values() for r in group for e in r["episodes"]))
    metrics = metrics_of(kind, chosen)
    tables = {name: {key: table(group, tasks, key) for key in metrics} for name, group in groups.items()}
    main = metrics[0]
    rows = []
    for name, group in groups.items():
        after = tables[name][main]
        of_tasks = after.mean((0, 2))
        rows.append(
            {
                "method": name,
                "main": interval(after),
                "over_baseline": interval(after - tables[baseline][main]) if name != baseline else None,
                "metrics": {key: float(values.mean()) for key, values in tables[name].items()},
                "calibration_error": calibration(group) if chosen else None,
                "worst": {"task": tasks[int(of_tasks.argmin())], "score": float(of_tasks.min())},
                "tasks": dict(zip(tasks, of_tasks.tolist(), strict=True)),
                "seeds": after.mean((1, 2)).tolist(),
                "curve": np.mean(
                    [np.mean([e["curve"] for e in r["episodes"]], axis=0) for r in group], axis=0
                ).tolist(),
                "settings": [result["setting"] for result in group],
                "adapts": "steps" in group[0]["setting"] and bool(group[0]["tried"]),
                "labels": group[0]["labels"],
                "outer_steps": mean_of(group, "outer_steps"),
                "tokens": mean_of(group, "tokens"),
                "seconds": mean_of(group, "seconds"),
                "task_seconds": float(
                    np.median([e["seconds"] for r in group for e in r["episodes"] if "seconds" in e])
                ),
            }
        )
    return {"metric": main, "tasks": tasks, "episodes": tables[baseline][main].shape[2], "methods": rows}


def table(group: Sequence[Result], tasks: Sequence[str], key: str) -> np.ndarray:
    """Return one metric of every episode, `[seeds, tasks, episodes]`, in the order of the episodes' numbers."""
    found = [[[e["scores"][key] for e in episodes_of(r, task)] for task in tasks] for r in group]
    return np.array(found, dtype=float)


def episodes_of(result: Result, task: str) -> list[dict[str, Any]]:
    return sorted((e for e in result["episodes"] if e["task"] == task), key=lambda e: e["index"])


def calibration(group: Sequence[Result]) -> float:
    """Return the mean over the seeds."""
    return float(np.mean([calibration_error([q for e in r["episodes"] for q in e["queries"]]) for r in group]))


def mean_of(group: Sequence[Result], key: str) -> float:
    return float(np.mean([result[key] for result in group]))


# Of an evaluation


def summarize_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Return what `evaluation.json` holds, each number with a 95 % interval: of a task over its episodes, overall over
    tasks and episodes.

    "overall" is the accuracy over label tasks, or the loss where there is none; "overall_loss" is the loss over free
    text where there are both.
    """
    groups = {name: _only(evaluation, task=name) for name in dict.fromkeys(c.task for c in evaluation.trained)}
    by_kind = [
        both_starts(part) for part in (_only(evaluation, is_accuracy=kind) for kind in (True, False)) if part.trained
    ]
    return {
        "overall": by_kind[0],
        "overall_loss": by_kind[1] if len(by_kind) > 1 else None,
        "tasks": {
            name: both_starts(group) | answer_summary([a for a in evaluation.answers if a.task == name])
            for name, group in groups.items()
        },
    }


def answer_summary(answered: Sequence[EpisodeAnswers]) -> dict[str, Any]:
    """Return one task's kind and the scores of its answers by its kind's metrics; of spans, also seqeval's report."""
    kind = answered[0].kind
    before, after = ([scores(kind, getattr(a, when)) for a in answered] for when in ("before", "after"))
    found: dict[str, Any] = {"kind": kind, "answers": {}}
    for name in before[0]:
        ends = [np.array([of[name] for of in each]) for each in (before, after)]
        scored = intervals(np.stack([*ends, ends[1] - ends[0]]))
        found["answers"][name] = dict(zip(("before", "after", "gain"), scored, strict=True))
    if kind == "ner":
        found["spans"] = span_report([query for a in answered for query in a.after])
    return found


def _only(evaluation: Evaluation, **wanted: Any) -> Evaluation:
    """Return the curves whose attributes have the wanted values."""

    def keep(curve: Curve) -> bool:
        return all(getattr(curve, name) == value for name, value in wanted.items())

    return Evaluation(list(filter(keep, evaluation.trained)), list(filter(keep, evaluation.untrained)), [])


def both_starts(evaluation: Evaluation) -> dict[str, Any]:
    """Return before, after and the curves, from both starts, and the paired differences."""
    trained, untrained = by_task(evaluation.trained), by_task(evaluation.untrained)
    points, tasks, episodes = trained.shape
    differences = trained[-1] - trained[0], trained[-1] - untrained[-1]
    found = intervals(np.stack([*trained, *untrained, *differences]))
    curve, untrained_curve, (gain, over_untrained) = found[:points], found[points : 2 * points], found[2 * points :]
    return {
        "metric": "accuracy" if evaluation.trained[0].is_accuracy else "loss",
        "episodes": tasks * episodes,
        "before": curve[0],
        "after": curve[-1],
        "untrained_before": untrained_curve[0],
        "untrained_after": untrained_curve[-1],
        "gain": gain,
        "over_untrained": over_untrained,
        "curve": curve,
        "untrained_curve": untrained_curve,
    }
