"""Which worker keeps the others waiting: each says when it begins to wait, and now and then that it lives."""

import time
from dataclasses import dataclass

# It runs in a process of its own: what is imported here costs each run's start.


@dataclass(frozen=True)
class Straggler:
    """Workers that others wait for."""

    text: str
    """Names them."""
    seconds: float
    """Since the first of the others arrived, or the last sign of life."""

    def __str__(self) -> str:
        return self.text


class Heartbeats:
    """The outer step in which each worker came to wait for the others, and when."""

    def __init__(self) -> None:
        self.controller: bytes | None = None
        self.notes: list[tuple[str, str | None]] = []
        self.end()

    def controlled_by(self, controller: bytes) -> None:
        """Keep the handle of Ray Train's controller, pickled: to unpickle it would take all of Ray Train in here."""
        self.controller = controller

    def controlling(self) -> bytes | None:
        """Return the handle of Ray Train's controller, pickled; None before it has started."""
        return self.controller

    def begin(self, workers: list[str]) -> None:
        """Start anew, with the workers' names by rank."""
        self.names = dict(enumerate(workers))
        self.steps: dict[int, int] = {}
        self.times: dict[int, float] = {}
        self.heard: dict[str, float] = {}

    def end(self) -> None:
        """Note that there are no workers: none yet, or no longer."""
        self.begin([])
        self.activity = "workers are starting"
        self.since = time.monotonic()

    def doing(self, what: str) -> None:
        """Note what the first worker is at, before the first outer step."""
        self.activity = what

    def note(self, text: str, warning: str | None) -> None:
        """Note what people should see once, and a warning."""
        self.notes.append((text, warning))

    def told(self, known: int) -> tuple[str, list[tuple[str, str | None]]]:
        """Return what the first worker is at, and the notes after the first `known`."""
        return self.activity, self.notes[known:]

    def seconds_without_workers(self) -> float:
        return 0.0 if self.names else time.monotonic() - self.since

    def arrived(self, rank: int, step: int) -> None:
        self.steps[rank], self.times[rank] = step, time.monotonic()

    def beat(self, worker: str) -> None:
        """Note that a worker's process runs, whatever its training does; nothing, if it is one of those before."""
        if worker in self.names.values():
            self.heard[worker] = time.monotonic()

    def straggler(self) -> Straggler | None:
        """Return who has not come where others are; None while all keep up."""
        if not self.steps:
            return None  # all are loading the model
        newest = max(self.steps.values())
        missing = [name for rank, name in self.names.items() if self.steps.get(rank, -1) < newest]
        if not missing:
            return None
        first = min(self.times[rank] for rank, step in self.steps.items() if step == newest)
        text = f"{', '.join(missing)} keeps the others waiting in outer step {newest}"
        return Straggler(text, time.monotonic() - first)

    def lost(self, seconds: float) -> Straggler | None:
        """Return whose process gave no sign of life for so long; None if none did: then it is this actor's own node."""
        times = {worker: time.monotonic() - heard for worker, heard in self.heard.items()}
        quiet = {worker: since for worker, since in times.items() if since >= seconds}
        if not quiet or 1 < len(times) == len(quiet):
            return None
        return Straggler(f"{', '.join(quiet)} gives no sign of life", max(quiet.values()))
