"""Both ends of the heartbeats: workers send them, and the driver names the stragglers."""

import logging
import os
import threading
import time
from contextlib import suppress
from typing import Any

import ray
from rich.console import Console

from rayml.training import collective
from rayml.training.heartbeat import Straggler

POLLS = 8
"""How often within the longest wait a worker sends a heartbeat, and the driver looks at them."""
START_SECONDS = 60
"""How long workers may take to start, once there is room for them."""
logger = logging.getLogger(__name__)


class Heartbeat:
    """A worker's end: it sends to an actor on the driver's node."""

    def __init__(self, heartbeats: Any, longest_wait: float):
        self.heartbeats, self.rank = heartbeats, collective.rank()
        self.name = f"worker {self.rank} (process {os.getpid()} on {ray.util.get_node_ip_address()})"
        names = collective.gather_from_workers(self.name)
        if self.rank == 0:
            ray.get(heartbeats.begin.remote(names))
        collective.barrier()  # no worker sends a heartbeat before its name is known
        threading.Thread(target=self._beat, args=[longest_wait / POLLS], daemon=True).start()

    def __call__(self, step: int) -> None:
        """Report that this worker begins to wait for the others in an outer step."""
        self.heartbeats.arrived.remote(self.rank, step)  # without waiting for the answer

    def doing(self, what: str) -> None:
        """Report what the first worker is doing, before the first outer step."""
        if self.rank == 0:
            self.heartbeats.doing.remote(what)

    def note(self, text: str, warning: str | None) -> None:
        """Report a note, and a warning, that people should see once."""
        self.heartbeats.note.remote(text, warning)

    def _beat(self, every: float) -> None:
        while True:
            self.heartbeats.beat.remote(self.name)
            time.sleep(every)


class Watch:
    """The driver's end: inside the block, it names a worker for which the others have waited half the longest wait.

    It ends the run if there is no room for the workers during all of the longest wait.
    """

    def __init__(self, heartbeats: Any, longest_wait: float, console: Console):
        self.heartbeats, self.longest_wait, self.console = heartbeats, longest_wait, console
        self.named: Straggler | None = None
        """The straggler that was printed last; None once it has caught up."""
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
        patience = self.longest_wait / 2
        while not self.stop.wait(self.longest_wait / POLLS):
            try:
                stragglers = ray.get(
                    [self.heartbeats.lost.remote(patience), self.heartbeats.straggler.remote()], timeout=patience
                )
                without_workers = ray.get(self.heartbeats.seconds_without_workers.remote(), timeout=patience)
            except ray.exceptions.RayError:
                logger.warning("the workers' heartbeats cannot be asked for", exc_info=True)
                continue
            late = [straggler for straggler in stragglers if straggler and straggler.seconds >= patience]
            if late:
                self._name(late[0])
            elif not without_workers:
                self.named = None  # a later failure has another cause
            if without_workers >= START_SECONDS + patience:
                with suppress(ray.exceptions.RayError):
                    self._warn(f"no room for the workers after {without_workers:.0f} s; the cluster has {resources()}")
            self.found_no_room = without_workers >= START_SECONDS + self.longest_wait
            if self.found_no_room and end_run(self.heartbeats):
                return

    def _name(self, straggler: Straggler) -> None:
        if self.named is None or straggler.text != self.named.text:
            self._warn(f"{straggler} for {straggler.seconds:.0f} s")
        self.named = straggler

    def _warn(self, message: str) -> None:
        self.console.print(message, style="yellow", highlight=False, soft_wrap=True)


def end_run(heartbeats: Any) -> bool:
    """Kill the controller, and with it whatever it started. While it looks for room, nothing else ends it.

    Returns whether there was a controller: on a busy machine it may not have started yet.
    """
    try:
        controller = ray.get(heartbeats.get_controller.remote(), timeout=1)
    except ray.exceptions.GetTimeoutError:
        return False
    if controller is None:
        return False
    ray.kill(ray.cloudpickle.loads(controller))
    return True


def resources() -> str:
    """Return how many CPUs and GPUs of the cluster are free, in words."""
    free, total = ray.available_resources(), ray.cluster_resources()
    return ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s free" for kind in ("CPU", "GPU"))
