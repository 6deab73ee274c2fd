"""Which worker keeps the others waiting: each reports when it begins to wait, and regularly that it is alive."""

import time
from dataclasses import dataclass

# This runs in a process of its own: every import here makes every run start later.


@dataclass(frozen=True)
class Straggler:
    """Workers that others wait for."""

    text: str
    """A message that names them."""
    seconds: float
    """Since the first of the others arrived, or since the last sign of life."""

    def __str__(self) -> str:
        return self.text


class Heartbeats:
    """An actor that records which outer step each worker has reached, and when, and what the driver should show."""

    def __init__(self) -> None:
        self.controller: bytes | None = None
        self.notes: list[tuple[str, str | None]] = []
        self.end()

    def set_controller(self, controller: bytes) -> None:
        """Keep the pickled handle of Ray Train's controller. Unpickling it here would import all of Ray Train."""
        self.controller = controller

    def get_controller(self) -> bytes | None:
        """Return the pickled handle of Ray Train's controller; None before it has started."""
        return self.controller

    def begin(self, workers: list[str]) -> None:
        """Start over with new workers, whose names are given by rank."""
        self.names = dict(enumerate(workers))
        self.steps: dict[int, int] = {}
        self.arrival_times: dict[int, float] = {}
        self.beat_times: dict[str, float] = {}

    def end(self) -> None:
        """Record that there are no workers: not yet, or no longer."""
        self.begin([])
        self.activity = "workers are starting"
        self.since = time.monotonic()

    def doing(self, what: str) -> None:
        """Record what the first worker is doing, before the first outer step."""
        self.activity = what

    def note(self, text: str, warning: str | None) -> None:
        """Record a note, and a warning, that people should see once."""
        self.notes.append((text, warning))

    def news(self, seen_notes: int) -> tuple[str, list[tuple[str, str | None]]]:
        """Return what the first worker is doing, and all notes but the first `seen_notes`."""
        return self.activity, self.notes[seen_notes:]

    def seconds_without_workers(self) -> float:
        return 0.0 if self.names else time.monotonic() - self.since

    def arrived(self, rank: int, step: int) -> None:
        """Record that a worker begins to wait for the others in an outer step."""
        self.steps[rank], self.arrival_times[rank] = step, time.monotonic()

    def beat(self, worker: str) -> None:
        """Record that a worker's process runs, whatever its training does. Workers of before `begin` are ignored."""
        if worker in self.names.values():
            self.beat_times[worker] = time.monotonic()

    def straggler(self) -> Straggler | None:
        """Return the workers that are an outer step behind others; None while all keep up."""
        if not self.steps:
            return None  # all are loading the model
        newest = max(self.steps.values())
        missing = [name for rank, name in self.names.items() if self.steps.get(rank, -1) < newest]
        if not missing:
            return None
        first_arrival = min(self.arrival_times[rank] for rank, step in self.steps.items() if step == newest)
        text = f"{', '.join(missing)} keeps the others waiting in outer step {newest}"
        return Straggler(text, time.monotonic() - first_arrival)

    def lost(self, seconds: float) -> Straggler | None:
        """Return the workers without a sign of life for so long. If it is all of several, this node was away: None."""
        silences = {worker: time.monotonic() - beat_time for worker, beat_time in self.beat_times.items()}
        silent = {worker: silence for worker, silence in silences.items() if silence >= seconds}
        if not silent or 1 < len(silences) == len(silent):
            return None
        return Straggler(f"{', '.join(silent)} gives no sign of life", max(silent.values()))
