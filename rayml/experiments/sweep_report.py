"""The trials of a sweep, as they go; at the end a table, `best.yaml`, `trials.csv` and `trials.json`, and a picture."""

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
from rayml.runs.files import AnyPath, write_whole
from rayml.runs.reports import OURS, THEIRS, file_pyplot, save_figure, table

MAP = "viridis"


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one trial."""

    name: str
    point: dict[str, Any]
    """Its values of the keys that were searched."""
    state: str
    """`finished` its outer steps, `stopped` early, or `failed`."""
    score: float | None
    """What the sweep raised, at the last validation; None if there was none."""
    before: float | None
    after: float | None
    step: int
    """Of the last validation."""
    seconds: float
    """Of all its steps."""
    run: str
    error: str | None


def conclude(config: Config, space: Sequence[Range], trials: Sequence[Trial], folder: AnyPath, out: Console) -> Trial:
    """Write all files, print the table, and return the best trial: finished ones come before those stopped early."""
    ranked = sorted(trials, key=rank, reverse=True)
    best = ranked[0]
    write_best(config, best, folder / "best.yaml")
    write_whole(folder / "trials.json", json.dumps([asdict(trial) for trial in ranked], indent=2) + "\n")
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


def rank(trial: Trial) -> tuple[bool, bool, float]:
    """Return what trials are ordered by, the best highest."""
    return trial.score is not None, trial.state == "finished", -np.inf if trial.score is None else trial.score


def write_best(config: Config, best: Trial, path: AnyPath) -> None:
    """Write the config with the best trial's values: the same run, at its full length, into a folder of its own."""
    values = config.model_dump(mode="json", exclude={"sweep"})
    values = with_values(values, best.point | {"run.dir": str(path.parent / "best")})
    found = ", ".join(f"{key}={value}" for key, value in best.point.items())
    head = f"# The best trial of a sweep, {best.name}: {found}.\n"
    head += f"# On meta-val {best.before:.3f} before adapting, {best.after:.3f} after, at outer step {best.step}.\n"
    write_whole(path, head + dump_config(parse_config(values, str(path))))


def write_csv(trials: Sequence[Trial], path: AnyPath) -> None:
    rows = [{**(flat := asdict(trial)).pop("point"), **flat} for trial in trials]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def trials_table(space: Sequence[Range], ranked: Sequence[Trial]) -> Table:
    """Return a row for each trial, the best first."""
    heads = "trial", *(one.key for one in space), "before", "after", "step", "seconds", "state"
    found = table(heads, no_wrap=True, title="trials, the best first")
    for trial in ranked:
        scores = ["-" if score is None else f"{score:.3f}" for score in (trial.before, trial.after)]
        point = [str(trial.point[one.key]) for one in space]
        found.add_row(trial.name, *point, *scores, str(trial.step), f"{trial.seconds:.0f}", trial.state)
    return found


def plot(space: Sequence[Range], trials: Sequence[Trial], path: AnyPath, label: str) -> None:
    """Draw the scores to a PNG: over the values of one key, as a map of two, else as parallel coordinates."""
    pyplot = file_pyplot()
    scored = [trial for trial in trials if trial.score is not None]
    figure, axis = pyplot.subplots(figsize=(max(6.4, 1.9 * len(space)), 4.8), layout="constrained")
    draw = {1: one_key, 2: two_keys}.get(len(space), many_keys)
    draw(axis, space, scored, [trial for trial in trials if trial.score is None], label)
    save_figure(figure, path)


def one_key(axis: Any, space: Sequence[Range], scored: Sequence[Trial], failed: Sequence[Trial], label: str) -> None:
    (one,) = space
    coordinates = [coordinate(one, trial) for trial in scored]
    for trial, x in zip(scored, coordinates, strict=True):
        axis.plot(x, trial.score, "o", color=OURS, fillstyle="full" if trial.state == "finished" else "none")
    for trial in failed:
        axis.axvline(coordinate(one, trial), color=THEIRS, linestyle=":")
    ticks(axis.xaxis, one)
    axis.set(xlabel=one.key, ylabel=f"{label} (hollow: stopped early; dotted: failed)")
    axis.grid(alpha=0.25)


