"""The progress of training on the driver's terminal: a bar with the time that is left, fed by the run's metrics."""

import threading
import time
from collections import deque
from statistics import median
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from rayml.progress import Lines, duration
from rayml.runs.folder import RunFolder

LINES_WITHOUT_TERMINAL = 20
WATCHED_STEPS = 20
MOST_LAGGING = 1.5
"""How many times the median worker's seconds a worker may take on average, without a warning."""
MOST_WAITING = 0.05
"""The share of the steps' time that may go into waiting for episodes, without a warning."""
HEARTBEAT_SECONDS = 2.0
"""The longest wait for an answer from the heartbeats' actor."""


class Progress:
    """Shows a run's outer steps inside the block. Without a terminal, it prints a line at least every ten seconds.

    Before the first step it shows what the workers are doing.
    """

    def __init__(self, run: RunFolder, steps: int, console: Console, heartbeats: Any):
        self.run, self.steps, self.console, self.heartbeats = run, steps, console, heartbeats
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.bar = Bar(
            TextColumn("meta-training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.lines = Lines(console, self._status)
        self.activity, self.since, self.seen_notes = "workers are starting", time.monotonic(), 0
        self.step = max((record["step"] for record in run.records_after(0)), default=0)
        self.step_seconds: deque[float] = deque(maxlen=WATCHED_STEPS)

    def __enter__(self) -> "Progress":
        self.bar.start()
        self.lines.__enter__()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.lines.__exit__()
        self.bar.stop()

    def _follow(self) -> None:
        watches = DataWait(), Lag()
        every = max(1, self.steps // LINES_WITHOUT_TERMINAL)
        row = self.bar.add_task("", total=self.steps, completed=self.step, text=self.activity)
        while True:
            stopping = self.stop.wait(self.run.poll_seconds)
            if not self.step_seconds:
                self._show_news()
                self.bar.update(row, text=self.activity)
            for record in self.run.records_after(self.step):
                self.step, self.since = record["step"], time.monotonic()
                self.step_seconds.append(record["step_seconds"])
                text = describe(record) + self._time_left()
                self.bar.update(row, completed=self.step, text=text)
                is_first, is_last = len(self.step_seconds) == 1, self.step == self.steps
                if self.step % every == 0 or is_first or is_last or self.lines.is_quiet:
                    self.lines.print(f"step {self.step}/{self.steps}: {text}")
                for warning in filter(None, (watch.warning(record) for watch in watches)):
                    self.console.print(warning, style="yellow", highlight=False, soft_wrap=True)
            if stopping:
                return

    def _show_news(self) -> None:
        """Show what the workers report before their first step."""
        try:
            activity, notes = ray.get(self.heartbeats.news.remote(self.seen_notes), timeout=HEARTBEAT_SECONDS)
        except ray.exceptions.RayError:  # it may answer next time; if not, `Watch` reports it
            return
        self.seen_notes += len(notes)
        for text, warning in notes:
            self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
            if warning:
                self.console.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)
        if activity != self.activity:
            self.activity, self.since = activity, time.monotonic()
            self.lines.print(f"{activity} ...")

    def _status(self) -> str:
        activity = f"in step {self.step + 1}/{self.steps}" if self.step_seconds else self.activity
        return f"{activity}: {time.monotonic() - self.since:.0f} s so far"

    def _time_left(self) -> str:
        """Return an estimate of the time left. From the second step on it ignores the first, which is slower."""
        seconds = median(list(self.step_seconds)[1:] or self.step_seconds) * (self.steps - self.step)
        return f", about {duration(seconds)} left" if seconds >= 1 else ""


class DataWait:
    """Warns once if training waits for its episodes."""

    def __init__(self) -> None:
        self.recent: deque[dict[str, Any]] = deque(maxlen=WATCHED_STEPS)
        self.has_begun = self.has_warned = False

    def warning(self, record: dict[str, Any]) -> str | None:
        """Return a warning after this step, or None. The first step is ignored: it waits for the stream to start."""
        if self.has_begun:
            self.recent.append(record)
        self.has_begun = True
        if self.has_warned or len(self.recent) < WATCHED_STEPS:
            return None
        share = sum(r["data_seconds"] for r in self.recent) / sum(r["step_seconds"] for r in self.recent)
        if share <= MOST_WAITING:
            return None
        self.has_warned = True
        return f"{share:.0%} of the last {WATCHED_STEPS} steps went into waiting for episodes: give workers more CPUs"


class Lag:
    """Warns, once for each worker, if it takes much longer than the others, step after step."""

    def __init__(self) -> None:
        self.recent: deque[tuple[int, float]] = deque(maxlen=WATCHED_STEPS)
        self.warned: set[int] = set()

    def warning(self, record: dict[str, Any]) -> str | None:
        """Return a warning after this step, or None."""
        if "slowest_worker" not in record:
            return None
        worker = record["slowest_worker"]
        self.recent.append((worker, record["slowest_factor"]))
        factors = [factor for slowest, factor in self.recent if slowest == worker]
        if worker in self.warned or len(factors) < WATCHED_STEPS or sum(factors) / len(factors) < MOST_LAGGING:
            return None
        self.warned.add(worker)
        return (
            f"worker {worker} took {sum(factors) / len(factors):.1f} times as long as the others for its part of the "
            f"last {WATCHED_STEPS} steps: look at the node that it is on"
        )


def describe(record: dict[str, Any]) -> str:
    """Return the record's main numbers in a few words."""
    parts = [f"query loss {record['query_loss']:.3f}", f"{record['step_seconds']:.1f} s a step"]
    for kind in ("accuracy", "loss"):
        if f"val_{kind}_after" in record:
            parts.append(f"val {kind} {record[f'val_{kind}_before']:.2f} -> {record[f'val_{kind}_after']:.2f}")
    return ", ".join(parts)
