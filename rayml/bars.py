"""Bars for long work on a terminal; where there is none, as in a job's log, a line for each tenth of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

Bar = Callable[[str, int], Callable[..., None]]
"""From a name and a total to what moves that bar on: by one, or by as many as it is told."""


@contextmanager
def bars(console: Console, transient: bool = False) -> Iterator[Bar]:
    """Yield what adds a bar; of no work at all none is shown, and those that are `transient` go with the block."""
    columns, is_terminal = Progress.get_default_columns(), console.is_terminal
    with Progress(*columns, console=console, disable=not is_terminal, transient=transient) as shown:

        def add(name: str, total: int) -> Callable[..., None]:
            row = shown.add_task(name, total=total, visible=total > 0)

            def advance(count: int = 1) -> None:
                shown.advance(row, count)
                done = int(shown.tasks[row].completed)
                if shown.disable and 10 * done // total > 10 * (done - count) // total:
                    console.print(f"{name}: {done} of {total}", highlight=False)

            return advance

        yield add
