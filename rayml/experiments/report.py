"""What experiments show: an evaluation's tables and curves; a comparison's `report.md`, HTML, plots and numbers."""

import base64
import json
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayml.config import Config
from rayml.runs.files import AnyPath, write_whole
from rayml.runs.reports import COLOURS, OURS, THEIRS, file_pyplot, save_figure, table
from rayml.tasks.statistics import bounds, resampled

COLUMNS = "before", "after adapting", "untrained, after", "difference"
PACKAGES = "rayml", "torch", "transformers", "ray"
STYLE = """body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{max-width:100%}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.2em .7em;border-bottom:1px solid #ddd}"""


# Of an evaluation


def scores_table(summary: dict[str, Any], title: str) -> Table:
    """Return one row a task and one for all: score and half the width of its 95 % interval."""
    caption = f"accuracy or loss on queries; of all: {resampled(len(summary['tasks']))}"
    look: dict[str, Any] = {"padding": (0, 0, 0, 1), "title": title, "caption": caption, "caption_justify": "left"}
    found = table(("held-out task", *COLUMNS), left=["held-out task"], **look)
    found.columns[0].no_wrap = True
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
    left = "held-out task", "kind", "metric"
    look: dict[str, Any] = {"padding": (0, 0, 0, 1), "caption_justify": "left"}
    caption = "answers, from the meta-trained start"
    found = table((*left, "before", "after adapting", "gain"), left=left, no_wrap=True, caption=caption, **look)
    last = ""
    for name, kind, metric, ends in rows:
        first = name != last
        cells = [_half_width(ends["before"]), _half_width(ends["after"]), bounds(ends["gain"], "+")]
        found.add_row(Text(name if first else ""), kind if first else "", metric.replace("_", " "), *cells)
        last = name
    return found


def _half_width(of: dict[str, float]) -> str:
    return f"{of['mean']:.2f} ± {(of['high'] - of['low']) / 2:.2f}"


def _cells(scores: dict[str, Any]) -> list[str]:
    return [
        *(_half_width(scores[key]) for key in ("before", "after", "untrained_after")),
        bounds(scores["over_untrained"], "+"),
    ]


def print_evaluation(summary: dict[str, Any], title: str, out: Console) -> None:
    out.print(scores_table(summary, title))
    if summary["beside"]:
        out.print(beside_table(summary["beside"]))
    answers = answers_table(summary)
    if answers:
        out.print(answers)
    for name, found in summary["tasks"].items():
        if "spans" in found:
            out.print(f"{name}, spans after adapting:\n{found['spans']}", markup=False, highlight=False)


def beside_table(beside: dict[str, Any]) -> Table:
    """Return a row a task, and one for all, of what `rayml.experiments.beside` found."""
    caption = "without any training, on the same episodes; the difference is of ours after adapting"
    columns = "held-out task", beside["encoder"], "difference"
    found = table(columns, left=columns[:1], padding=(0, 0, 0, 1), caption=caption, caption_justify="left")
    rows = [*beside["tasks"].items(), ("all", beside["overall"])]
    for name, scores in rows if len(rows) > 2 else rows[:1]:
        found.add_row(Text(name), _half_width(scores["accuracy"]), bounds(scores["ours_less_it"], "+"))
    return found


def plot_adaptation(summary: dict[str, Any], path: AnyPath, title: str) -> None:
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
            ("curve", "meta-trained start", OURS),
            ("untrained_curve", "untrained start", THEIRS),
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


# Of a comparison


