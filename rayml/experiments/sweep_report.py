"""How a sweep is shown: a live table of its trials; at the end `best.yaml`, `trials.csv`, `trials.json` and a plot."""

import csv
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray.tune
from rich.console import Console
from rich.live import Live
from rich.table import Table

from rayml.config import Config, dump_config, parse_config, with_values
from rayml.experiments.search_space import Range
from rayml.runs.files import AnyPath, write_atomically
from rayml.runs.reports import OURS, THEIRS, file_pyplot, save_figure, table

COLOUR_MAP = "viridis"


@dataclass(frozen=True, slots=True)
class Trial:
    """The outcome of one trial."""

    name: str
    point: dict[str, Any]
    """Its value of each searched key."""
    state: str
    """`finished` (all outer steps taken), `stopped` (early) or `failed`."""
    score: float | None
    """What the sweep maximizes, at the last validation; None without a validation."""
    before: float | None
    after: float | None
    step: int
    """Outer step of the last validation."""
    seconds: float
    """Total time of its outer steps."""
    run: str
    error: str | None


def report_sweep(
    config: Config, space: Sequence[Range], trials: Sequence[Trial], folder: AnyPath, out: Console
) -> Trial:
    """Write all files, print the table, and return the best trial. Finished trials rank before those stopped early."""
    ranked = sorted(trials, key=sort_key, reverse=True)
    best = ranked[0]
    write_best(config, best, folder / "best.yaml")
    write_atomically(folder / "trials.json", json.dumps([asdict(trial) for trial in ranked], indent=2) + "\n")
    write_csv(ranked, folder / "trials.csv")
    plot(space, trials, folder / "sweep.png", f"meta-val, {config.sweep.metric}")
    out.print(trials_table(space, ranked))
    for trial in ranked:
        if trial.error:
            out.print(f"{trial.name} failed: {trial.error}", style="red", markup=False, highlight=False, soft_wrap=True)
    for name in ("best.yaml", "trials.csv", "trials.json", "sweep.png"):
        out.print(str(folder / name), highlight=False, soft_wrap=True)
    out.print(f"next: rayml train {shlex.quote(str(folder / 'best.yaml'))}", highlight=False, soft_wrap=True)
    return best


def sort_key(trial: Trial) -> tuple[bool, bool, float]:
    """Return the key that trials are sorted by; the best trial has the largest."""
    return trial.score is not None, trial.state == "finished", -np.inf if trial.score is None else trial.score


def write_best(config: Config, best: Trial, path: AnyPath) -> None:
    """Write the config of the best trial: the same run at its full length, in a folder of its own."""
    values = config.model_dump(mode="json", exclude={"sweep"})
    values = with_values(values, best.point | {"run.dir": str(path.parent / "best")})
    settings = ", ".join(f"{key}={value}" for key, value in best.point.items())
    header = f"# The best trial of a sweep, {best.name}: {settings}.\n"
    header += f"# On meta-val {best.before:.3f} before adapting, {best.after:.3f} after, at outer step {best.step}.\n"
    write_atomically(path, header + dump_config(parse_config(values, str(path))))


