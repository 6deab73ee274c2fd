"""Which worker keeps the others waiting: each signs a roll before it waits for them."""

import time
from dataclasses import dataclass

# It runs in a process of its own: what is imported here costs each run's start.


@dataclass(frozen=True)
class Absence:
    """Workers that others wait for."""

    step: int
    workers: tuple[str, ...]
    seconds: float
    """Since the first of the others arrived."""

    def __str__(self) -> str:
        return f"{', '.join(self.workers)} keeps the others waiting in outer step {self.step}"


class Roll:
    """The outer step in which each worker came to wait for the others, and when."""

    def __init__(self) -> None:
        self.end()

    def begin(self, workers: list[str]) -> None:
        """Start anew, with the workers' names by rank."""
        self.names = dict(enumerate(workers))
        self.steps: dict[int, int] = {}
        self.times: dict[int, float] = {}

    def end(self) -> None:
        """Note that there are no workers: none yet, or no longer."""
        self.begin([])
        self.since = time.monotonic()

    def seconds_without_workers(self) -> float:
        return 0.0 if self.names else time.monotonic() - self.since

    def sign(self, rank: int, step: int) -> None:
        self.steps[rank], self.times[rank] = step, time.monotonic()

    def absent(self) -> Absence | None:
        """Return who has not come where others are; None while all keep up."""
        if not self.steps:
            return None  # all are loading the model
        newest = max(self.steps.values())
        missing = [name for rank, name in self.names.items() if self.steps.get(rank, -1) < newest]
        if not missing:
            return None
        first = min(self.times[rank] for rank, step in self.steps.items() if step == newest)
        return Absence(newest, tuple(missing), time.monotonic() - first)
