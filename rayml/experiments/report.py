"""Reports: the tables and curves of an evaluation; `report.md`, HTML, plots and numbers of a comparison."""

import base64
import json
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from itertools import cycle
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayml.config import Config
from rayml.runs.files import AnyPath, write_atomically
from rayml.runs.reports import COLOURS, OURS, THEIRS, file_pyplot, save_figure, table
from rayml.tasks.statistics import format_interval, interval_caption

PACKAGES = "rayml", "torch", "transformers", "ray"
STYLE = """body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{max-width:100%}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.2em .7em;border-bottom:1px solid #ddd}"""
LOOK: dict[str, Any] = {"padding": (0, 0, 0, 1), "caption_justify": "left"}
"""Of the tables of an evaluation."""
MOST_PANELS = 60
"""Of a plot of adaptation: a picture of some hundreds is too large to be drawn."""


# Reports of an evaluation


def scores_table(summary: dict[str, Any], title: str) -> Table:
    """Return a table with a row per task and one for all: each score with half the width of its 95 % interval."""
    heads = "held-out task", "before", "after adapting", "untrained, after", "difference"
    caption = f"accuracy or loss on queries; of all: {interval_caption(len(summary['tasks']))}"
    rows = table(heads, left=heads[:1], title=title, caption=caption, **LOOK)
    rows.columns[0].no_wrap = True
    for name, scores in summary["tasks"].items():
        rows.add_row(Text(name), *_score_cells(scores))  # `Text`: brackets in a name are not markup
    rows.add_section()
    rows.add_row("all", *_score_cells(summary["overall"]), style="bold")
    return rows


def answers_table(summary: dict[str, Any]) -> Table | None:
    """Return a table of answer scores, a row per task and metric; None where all tasks have plain labels.

    The scores of plain labels are already in `scores_table`.
    """
    left = "held-out task", "kind", "metric"
    caption = "answers, from the meta-trained start"
    rows = table((*left, "before", "after adapting", "gain"), left=left, no_wrap=True, caption=caption, **LOOK)
    for name, task in summary["tasks"].items():
        if task["metric"] != "loss" and task["kind"] not in ("pair", "relation"):
            continue
        heads = Text(name), task["kind"]
        for metric, scores in task["answers"].items():
            cells = [_half_width(scores["before"]), _half_width(scores["after"]), format_interval(scores["gain"], "+")]
            rows.add_row(*heads, metric.replace("_", " "), *cells)
            heads = Text(""), ""  # a name stands in the first of its rows only
    return rows if rows.row_count else None


def _half_width(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.2f} ± {(interval['high'] - interval['low']) / 2:.2f}"


def _score_cells(scores: dict[str, Any]) -> list[str]:
    means = [_half_width(scores[key]) for key in ("before", "after", "untrained_after")]
    return [*means, format_interval(scores["over_untrained"], "+")]


def print_evaluation(summary: dict[str, Any], title: str, out: Console) -> None:
    out.print(scores_table(summary, title))
    if summary["beside"]:
        out.print(beside_table(summary["beside"]))
    if answers := answers_table(summary):
        out.print(answers)
    for name, task in summary["tasks"].items():
        if "spans" in task:
            out.print(f"{name}, spans after adapting:\n{task['spans']}", markup=False, highlight=False)


def beside_table(beside: dict[str, Any]) -> Table:
    """Return a table of what `encoder_beside` measured: a row per task, and one for all of several."""
    caption = "without any training, on the same episodes; the difference is ours after adapting, less this"
    heads = "held-out task", beside["encoder"], "difference"
    rows = table(heads, left=heads[:1], caption=caption, **LOOK)
    for name, scores in beside["tasks"].items():
        rows.add_row(Text(name), _half_width(scores["accuracy"]), format_interval(scores["ours_less_it"], "+"))
    if len(beside["tasks"]) > 1:
        scores = beside["overall"]
        rows.add_row("all", _half_width(scores["accuracy"]), format_interval(scores["ours_less_it"], "+"))
    return rows


