"""The numbers of `compare.json` and `evaluation.json`, computed from answers alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayml.algorithms.methods import BASELINE
from rayml.experiments.evaluate import EpisodeAnswers, Evaluation
from rayml.experiments.metrics import calibration_error, metrics_of, scores, span_report, text_kind
from rayml.tasks.statistics import Curve, interval, intervals, scores_by_task

Result = dict[str, Any]
"""The answers of one method with one seed: `results/NAME-SEED.json` of a comparison."""


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Return, for each kind of tasks, a row for each method, in the order of `results`.

    Differences are paired by episode. They are to multi-task learning if that was compared, else to the first method.
    """
    names = list(dict.fromkeys(result["method"] for result in results))
    baseline = BASELINE if BASELINE in names else names[0]
    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(group_of(episode) for result in results for episode in result["episodes"]):
        by_method = {name: [of_kind(result, kind) for result in results if result["method"] == name] for name in names}
        kinds[kind] = summarize_kind(by_method, kind, baseline)
    return {"baseline": baseline, "kinds": kinds}


def group_of(episode: dict[str, Any]) -> str:
    """Return the group that an episode is summarized in: its kind, or `label` for plain labels."""
    kind = episode.get("kind", "")
    if is_label(episode):
        return kind if kind in ("pair", "relation") else "label"
    return text_kind(kind)


def is_label(episode: dict[str, Any]) -> bool:
    """Return whether answers were chosen among options."""
    return "confidence" in episode["queries"][0]


def of_kind(result: Result, kind: str) -> Result:
    """Return a result with only its episodes of one kind, and the scores of each."""
    episodes = [episode for episode in result["episodes"] if group_of(episode) == kind]
    return result | {"episodes": [episode | {"scores": scores(kind, episode["queries"])} for episode in episodes]}


def summarize_kind(by_method: dict[str, list[Result]], kind: str, baseline: str) -> dict[str, Any]:
    """Return the tasks of a kind, their main metric, and a row for each method."""
    episodes = [episode for results in by_method.values() for result in results for episode in result["episodes"]]
    tasks = list(dict.fromkeys(episode["task"] for episode in episodes))
    has_labels = is_label(episodes[0])
    metrics = metrics_of(kind, has_labels)
    main = metrics[0]
    arrays = {name: {key: score_array(results, tasks, key) for key in metrics} for name, results in by_method.items()}
    rows = []
    for name, results in by_method.items():
        main_scores = arrays[name][main]
        task_scores = main_scores.mean((0, 2))
        curves = [np.mean([episode["curve"] for episode in result["episodes"]], axis=0) for result in results]
        seconds = [e["seconds"] for result in results for e in result["episodes"] if "seconds" in e]
        rows.append(
            {
                "method": name,
                "main": interval(main_scores),
                "over_baseline": interval(main_scores - arrays[baseline][main]) if name != baseline else None,
                "metrics": {key: float(values.mean()) for key, values in arrays[name].items()},
                "calibration_error": mean_calibration_error(results) if has_labels else None,
                "worst": {"task": tasks[int(task_scores.argmin())], "score": float(task_scores.min())},
                "tasks": dict(zip(tasks, task_scores.tolist(), strict=True)),
                "seeds": main_scores.mean((1, 2)).tolist(),
                "curve": np.mean(curves, axis=0).tolist(),
                "settings": [result["setting"] for result in results],
                "adapts": "steps" in results[0]["setting"] and bool(results[0]["tried"]),
                "labels": results[0]["labels"],
                **{key: float(np.mean([r[key] for r in results])) for key in ("outer_steps", "tokens", "seconds")},
                "task_seconds": float(np.median(seconds)),
            }
        )
    return {"metric": main, "tasks": tasks, "episodes": arrays[baseline][main].shape[2], "methods": rows}


def score_array(results: Sequence[Result], tasks: Sequence[str], metric: str) -> np.ndarray:
    """Return one metric of every episode, `[seeds, tasks, episodes]`, with episodes sorted by index."""

    def task_scores(result: Result, task: str) -> list[float]:
        episodes = [episode for episode in result["episodes"] if episode["task"] == task]
        return [episode["scores"][metric] for episode in sorted(episodes, key=lambda episode: episode["index"])]

    return np.array([[task_scores(result, task) for task in tasks] for result in results], dtype=float)


def mean_calibration_error(results: Sequence[Result]) -> float:
    """Return the calibration error of each seed's answers, averaged over the seeds."""
    queries = [[query for episode in result["episodes"] for query in episode["queries"]] for result in results]
    return float(np.mean([calibration_error(answers) for answers in queries]))


# Summaries of an evaluation


def summarize_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Return what `evaluation.json` holds, each number with its 95 % interval.

    The interval of a task is over its episodes, the interval of "overall" over tasks and episodes. "overall" is the
    accuracy over label tasks, or the loss if there are none; "overall_loss" is the loss over free text if there are
    both.
    """
    overall = []
    for is_accuracy in (True, False):
        part = select_curves(evaluation, is_accuracy=is_accuracy)
        if part.trained:
            overall.append(summarize_curves(part))
    tasks = {}
    for name in dict.fromkeys(curve.task for curve in evaluation.trained):
        part = select_curves(evaluation, task=name)
        answers = [episode for episode in evaluation.answers if episode.task == name]
        tasks[name] = summarize_curves(part) | summarize_answers(answers)
    return {"overall": overall[0], "overall_loss": overall[1] if len(overall) > 1 else None, "tasks": tasks}


def summarize_answers(episodes: Sequence[EpisodeAnswers]) -> dict[str, Any]:
    """Return one task's kind, and its answers' scores by the metrics of the kind; for spans also seqeval's report."""
    kind = episodes[0].kind
    before = [scores(kind, episode.before) for episode in episodes]
    after = [scores(kind, episode.after) for episode in episodes]
    summary: dict[str, Any] = {"kind": kind, "answers": {}}
    for metric in before[0]:
        first, last = (np.array([episode[metric] for episode in point]) for point in (before, after))
        means = intervals(np.stack([first, last, last - first]))
        summary["answers"][metric] = dict(zip(("before", "after", "gain"), means, strict=True))
    if kind == "ner":
        summary["spans"] = span_report([query for episode in episodes for query in episode.after])
    return summary


def select_curves(evaluation: Evaluation, **attributes: Any) -> Evaluation:
    """Return the curves whose attributes have these values."""

    def keep(curve: Curve) -> bool:
        return all(getattr(curve, name) == value for name, value in attributes.items())

    return Evaluation(list(filter(keep, evaluation.trained)), list(filter(keep, evaluation.untrained)), [])


def summarize_curves(evaluation: Evaluation) -> dict[str, Any]:
    """Return before, after and the curves from both starts, and the paired differences."""
    trained, untrained = scores_by_task(evaluation.trained), scores_by_task(evaluation.untrained)
    points, tasks, episodes = trained.shape
    differences = trained[-1] - trained[0], trained[-1] - untrained[-1]
    means = intervals(np.stack([*trained, *untrained, *differences]))
    curve, untrained_curve, (gain, over_untrained) = means[:points], means[points : 2 * points], means[2 * points :]
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
