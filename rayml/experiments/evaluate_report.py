"""Show an evaluation: a table on the terminal, and the adaptation curves as a picture."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rayml.experiments.statistics import resampled
from rayml.runs.files import AnyPath
from rayml.runs.plots import file_pyplot, save_figure

COLUMNS = "before", "after adapting", "untrained, after", "difference"


def table(summary: dict[str, Any], title: str) -> Table:
    """Return one row a task and one for all: score and half the width of its 95 % interval."""
    caption = f"accuracy or loss on queries; of all: {resampled(len(summary['tasks']))}"
    found = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), title=title, caption=caption)
    found.title_justify = found.caption_justify = "left"
    found.add_column("held-out task", no_wrap=True)
    for name in COLUMNS:
        found.add_column(name, justify="right")
    for name, scores in summary["tasks"].items():
        found.add_row(Text(name), *_cells(scores))  # brackets in it are no markup
    found.add_section()
    found.add_row("all", *_cells(summary["overall"]), style="bold")
    return found


def answers_table(summary: dict[str, Any]) -> Table | None:
    """Return the scores of what was written, a row for each task and metric; None where all tasks have plain labels."""
    rows = [
        (name, found["kind"], metric, ends)
        for name, found in summary["tasks"].items()
        for metric, ends in found["answers"].items()
        if found["metric"] == "loss" or found["kind"] in ("pair", "relation")
    ]
    if not rows:
        return None
    found = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), caption="answers, from the meta-trained start")
    found.caption_justify = "left"
    for index, head in enumerate(("held-out task", "kind", "metric", "before", "after adapting", "gain")):
        found.add_column(head, no_wrap=True, justify="left" if index < 3 else "right")
    last = ""
    for name, kind, metric, ends in rows:
        first = name != last
        cells = [_half_width(ends["before"]), _half_width(ends["after"]), bounds(ends["gain"], "+")]
        found.add_row(Text(name if first else ""), kind if first else "", metric.replace("_", " "), *cells)
        last = name
    return found


def _half_width(of: dict[str, float]) -> str:
    return f"{of['mean']:.2f} ± {(of['high'] - of['low']) / 2:.2f}"


def bounds(of: dict[str, float], sign: str = "") -> str:
    """Return an interval's mean and ends; differences have a `sign` of "+"."""
    return "{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]".format(sign=sign, **of)


def _cells(scores: dict[str, Any]) -> list[str]:
    return [
        *(_half_width(scores[key]) for key in ("before", "after", "untrained_after")),
        bounds(scores["over_untrained"], "+"),
    ]


def plot(summary: dict[str, Any], path: AnyPath, title: str) -> None:
    """Draw the adaptation curves of all tasks together, and of each, to a PNG."""
    pyplot = file_pyplot()
    panels = {"all held-out tasks": summary["overall"], **(summary["tasks"] if len(summary["tasks"]) > 1 else {})}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (name, scores) in zip(axes.flat, panels.items(), strict=False):
        for key, label, colour in (
            ("curve", "meta-trained start", "#1f6f54"),
            ("untrained_curve", "untrained start", "#b0552f"),
        ):
            points = scores[key]
            steps = range(len(points))
            axis.plot(steps, [point["mean"] for point in points], color=colour, marker="o", label=label)
            axis.fill_between(
                steps, [p["low"] for p in points], [p["high"] for p in points], color=colour, alpha=0.18, linewidth=0
            )
        axis.set(title=name, xlabel="inner steps", ylabel=f"query {scores['metric']}", xticks=list(steps))
        axis.grid(alpha=0.25)
        if scores["metric"] == "accuracy":
            axis.set_ylim(0, 1)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    axes.flat[0].legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    save_figure(figure, path)