def plot_adaptation(summary: dict[str, Any], path: AnyPath, title: str) -> None:
    """Plot the adaptation curves of all tasks together, and of each task (of the first ones if there are many)."""
    pyplot = file_pyplot()
    tasks = list(summary["tasks"].items())[: MOST_PANELS - 1] if len(summary["tasks"]) > 1 else []
    panels = [("all held-out tasks", summary["overall"]), *tasks]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (name, scores) in zip(axes.flat, panels, strict=False):
        steps = list(range(len(scores["curve"])))
        for key, label, colour in (
            ("curve", "meta-trained start", OURS),
            ("untrained_curve", "untrained start", THEIRS),
        ):
            means, lows, highs = ([point[end] for point in scores[key]] for end in ("mean", "low", "high"))
            axis.plot(steps, means, color=colour, marker="o", label=label)
            axis.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0)
        title_of_task = name.replace("$", r"\$")  # else what is between two is read as mathematics
        axis.set(title=title_of_task, xlabel="inner steps", ylabel=f"query {scores['metric']}", xticks=steps)
        axis.grid(alpha=0.25)
        if scores["metric"] == "accuracy":
            axis.set_ylim(0, 1)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    axes.flat[0].legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    save_figure(figure, path)


# Reports of a comparison


def write_report(
    summary: dict[str, Any], results: Sequence[dict[str, Any]], config: Config, command: str, folder: AnyPath
) -> None:
    """Write `compare.json`, the plots, `report.md` and `report.html` into the folder."""
    write_atomically(folder / "compare.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    parts = [header(config, results, command, summary["failed"])]
    for kind, kind_summary in summary["kinds"].items():
        plot_scores(kind_summary, summary["baseline"], folder / f"{kind}-scores.png")
        plot_curves(kind_summary, folder / f"{kind}-curves.png")
        parts.append(section(kind_summary, kind, summary["baseline"]))
    markdown = "\n".join(parts)
    write_atomically(folder / "report.md", markdown)
    write_atomically(folder / "report.html", as_html(markdown, folder))


def header(config: Config, results: Sequence[dict[str, Any]], command: str, failed: dict[str, str]) -> str:
    data = config.data
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    seeds = len({result["seed"] for result in results})
    encoders = {r["method"]: r["encoder"] for r in results if "encoder" in r}
    notes = " ".join(f"{method} begins with the encoder {encoder}." for method, encoder in encoders.items())
    return f"""# Methods compared on held-out tasks

```
{command}
```

{date.today()}; {versions}; Python {platform.python_version()}.

{config.model.name}, {data.ways}-way, {data.shots} shots, {data.queries} queries, labels shown as {data.labels};
{seeds} training seed(s). All methods trained here took the same number of forward-backward tokens. Methods with inner
steps use the rate and the number of steps that did best on meta-val tasks, out of the same choices for all; then all
methods answered the same episodes of meta-test tasks. `results/` holds every answer; these tables are derived from it.
{notes}
""" + "".join(f"\n{name} is left out: {reason}\n" for name, reason in failed.items())


def section(kind_summary: dict[str, Any], kind: str, baseline: str) -> str:
    title = {"label": "Label tasks", "text": "Free text"}.get(kind, f"Tasks of kind {kind}")
    return f"""
## {title}: {len(kind_summary["tasks"])} tasks, {kind_summary["episodes"]} episodes each

{markdown_table(score_rows(kind_summary, baseline))}

Intervals are 95 % bootstrap intervals over seeds, tasks, and episodes within tasks; differences are paired by episode.

![Scores]({kind}-scores.png)

![Adaptation curves]({kind}-curves.png)

### What it cost, and how each adapts

{markdown_table(cost_rows(kind_summary))}

Seconds per task: the median time to learn its support and answer its queries once, on this machine.

### By task

{markdown_table(task_rows(kind_summary))}
"""


def is_label(kind_summary: dict[str, Any]) -> bool:
    """Return whether answers were chosen among options."""
    return kind_summary["methods"][0]["calibration_error"] is not None


def score_rows(kind_summary: dict[str, Any], baseline: str) -> list[list[str]]:
    """Return the header and a row for each method, the best first."""
    methods, main = kind_summary["methods"], kind_summary["metric"]
    others = [metric for metric in methods[0]["metrics"] if metric != main]
    names = [metric.replace("_", " ") for metric in (main, *others)]
    heads = ["method", names[0], f"over {baseline}", "worst task", *names[1:]]
    rows = [[*heads, *["calibration error"] * is_label(kind_summary), "by seed"]]
    for method in sorted(methods, key=lambda method: -method["main"]["mean"]):
        difference = format_interval(method["over_baseline"], sign="+") if method["over_baseline"] else ""
        numbers = [method["worst"]["score"], *(method["metrics"][metric] for metric in others)]
        numbers += [method["calibration_error"]] if is_label(kind_summary) else []
        by_seed = " ".join(f"{score:.2f}" for score in method["seeds"])
        rows.append(
            [method["method"], format_interval(method["main"]), difference, *map("{:.2f}".format, numbers), by_seed]
        )
    return rows


def cost_rows(kind_summary: dict[str, Any]) -> list[list[str]]:
    rows = [["method", "outer steps", "training tokens", "training seconds", "seconds per task", "adaptation"]]
    for method in kind_summary["methods"]:
        costs = [f"{method[key]:.0f}" for key in ("outer_steps", "tokens", "seconds")]
        settings = dict.fromkeys(describe_setting(setting) for setting in method["settings"])
        rows.append([method["method"], *costs, f"{method['task_seconds']:.3f}", "; ".join(settings)])
    return rows


def describe_setting(setting: dict[str, Any]) -> str:
    """Return in a few words how a method learned a task."""
    if "head" in setting:
        return setting["head"]
    return f"rate x {setting['factor']:g}, {setting['steps']} steps" if setting["steps"] else "-"


def task_rows(kind_summary: dict[str, Any]) -> list[list[str]]:
    methods = kind_summary["methods"]
    rows = [["task", *(method["method"] for method in methods)]]
    return rows + [[task, *(f"{method['tasks'][task]:.2f}" for method in methods)] for task in kind_summary["tasks"]]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(rows[0])
    cells = ([cell.replace("|", "\\|") for cell in row] for row in [rows[0], rule, *rows[1:]])
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def as_html(markdown: str, folder: AnyPath) -> str:
    """Return the report as one HTML page with its pictures embedded."""
    body = MarkdownIt("commonmark").enable("table").render(markdown)
    for picture in folder.glob("*.png"):
        data = base64.b64encode(picture.read_bytes()).decode()
        body = body.replace(f'src="{picture.name}"', f'src="data:image/png;base64,{data}"')
    head = f'<meta charset="utf-8"><title>Methods compared</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


def plot_scores(kind_summary: dict[str, Any], baseline: str, path: AnyPath) -> None:
    """Plot each method's score, and beside it the difference to the baseline, both with intervals, to a PNG."""
    pyplot = file_pyplot()
    methods = sorted(kind_summary["methods"], key=lambda method: method["main"]["mean"])
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 0.42 * len(methods) + 1.4), sharey=True, layout="constrained"
    )
    for index, method in enumerate(methods):
        for axis, interval in ((left, method["main"]), (right, method["over_baseline"])):
            if interval:
                axis.plot([interval["low"], interval["high"]], [index, index], color=OURS, linewidth=6, alpha=0.3)
                axis.plot(interval["mean"], index, "o", color=OURS)
        left.plot(method["seeds"], [index] * len(method["seeds"]), "|", color=THEIRS, markersize=10)
    left.set_yticks(range(len(methods)), [method["method"] for method in methods])
    left.set_xlabel(f"{kind_summary['metric'].replace('_', ' ')} (a tick for each seed)")
    right.set_xlabel(f"over {baseline}")
    right.axvline(0, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.25)
    save_figure(figure, path)