def two_keys(axis: Any, space: Sequence[Range], scored: Sequence[Trial], failed: Sequence[Trial], label: str) -> None:
    """Draw a dot a trial; between them, the surface that is linear over their triangles."""
    across, up = space
    xs, ys = ([coordinate(one, trial) for trial in scored] for one in space)
    scores = np.array([trial.score for trial in scored], dtype=float)
    low, high = float(scores.min()), float(scores.max())
    if len(set(zip(xs, ys, strict=True))) >= 3 and np.linalg.matrix_rank(np.array([xs, ys, np.ones(len(xs))])) == 3:
        levels = np.linspace(low, max(high, low + 1e-6), 12)
        axis.tricontourf(xs, ys, scores, levels=levels, cmap=MAP, alpha=0.55)
    for trial, x, y in zip(scored, xs, ys, strict=True):
        edge = "black" if trial.state == "finished" else "white"
        axis.scatter(x, y, c=[trial.score], s=90, cmap=MAP, vmin=low, vmax=high, edgecolors=edge, linewidths=1.5)
        axis.annotate(f"{trial.score:.2f}", (x, y), xytext=(7, 6), textcoords="offset points", fontsize=8)
    for trial in failed:
        axis.plot(coordinate(across, trial), coordinate(up, trial), "x", color=THEIRS, markersize=9)
    ticks(axis.xaxis, across)
    ticks(axis.yaxis, up)
    axis.set(xlim=edges(across), ylim=edges(up))
    axis.set(xlabel=across.key, ylabel=up.key, title=f"{label} (white rim: stopped early; cross: failed)")


def many_keys(axis: Any, space: Sequence[Range], scored: Sequence[Trial], failed: Sequence[Trial], label: str) -> None:
    """Draw a line a trial through its values, each axis from its least to its largest, and the score at the end."""
    from matplotlib import colormaps

    scores = np.array([trial.score for trial in scored], dtype=float)
    low, span = scores.min(), max(float(np.ptp(scores)), 1e-9)
    ends = [[coordinate(one, trial) for trial in [*scored, *failed]] for one in space]
    for trial in [*scored, *failed]:
        heights = [
            (coordinate(one, trial) - min(end)) / max(max(end) - min(end), 1e-9)
            for one, end in zip(space, ends, strict=True)
        ]
        if trial.score is None:
            axis.plot(heights, color=THEIRS, linestyle=":")
            continue
        height = (trial.score - low) / span
        style = "-" if trial.state == "finished" else "--"
        axis.plot([*heights, height], style, color=colormaps[MAP](height), alpha=0.8)
    for number, (one, end) in enumerate(zip(space, ends, strict=True)):
        for height, value in ((0, min(end)), (1, max(end))):
            axis.annotate(tick(one, value), (number, height), xytext=(3, 3), textcoords="offset points", fontsize=8)
    for height, score in ((0, low), (1, scores.max())):
        axis.annotate(f"{score:.3f}", (len(space), height), xytext=(3, 3), textcoords="offset points", fontsize=8)
    axis.set_xticks(range(len(space) + 1), [*(one.key for one in space), label])
    axis.set(yticks=[], title="dashed: stopped early; dotted: failed")
    axis.grid(axis="x", alpha=0.5)


def coordinate(one: Range, trial: Trial) -> float:
    """Return where a trial's value lies on the key's axis: its logarithm, its number, or its place in the choices."""
    value = trial.point[one.key]
    if one.kind == "choice":
        return float(one.values.index(value))
    return float(np.log10(value)) if one.kind == "loguniform" else float(value)


def edges(one: Range) -> tuple[float, float]:
    """Return the ends of the key's axis: all that was searched, and a little room."""
    if one.kind == "choice":
        return -0.5, len(one.values) - 0.5
    low, high = (float(np.log10(v)) if one.kind == "loguniform" else float(v) for v in one.values)
    return low - 0.07 * (high - low), high + 0.07 * (high - low)


def tick(one: Range, value: float) -> str:
    if one.kind == "choice":
        return str(one.values[round(value)])
    return f"{10**value:.2g}" if one.kind == "loguniform" else f"{value:.3g}"


def ticks(axis: Any, one: Range) -> None:
    if one.kind == "choice":
        axis.set_ticks(range(len(one.values)), [str(value) for value in one.values])
    else:
        axis.set_major_formatter(lambda value, _: tick(one, value))


class TrialTable(ray.tune.Callback):
    """Follows the trials: plain data, since Ray Tune pickles it; the terminal is taken anew in every process."""

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
            self.live.update(self.shown())
        elif self.live:
            cells = self._cells(list(self.rows).index(trial.trial_id) + 1, row)
            self.live.console.print("  ".join(cells), highlight=False, soft_wrap=True)

    def shown(self) -> Table:
        heads = "trial", *self.keys, "step", "before", "after", "state"
        found = table(heads, left=["state"], no_wrap=True, title="sweep")
        for number, row in enumerate(self.rows.values(), start=1):
            found.add_row(*self._cells(number, row))
        return found

    def _cells(self, number: int, row: dict[str, Any]) -> list[str]:
        result = row["result"]
        point = [
            f"{value:.3g}" if isinstance(value, float) else str(value) for value in map(row["point"].get, self.keys)
        ]
        scores = [f"{result[name]:.3f}" if name in result else "-" for name in ("before", "after")]
        return [str(number), *point, f"{result.get('step', 0)}/{self.steps}", *scores, row["state"]]
