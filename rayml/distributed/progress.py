"""A progress bar with time left on the driver's terminal, fed by the run's own metrics file."""

import threading
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from rayml.runs.folder import RunFolder

LINES_WITHOUT_TERMINAL = 20
WATCHED_STEPS = 20
MOST_LAGGING = 1.5
"""Times the median worker's seconds."""
MOST_WAITING = 0.05
"""Share of a step that may go into waiting for its episodes."""


class Progress:
    """Shows a run's outer steps while the block runs; a line now and then where there is no terminal."""

    def __init__(self, run: RunFolder, steps: int, console: Console):
        self.run, self.steps, self.console = run, steps, console
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.bar = Bar(
            TextColumn("meta-training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Progress":
        self.bar.start()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.bar.stop()

    def _follow(self) -> None:
        seen, notices = last_step(self.run), (DataWait(), Lag())
        row = self.bar.add_task("", total=self.steps, completed=seen, text="workers are starting")
        while True:
            stopping = self.stop.wait(self.run.poll_seconds)
            for record in self.run.records_after(seen):
                seen = record["step"]
                self.bar.update(row, completed=seen, text=describe(record))
                if self.bar.disable:
                    self._print(record)
                for warning in filter(None, (notice.warning(record) for notice in notices)):
                    self.console.print(warning, style="yellow", highlight=False, soft_wrap=True)
            if stopping:
                return

    def _print(self, record: dict[str, Any]) -> None:
        every = max(1, self.steps // LINES_WITHOUT_TERMINAL)
        if record["step"] % every == 0 or record["step"] == self.steps:
            self.console.print(f"step {record['step']}/{self.steps}: {describe(record)}")


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