def plot_curves(kind_summary: dict[str, Any], path: AnyPath) -> None:
    """Plot the query score over inner steps, each method at its own rate; a method without steps is a level line."""
    pyplot = file_pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    most_steps = max(len(method["curve"]) for method in kind_summary["methods"]) - 1
    for method, colour in zip(kind_summary["methods"], cycle(COLOURS), strict=False):
        curve, look = method["curve"], {"color": colour, "label": method["method"]}
        if method["adapts"]:
            axis.plot(range(len(curve)), curve, marker="o", **look)
        else:
            axis.plot([0, most_steps], [curve[-1]] * 2, linestyle="--", **look)
    score = "accuracy" if is_label(kind_summary) else "loss"
    axis.set(xlabel="inner steps", ylabel=f"query {score}", xticks=range(most_steps + 1))
    axis.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    axis.grid(alpha=0.25)
    save_figure(figure, path)


def print_summary(summary: dict[str, Any], folder: AnyPath, out: Console) -> None:
    """Print the score tables, and the paths of all files."""
    for kind_summary in summary["kinds"].values():
        heads, *rows = score_rows(kind_summary, summary["baseline"])
        title = f"{len(kind_summary['tasks'])} meta-test tasks, {kind_summary['episodes']} episodes each"
        score_table = table(heads, left=["method"], title=title)
        for row in rows:
            score_table.add_row(*row)
        out.print(score_table)
    for name in ("report.md", "report.html", "compare.json", "results/"):
        out.print(str(folder / name), highlight=False, soft_wrap=True)
