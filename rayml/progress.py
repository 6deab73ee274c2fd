"""Long work shows that it lives: bars on a terminal; elsewhere, as in a job's log, a line every ten seconds or less."""

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
"""From a name and a total to what moves that bar on: by one, or by as many as it is told."""


class Lines:
    """Prints lines where there is no terminal, and repeats where things stand while nothing else is said.

    Args:
        status: returns what goes on at the moment; "" for nothing.
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
        """Whether nothing was said for a while."""
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
def doing(console: Console, what: str) -> Iterator[None]:
    """Say what goes on inside the block, and, while it does, for how long."""
    began = time.monotonic()
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}", style="dim", markup=False), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as shown:
            shown.add_task(f"{what} ...", total=None)
            yield
        return
    with Lines(console, lambda: f"{what}: {time.monotonic() - began:.0f} s so far") as lines:
        lines.print(f"{what} ...")
        yield


@contextmanager
def progress(console: Console, transient: bool = False) -> Iterator[Bar]:
    """Yield what adds a bar; of no work at all none is shown, and those that are `transient` go with the block.

    Without a terminal there is a line for each tenth, and one every ten seconds, with about what is left.
    """
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    left = TextColumn("left"), TimeRemainingColumn()
    current: list[Callable[[], str]] = []
    with (
        Progress(*columns, *left, console=console, disable=not console.is_terminal, transient=transient) as shown,
        Lines(console, lambda: current[-1]() if current else "") as lines,
    ):

        def add(name: str, total: int) -> Callable[..., None]:
            row = shown.add_task(name, total=total, visible=total > 0)
            began, done = time.monotonic(), 0

            def status() -> str:
                took = time.monotonic() - began
                left = f", about {duration(took / done * (total - done))} left" if done and took > 1 else ""
                return f"{name}: {done} of {total}{left if done < total else ''}"

            def advance(count: int = 1) -> None:
                nonlocal done
                done += count
                shown.advance(row, count)
                if 10 * done // total > 10 * (done - count) // total or lines.is_quiet:
                    lines.print(status())

            current.append(status)
            return advance

        yield add


def duration(seconds: float) -> str:
    """Return seconds as people say them: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
