"""How training goes, on the driver's terminal: a bar with the time that is left, fed by the run's own metrics file."""

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
"""Times the median worker's seconds."""
MOST_WAITING = 0.05
"""Share of a step that may go into waiting for its episodes."""
HEARTBEAT_SECONDS = 2.0
"""Longest wait for what the workers' heartbeats tell."""


class Progress:
    """Shows a run's outer steps while the block runs: without a terminal a line at least every ten seconds.

    Before the first step it shows what the workers are at.
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
        self.activity, self.since, self.notes = "workers are starting", time.monotonic(), 0
        self.seen = last_step(run)
        self.seconds: deque[float] = deque(maxlen=WATCHED_STEPS)

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
        notices = DataWait(), Lag()
        row = self.bar.add_task("", total=self.steps, completed=self.seen, text=self.activity)
        while True:
            stopping = self.stop.wait(self.run.poll_seconds)
            if not self.seconds:
                self._listen()
                self.bar.update(row, text=self.activity)
            for record in self.run.records_after(self.seen):
                self.seen, self.since = record["step"], time.monotonic()
                self.seconds.append(record["step_seconds"])
                text = describe(record) + self._left()
                self.bar.update(row, completed=self.seen, text=text)
                every = max(1, self.steps // LINES_WITHOUT_TERMINAL)
                if self.seen % every == 0 or self.seen == self.steps or len(self.seconds) == 1 or self.lines.is_quiet:
                    self.lines.print(f"step {self.seen}/{self.steps}: {text}")
                for warning in filter(None, (notice.warning(record) for notice in notices)):
                    self.console.print(warning, style="yellow", highlight=False, soft_wrap=True)
            if stopping:
                return

    def _listen(self) -> None:
        """Show what the workers say before their first step."""
        try:
            activity, notes = ray.get(self.heartbeats.told.remote(self.notes), timeout=HEARTBEAT_SECONDS)
        except ray.exceptions.RayError:  # it will again, or the watch says that it does not
            return
        self.notes += len(notes)
        for text, warning in notes:
            self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
            if warning:
                self.console.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)
        if activity != self.activity:
            self.activity, self.since = activity, time.monotonic()
            self.lines.print(f"{activity} ...")

    def _status(self) -> str:
        what = f"in step {self.seen + 1}/{self.steps}" if self.seconds else self.activity
        return f"{what}: {time.monotonic() - self.since:.0f} s so far"

    def _left(self) -> str:
        """Return about how long the steps that are left take: from the second on without the first, which is slower."""
        left = median(list(self.seconds)[1:] or self.seconds) * (self.steps - self.seen)
        return f", about {duration(left)} left" if left >= 1 else ""


class DataWait:
    """Notices, once, that training waits for its episodes."""

    def __init__(self) -> None:
        self.recent: deque[dict[str, Any]] = deque(maxlen=WATCHED_STEPS)
        self.began = self.warned = False

    def warning(self, record: dict[str, Any]) -> str | None:
        """Return what to say after this step, if anything. The first one waits for the stream to start."""
        if self.began:
            self.recent.append(record)
        self.began = True
        if self.warned or len(self.recent) < WATCHED_STEPS:
            return None
        share = sum(r["data_seconds"] for r in self.recent) / sum(r["step_seconds"] for r in self.recent)
        self.warned = share > MOST_WAITING
        message = (
            f"{share:.0%} of the last {WATCHED_STEPS} steps went into waiting for episodes: give workers more CPUs"
        )
        return message if self.warned else None


class Lag:
    """Notices, once a worker, that one takes much longer than the others, step after step."""

    def __init__(self) -> None:
        self.recent: deque[tuple[int, float]] = deque(maxlen=WATCHED_STEPS)
        self.warned: set[int] = set()

    def warning(self, record: dict[str, Any]) -> str | None:
        """Return what to say after this step, if anything."""
        if "slowest_worker" not in record:
            return None
        worker = record["slowest_worker"]
        self.recent.append((worker, record["slowest_factor"]))
        same = [factor for one, factor in self.recent if one == worker]
        if worker in self.warned or len(same) < WATCHED_STEPS or sum(same) / len(same) < MOST_LAGGING:
            return None
        self.warned.add(worker)
        return (
            f"worker {worker} took {sum(same) / len(same):.1f} times as long as the others for its part of the last "
            f"{WATCHED_STEPS} steps: look at the node that it is on"
        )


def last_step(run: RunFolder) -> int:
    return max((record["step"] for record in run.records_after(0)), default=0)


def describe(record: dict[str, Any]) -> str:
    """Return the record's numbers in a few words."""
    parts = [f"query loss {record['query_loss']:.3f}", f"{record['step_seconds']:.1f} s a step"]
    for kind in ("accuracy", "loss"):
        if f"val_{kind}_after" in record:
            parts.append(f"val {kind} {record[f'val_{kind}_before']:.2f} -> {record[f'val_{kind}_after']:.2f}")
    return ", ".join(parts)