def write_report(
    summary: dict[str, Any], results: Sequence[dict[str, Any]], config: Config, command: str, folder: AnyPath
) -> None:
    """Write `compare.json`, the plots, `report.md` and `report.html` into the folder."""
    write_whole(folder / "compare.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    parts = [header(config, results, command, summary["failed"])]
    for kind, found in summary["kinds"].items():
        plot_scores(found, summary["baseline"], folder / f"{kind}-scores.png")
        plot_curves(found, folder / f"{kind}-curves.png")
        parts.append(section(found, kind, summary["baseline"]))
    text = "\n".join(parts)
    write_whole(folder / "report.md", text)
    write_whole(folder / "report.html", as_html(text, folder))


def header(config: Config, results: Sequence[dict[str, Any]], command: str, failed: dict[str, str]) -> str:
    data = config.data
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    seeds = len({result["seed"] for result in results})
    begun = dict.fromkeys(f"{r['method']} begins with the encoder {r['encoder']}." for r in results if "encoder" in r)
    return f"""# Methods compared on held-out tasks

```
{command}
```

{date.today()}; {versions}; Python {platform.python_version()}.

{config.model.name}, {data.ways}-way, {data.shots} shots, {data.queries} queries, labels shown as {data.labels};
{seeds} training seed(s). What is trained here took the same number of forward-backward tokens. What adapts by inner
steps took the rate and the number of steps that were best for it on meta-val tasks, out of the same choices for all;
then all were asked the same episodes of meta-test tasks. Every answer lies in `results/`; these tables are derived
from it. {" ".join(begun)}
""" + "".join(f"\n{name} is left out: {why}\n" for name, why in failed.items())


def section(found: dict[str, Any], kind: str, baseline: str) -> str:
    names = {"label": "Label tasks", "text": "Free text"}
    return f"""
## {names.get(kind, f"Tasks of kind {kind}")}: {len(found["tasks"])} tasks, {found["episodes"]} episodes each

{markdown_table(score_columns(found, baseline))}

Intervals are 95 % bootstrap intervals over seeds, tasks, and episodes within tasks; differences are paired by episode.

![Scores]({kind}-scores.png)

![Adaptation curves]({kind}-curves.png)

### What it cost, and how each adapts

{markdown_table(cost_columns(found))}

Seconds a task: to learn its support and answer its queries once, here; the median.

### By task

{markdown_table(task_columns(found))}
"""


def is_label(found: dict[str, Any]) -> bool:
    """Return whether answers were chosen among options."""
    return found["methods"][0]["calibration_error"] is not None


def score_columns(found: dict[str, Any], baseline: str) -> list[list[str]]:
    """Return a heading and a row for each method, the best first."""
    main, others = found["metric"], [key for key in found["methods"][0]["metrics"] if key != found["metric"]]
    named = [key.replace("_", " ") for key in (main, *others)]
    heads = ["method", named[0], f"over {baseline}", "worst task", *named[1:]]
    heads += ["calibration error"] * is_label(found) + ["by seed"]
    rows = []
    for row in sorted(found["methods"], key=lambda row: -row["main"]["mean"]):
        over = bounds(row["over_baseline"], sign="+") if row["over_baseline"] else ""
        cells = [row["method"], bounds(row["main"]), over]
        cells += [f"{row['worst']['score']:.2f}", *(f"{row['metrics'][key]:.2f}" for key in others)]
        cells += [f"{row['calibration_error']:.2f}"] if is_label(found) else []
        rows.append([*cells, " ".join(f"{score:.2f}" for score in row["seeds"])])
    return [heads, *rows]


def cost_columns(found: dict[str, Any]) -> list[list[str]]:
    heads = ["method", "outer steps", "training tokens", "training seconds", "seconds a task", "adaptation"]
    rows = []
    for row in found["methods"]:
        settings = map(described, row["settings"])
        costs = [f"{row['outer_steps']:.0f}", f"{row['tokens']:.0f}", f"{row['seconds']:.0f}"]
        rows.append([row["method"], *costs, f"{row['task_seconds']:.3f}", "; ".join(dict.fromkeys(settings))])
    return [heads, *rows]


def described(setting: dict[str, Any]) -> str:
    """Return how a method learned a task, in a few words."""
    steps = setting.get("steps")
    return setting["head"] if "head" in setting else f"rate x {setting['factor']:g}, {steps} steps" if steps else "-"


def task_columns(found: dict[str, Any]) -> list[list[str]]:
    heads = ["task", *(row["method"] for row in found["methods"])]
    return [heads] + [[task, *(f"{row['tasks'][task]:.2f}" for row in found["methods"])] for task in found["tasks"]]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(rows[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def as_html(text: str, folder: AnyPath) -> str:
    """Return the report as one file, pictures and all."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    for picture in folder.glob("*.png"):
        data = base64.b64encode(picture.read_bytes()).decode()
        body = body.replace(f'src="{picture.name}"', f'src="data:image/png;base64,{data}"')
    head = f'<meta charset="utf-8"><title>Methods compared</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


def plot_scores(found: dict[str, Any], baseline: str, path: AnyPath) -> None:
    """Draw each method's score, and beside it the difference to the baseline, both with intervals, to a PNG."""
    pyplot = file_pyplot()
    rows = sorted(found["methods"], key=lambda row: row["main"]["mean"])
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 0.42 * len(rows) + 1.4), sharey=True, layout="constrained"
    )
    for index, row in enumerate(rows):
        for axis, interval in ((left, row["main"]), (right, row["over_baseline"])):
            if interval:
                axis.plot([interval["low"], interval["high"]], [index, index], color=OURS, linewidth=6, alpha=0.3)
                axis.plot(interval["mean"], index, "o", color=OURS)
        left.plot(row["seeds"], [index] * len(row["seeds"]), "|", color=THEIRS, markersize=10)
    left.set_yticks(range(len(rows)), [row["method"] for row in rows])
    left.set_xlabel(f"{found['metric'].replace('_', ' ')} (a tick for each seed)")
    right.set_xlabel(f"over {baseline}")
    right.axvline(0, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.25)
    save_figure(figure, path)


def plot_curves(found: dict[str, Any], path: AnyPath) -> None:
    """Draw the query score over inner steps, each method at its own rate; what takes no steps is a level."""
    pyplot = file_pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    last = max(len(row["curve"]) for row in found["methods"]) - 1
    for row, colour in zip(found["methods"], COLOURS * len(found["methods"]), strict=False):
        if row["adapts"]:
            axis.plot(range(len(row["curve"])), row["curve"], marker="o", color=colour, label=row["method"])
        else:
            axis.plot([0, last], [row["curve"][-1]] * 2, linestyle="--", color=colour, label=row["method"])
    axis.set(xlabel="inner steps", ylabel="query accuracy" if is_label(found) else "query loss", xticks=range(last + 1))
    axis.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    axis.grid(alpha=0.25)
    save_figure(figure, path)


def print_summary(summary: dict[str, Any], folder: AnyPath, out: Console) -> None:
    """Print the score tables, and where all lies."""
    for found in summary["kinds"].values():
        heads, *rows = score_columns(found, summary["baseline"])
        title = f"{len(found['tasks'])} meta-test tasks, {found['episodes']} episodes each"
        shown = table(heads, left=["method"], title=title)
        for row in rows:
            shown.add_row(*row)
        out.print(shown)
    for name in ("report.md", "report.html", "compare.json", "results/"):
        out.print(str(folder / name), highlight=False, soft_wrap=True)
