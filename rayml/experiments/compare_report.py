"""A comparison to read: `report.md`, the same as one HTML file, plots, and the numbers as JSON."""

import base64
import json
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from typing import Any

from markdown_it import MarkdownIt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rayml.config import Config
from rayml.experiments.evaluate_report import bounds
from rayml.runs.files import AnyPath, write_whole
from rayml.runs.plots import file_pyplot, save_figure

PACKAGES = "rayml", "torch", "transformers", "ray"
COLOURS = "#1f6f54", "#b0552f", "#3b6ea5", "#8a5a9e", "#b8860b", "#4d4d4d", "#c2417c", "#2f8f9d", "#7a8b2a", "#a0522d"
STYLE = """body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{max-width:100%}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.2em .7em;border-bottom:1px solid #ddd}"""


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
    return f"""# Methods compared on held-out tasks

```
{command}
```

{date.today()}; {versions}; Python {platform.python_version()}.

{config.model.name}, {data.ways}-way, {data.shots} shots, {data.queries} queries, labels shown as {data.labels};
{seeds} training seed(s). What is trained here took the same number of forward-backward tokens. What adapts by inner
steps took the rate and the number of steps that were best for it on meta-val tasks, out of the same choices for all;
then all were asked the same episodes of meta-test tasks. Every answer lies in `results/`; these tables are derived
from it.
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

### By task

{markdown_table(task_columns(found))}
"""


def is_label(found: dict[str, Any]) -> bool:
    """Return whether answers were chosen among options."""
    return found["methods"][0]["calibration_error"] is not None


def score_columns(found: dict[str, Any], baseline: str) -> list[list[str]]:
    """Return a heading and a row for each method, the best first."""
    main, others = found["metric"], [key for key in found["methods"][0]["metrics"] if key != found["metric"]]
    heads = [
        "method",
        main.replace("_", " "),
        f"over {baseline}",
        "worst task",
        *(key.replace("_", " ") for key in others),
    ]
    heads += ["calibration error"] * is_label(found) + ["by seed"]
    rows = []
    for row in sorted(found["methods"], key=lambda row: -row["main"]["mean"]):
        cells = [
            row["method"],
            bounds(row["main"]),
            bounds(row["over_baseline"], sign="+") if row["over_baseline"] else "",
        ]
        cells += [f"{row['worst']['score']:.2f}", *(f"{row['metrics'][key]:.2f}" for key in others)]
        cells += [f"{row['calibration_error']:.2f}"] if is_label(found) else []
        rows.append([*cells, " ".join(f"{score:.2f}" for score in row["seeds"])])
    return [heads, *rows]


def cost_columns(found: dict[str, Any]) -> list[list[str]]:
    heads = [
        "method",
        "outer steps",
        "training tokens",
        "training seconds",
        "seconds an episode (whole curve)",
        "rate factor, steps",
    ]
    rows = []
    for row in found["methods"]:
        settings = "; ".join(f"{s['factor']:g}, {s['steps']}" for s in row["settings"]) if row["adapts"] else "-"
        costs = [f"{row['outer_steps']:.0f}", f"{row['tokens']:.0f}", f"{row['seconds']:.0f}"]
        rows.append([row["method"], *costs, f"{row['episode_seconds']:.2f}", settings])
    return [heads, *rows]


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
                axis.plot([interval["low"], interval["high"]], [index, index], color="#1f6f54", linewidth=6, alpha=0.3)
                axis.plot(interval["mean"], index, "o", color="#1f6f54")
        left.plot(row["seeds"], [index] * len(row["seeds"]), "|", color="#b0552f", markersize=10)
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
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
        for head in heads:
            table.add_column(head, justify="left" if head == "method" else "right")
        for row in rows:
            table.add_row(*row)
        out.print(table)
    for name in ("report.md", "report.html", "compare.json", "results/"):
        out.print(str(folder / name), highlight=False, soft_wrap=True)
