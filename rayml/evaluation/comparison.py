"""Methods side by side, on the same episodes: a table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from rayml.evaluation.evaluate import interval

BASELINE = "multitask"
COSTS = "steps", "tokens", "seconds"


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each method's scores, means over its seeds, with 95 % bootstrap intervals over the episodes.

    Differences to multi-task learning are paired by episode.
    """
    methods = list(dict.fromkeys(result["method"] for result in results))
    scores = {name: _by_episode([r for r in results if r["method"] == name]) for name in methods}
    return [
        {
            "method": name,
            "before": interval(scores[name][:, :, 0].mean(0)),
            "after": interval(scores[name][:, :, -1].mean(0)),
            "over_baseline": interval(scores[name][:, :, -1].mean(0) - scores[BASELINE][:, :, -1].mean(0))
            if BASELINE in scores
            else None,
            "seeds": scores[name][:, :, -1].mean(1).tolist(),
            **{
                key: np.mean([r[key] for r in results if r["method"] == name]) for key in ("steps", "tokens", "seconds")
            },
        }
        for name in methods
    ]


def _by_episode(results: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return `[seeds, episodes, 2]`: before the support is taken in, and after."""
    return np.array([[[c["scores"][0], c["scores"][-1]] for c in result["curves"]] for result in results])


def table(summary: dict[str, Any]) -> Table:
    """Return a row for each method."""
    found = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title="held-out tasks, equal forward-backward tokens")
    found.caption = "95 % intervals over episodes, paired by episode; means over seeds"
    found.add_column("method", no_wrap=True)
    for name in ("before", "after", "over multitask", "seeds", "outer steps", "seconds"):
        found.add_column(name, justify="right")
    for row in summary["methods"]:
        found.add_row(*cells(row))
    return found


def cells(row: dict[str, Any]) -> list[str]:
    over = row["over_baseline"]
    return [
        row["method"],
        f"{row['before']['mean']:.2f}",
        f"{row['after']['mean']:.2f} ± {(row['after']['high'] - row['after']['low']) / 2:.2f}",
        f"{over['mean']:+.2f} [{over['low']:+.2f}, {over['high']:+.2f}]" if over else "",
        " ".join(f"{score:.2f}" for score in row["seeds"]),
        f"{row['steps']:.0f}",
        f"{row['seconds']:.0f}",
    ]


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw each method's score with its interval, and a dot for each seed, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(summary["methods"], key=lambda row: row["after"]["mean"])
    figure, axis = pyplot.subplots(figsize=(7, 0.45 * len(rows) + 1.3), layout="constrained")
    for place, row in enumerate(rows):
        after = row["after"]
        axis.plot([after["low"], after["high"]], [place, place], color="#1f6f54", linewidth=6, alpha=0.3)
        axis.plot(after["mean"], place, "o", color="#1f6f54")
        axis.plot(row["seeds"], [place] * len(row["seeds"]), "|", color="#b0552f", markersize=10)
    axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axis.set_xlabel("query score after taking the support in (dot and 95 % interval; a tick for each seed)")
    axis.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
