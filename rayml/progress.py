"""Progress of long work: bars on a terminal; elsewhere, as in a job's log, a line at least every ten seconds."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_SECONDS = 10.0
"""The longest time without a line where there is no terminal."""

Bar = Callable[[str, int], Callable[..., None]]
"""Adds a bar with a name and a total, and returns a function that advances it by one, or by the given number."""


class Lines:
    """Prints lines where there is no terminal, and the current status when nothing was printed for a while.

    Args:
        status: returns a line about the current work; "" for none.
    """

    def __init__(self, console: Console, status: Callable[[], str]):
        self.console, self.status = console, status
        self.last = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> "Lines":
        if not self.console.is_terminal:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing was printed for a while."""
        return time.monotonic() - self.last >= QUIET_SECONDS

    def print(self, text: str) -> None:
        if not self.console.is_terminal:
            self.last = time.monotonic()
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _repeat(self) -> None:
        while not self._end.wait(QUIET_SECONDS / 10):
            text = self.status() if self.is_quiet else ""
            if text:
                self.print(text)


@contextmanager
def show_activity(console: Console, what: str) -> Iterator[None]:
    """Show what the block does, and for how long it has run."""
    began = time.monotonic()
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}", style="dim", markup=False), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as bars:
            bars.add_task(f"{what} ...", total=None)
            yield
        return
    with Lines(console, lambda: f"{what}: {time.monotonic() - began:.0f} s so far") as lines:
        lines.print(f"{what} ...")
        yield


@contextmanager
def progress(console: Console, transient: bool = False) -> Iterator[Bar]:
    """Yield a function that adds a bar. A bar with a total of 0 is not shown; `transient` bars vanish with the block.

    Without a terminal a line is printed at each tenth of the total and every ten seconds, with the estimated time left.
    """
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    remaining = TextColumn("left"), TimeRemainingColumn()
    statuses: list[Callable[[], str]] = []
    with (
        Progress(*columns, *remaining, console=console, disable=not console.is_terminal, transient=transient) as bars,
        Lines(console, lambda: statuses[-1]() if statuses else "") as lines,
    ):

        def add_bar(name: str, total: int) -> Callable[..., None]:
            bar = bars.add_task(name, total=total, visible=total > 0)
            began, done = time.monotonic(), 0

            def status() -> str:
                elapsed = time.monotonic() - began
                left = f", about {duration(elapsed / done * (total - done))} left" if done and elapsed > 1 else ""
                return f"{name}: {done} of {total}{left if done < total else ''}"

            def advance(count: int = 1) -> None:
                nonlocal done
                done += count
                bars.advance(bar, count)
                if 10 * done // total > 10 * (done - count) // total or lines.is_quiet:
                    lines.print(status())

            statuses.append(status)
            return advance

        yield add_bar


def duration(seconds: float) -> str:
    """Return a duration in words: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def warn(message: str) -> None:
    """Print a warning to stderr."""
    Console(stderr=True, markup=False).print(message, style="yellow", highlight=False, soft_wrap=True)
