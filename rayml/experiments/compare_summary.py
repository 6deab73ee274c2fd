"""From what every method answered to the numbers of the report. Nothing else goes in."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayml.algorithms.methods import BASELINE
from rayml.experiments.metrics import calibration_error, metrics_of, scores
from rayml.experiments.statistics import interval

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
        by_task = after.mean((0, 2))
        rows.append(
            {
                "method": name,
                "main": interval(after),
                "over_baseline": interval(after - tables[baseline][main]) if name != baseline else None,
                "metrics": {key: float(values.mean()) for key, values in tables[name].items()},
                "calibration_error": calibration(group) if chosen else None,
                "worst": {"task": tasks[int(by_task.argmin())], "score": float(by_task.min())},
                "tasks": dict(zip(tasks, by_task.tolist(), strict=True)),
                "seeds": after.mean((1, 2)).tolist(),
                "curve": np.mean(
                    [np.mean([e["curve"] for e in r["episodes"]], axis=0) for r in group], axis=0
                ).tolist(),
                "settings": [result["setting"] for result in group],
                "adapts": bool(group[0]["tried"]),
                "labels": group[0]["labels"],
                "outer_steps": mean_of(group, "outer_steps"),
                "tokens": mean_of(group, "tokens"),
                "seconds": mean_of(group, "seconds"),
                "episode_seconds": float(np.mean([e["seconds"] for r in group for e in r["episodes"]])),
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
