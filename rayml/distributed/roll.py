"""Which worker keeps the others waiting: each signs a roll before it waits for them."""

import _thread
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from rayml.engine import collective

POLLS = 8
"""In the longest wait."""
logger = logging.getLogger(__name__)


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


class Signature:
    """A worker's hold on the roll, which lies in an actor of the driver's node."""

    def __init__(self, roll: Any):
        self.roll, self.rank = roll, collective.rank()
        names = collective.gather_from_workers(
            f"worker {self.rank} (process {os.getpid()} on {ray.util.get_node_ip_address()})"
        )
        if self.rank == 0:
            ray.get(roll.begin.remote(names))
        collective.gather_from_workers(None)  # nobody signs the roll of before

    def __call__(self, step: int) -> None:
        self.roll.sign.remote(self.rank, step)  # the answer is not waited for


class Watch:
    """Says while the block runs, on the driver, which worker keeps the others waiting for half the longest wait.

    Where there is no room for workers for all of it, it interrupts the main thread.
    """

    def __init__(self, roll: Any, longest_wait: float, console: Console):
        self.roll, self.longest_wait, self.console = roll, longest_wait, console
        self.named: Absence | None = None
        """Who was named last."""
        self.found_no_room = False
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(self.longest_wait / POLLS):
            try:
                asked = [self.roll.absent.remote(), self.roll.seconds_without_workers.remote()]
                absence, alone = ray.get(asked, timeout=self.longest_wait)
            except ray.exceptions.RayError:
                logger.warning("the workers' roll does not answer", exc_info=True)
                continue
            if absence and absence.seconds >= self.longest_wait / 2:
                self._name(absence)
            if alone >= self.longest_wait / 2:
                self._tell(f"no room for the workers since {alone:.0f} s; the cluster has {resources()}")
            if alone >= self.longest_wait:
                self.found_no_room = True
                _thread.interrupt_main()  # Ray Train takes it as Ctrl-C
                return

    def _name(self, absence: Absence) -> None:
        if self.named is None or (absence.step, absence.workers) != (self.named.step, self.named.workers):
            self._tell(f"{absence} for {absence.seconds:.0f} s")
        self.named = absence

    def _tell(self, message: str) -> None:
        self.console.print(message, style="yellow", highlight=False, soft_wrap=True)


def resources() -> str:
    """Return what the cluster has free, in words."""
    free, there = ray.available_resources(), ray.cluster_resources()
    return ", ".join(f"{free.get(kind, 0):g} of {there.get(kind, 0):g} {kind}s free" for kind in ("CPU", "GPU"))