def write_csv(trials: Sequence[Trial], path: AnyPath) -> None:
    records = [asdict(trial) for trial in trials]
    rows = [record.pop("point") | record for record in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def trials_table(space: Sequence[Range], ranked: Sequence[Trial]) -> Table:
    """Return a table with a row for each trial."""
    keys = [searched.key for searched in space]
    heads = "trial", *keys, "before", "after", "step", "seconds", "state"
    rows = table(heads, no_wrap=True, title="trials, the best first")
    for trial in ranked:
        scores = ["-" if score is None else f"{score:.3f}" for score in (trial.before, trial.after)]
        point = [str(trial.point[key]) for key in keys]
        rows.add_row(trial.name, *point, *scores, str(trial.step), f"{trial.seconds:.0f}", trial.state)
    return rows


def plot(space: Sequence[Range], trials: Sequence[Trial], path: AnyPath, label: str) -> None:
    """Plot the scores to a PNG: against one key, as a map of two keys, or for more as parallel coordinates."""
    pyplot = file_pyplot()
    scored = [trial for trial in trials if trial.score is not None]
    figure, axis = pyplot.subplots(figsize=(max(6.4, 1.9 * len(space)), 4.8), layout="constrained")
    draw = {1: draw_1d, 2: draw_2d}.get(len(space), draw_nd)
    draw(axis, space, scored, [trial for trial in trials if trial.score is None], label)
    save_figure(figure, path)


def draw_1d(axis: Any, space: Sequence[Range], scored: Sequence[Trial], failed: Sequence[Trial], label: str) -> None:
    (searched,) = space
    for trial in scored:
        fill = "full" if trial.state == "finished" else "none"
        axis.plot(coordinate(searched, trial), trial.score, "o", color=OURS, fillstyle=fill)
    for trial in failed:
        axis.axvline(coordinate(searched, trial), color=THEIRS, linestyle=":")
    set_ticks(axis.xaxis, searched)
    axis.set(xlabel=searched.key, ylabel=f"{label} (hollow: stopped early; dotted: failed)")
    axis.grid(alpha=0.25)


def draw_2d(axis: Any, space: Sequence[Range], scored: Sequence[Trial], failed: Sequence[Trial], label: str) -> None:
    """Draw a dot for each trial over contours of the score, interpolated linearly between the dots."""
    horizontal, vertical = space
    xs, ys = ([coordinate(searched, trial) for trial in scored] for searched in space)
    scores = np.array([trial.score for trial in scored], dtype=float)
    low, high = float(scores.min()), float(scores.max())
    # A triangulation needs three different points that do not lie on a line.
    if len(set(zip(xs, ys, strict=True))) >= 3 and np.linalg.matrix_rank(np.array([xs, ys, np.ones(len(xs))])) == 3:
        levels = np.linspace(low, max(high, low + 1e-6), 12)
        axis.tricontourf(xs, ys, scores, levels=levels, cmap=COLOUR_MAP, alpha=0.55)
    for trial, x, y in zip(scored, xs, ys, strict=True):
        edge = "black" if trial.state == "finished" else "white"
        colour = {"c": [trial.score], "cmap": COLOUR_MAP, "vmin": low, "vmax": high}
        axis.scatter(x, y, s=90, edgecolors=edge, linewidths=1.5, **colour)
        axis.annotate(f"{trial.score:.2f}", (x, y), xytext=(7, 6), textcoords="offset points", fontsize=8)
    for trial in failed:
        axis.plot(*(coordinate(searched, trial) for searched in space), "x", color=THEIRS, markersize=9)
    set_ticks(axis.xaxis, horizontal)
    set_ticks(axis.yaxis, vertical)
    axis.set(xlim=limits(horizontal), ylim=limits(vertical))
    axis.set(xlabel=horizontal.key, ylabel=vertical.key, title=f"{label} (white rim: stopped early; cross: failed)")


def draw_nd(axis: Any, space: Sequence[Range], scored: Sequence[Trial], failed: Sequence[Trial], label: str) -> None:
    """Draw a line for each trial through its values, each key scaled from its least to its largest, up to its score."""
    from matplotlib import colormaps

    scores = np.array([trial.score for trial in scored], dtype=float)
    low, span = scores.min(), max(float(np.ptp(scores)), 1e-9)
    trials = [*scored, *failed]
    columns = [np.array([coordinate(searched, trial) for trial in trials]) for searched in space]
    scaled = np.array([(column - column.min()) / max(float(np.ptp(column)), 1e-9) for column in columns])
    for trial, heights in zip(trials, scaled.T, strict=True):
        if trial.score is None:
            axis.plot(heights, color=THEIRS, linestyle=":")
            continue
        height = (trial.score - low) / span
        style = "-" if trial.state == "finished" else "--"
        axis.plot([*heights, height], style, color=colormaps[COLOUR_MAP](height), alpha=0.8)
    ends = [
        (tick_label(searched, column.min()), tick_label(searched, column.max()))
        for searched, column in zip(space, columns, strict=True)
    ]
    for x, (least, largest) in enumerate([*ends, (f"{low:.3f}", f"{scores.max():.3f}")]):
        axis.annotate(least, (x, 0), xytext=(3, 3), textcoords="offset points", fontsize=8)
        axis.annotate(largest, (x, 1), xytext=(3, 3), textcoords="offset points", fontsize=8)
    axis.set_xticks(range(len(space) + 1), [*(searched.key for searched in space), label])
    axis.set(yticks=[], title="dashed: stopped early; dotted: failed")
    axis.grid(axis="x", alpha=0.5)


def coordinate(searched: Range, trial: Trial) -> float:
    """Return where a trial lies on the axis of a key."""
    return position(searched, trial.point[searched.key])


def position(searched: Range, value: Any) -> float:
    """Return where a value lies on the axis of its key: its index among choices, its logarithm, or the value itself."""
    if searched.kind == "choice":
        return float(searched.values.index(value))
    return float(np.log10(value)) if searched.kind == "loguniform" else float(value)


def limits(searched: Range) -> tuple[float, float]:
    """Return the limits of the axis of a key: the searched range with a margin."""
    if searched.kind == "choice":
        return -0.5, len(searched.values) - 0.5
    low, high = (position(searched, value) for value in searched.values)
    margin = 0.07 * (high - low)
    return low - margin, high + margin


def tick_label(searched: Range, coordinate: float) -> str:
    if searched.kind == "choice":
        return str(searched.values[round(coordinate)])
    return f"{10**coordinate:.2g}" if searched.kind == "loguniform" else f"{coordinate:.3g}"


def set_ticks(axis: Any, searched: Range) -> None:
    if searched.kind == "choice":
        axis.set_ticks(range(len(searched.values)), [str(value) for value in searched.values])
    else:
        axis.set_major_formatter(lambda value, _: tick_label(searched, value))


class TrialTable(ray.tune.Callback):
    """The live table of the trials. Ray Tune pickles it, so the terminal (`live`) is opened anew in each process."""

    def __init__(self, keys: list[str], steps: int):
        self.keys, self.steps = keys, steps
        self.rows: dict[str, dict[str, Any]] = {}
        self.live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"live": None}

    def get_state(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def set_state(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]

    def setup(self, *_: Any, **__: Any) -> None:
        self.live = Live(console=Console(stderr=True, markup=False), refresh_per_second=2)
        if self.live.console.is_terminal:
            self.live.start()

    def on_trial_start(self, iteration, trials, trial, **_) -> None:
        self._show(trial, "running")

    def on_trial_result(self, iteration, trials, trial, result, **_) -> None:
        self._show(trial, "running", result)

    def on_trial_complete(self, iteration, trials, trial, **_) -> None:
        result = trial.last_result or {}
        self._show(trial, "finished" if result.get("step", 0) >= self.steps else "stopped", result)

    def on_trial_error(self, iteration, trials, trial, **_) -> None:
        self._show(trial, "failed", trial.last_result)

    def on_experiment_end(self, trials, **_) -> None:
        if self.live and self.live.is_started:
            self.live.stop()

    def _show(self, trial: Any, state: str, result: dict[str, Any] | None = None) -> None:
        row = self.rows.setdefault(trial.trial_id, {"point": trial.config, "result": {}})
        row |= {"state": state, "result": result or row["result"]}
        if self.live and self.live.is_started:
            self.live.update(self._table())
        elif self.live:
            cells = self._cells(list(self.rows).index(trial.trial_id) + 1, row)
            self.live.console.print("  ".join(cells), highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        heads = "trial", *self.keys, "step", "before", "after", "state"
        live_table = table(heads, left=["state"], no_wrap=True, title="sweep")
        for number, row in enumerate(self.rows.values(), start=1):
            live_table.add_row(*self._cells(number, row))
        return live_table

    def _cells(self, number: int, row: dict[str, Any]) -> list[str]:
        result = row["result"]
        values = [row["point"].get(key) for key in self.keys]
        point = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        scores = [f"{result[name]:.3f}" if name in result else "-" for name in ("before", "after")]
        return [str(number), *point, f"{result.get('step', 0)}/{self.steps}", *scores, row["state"]]
