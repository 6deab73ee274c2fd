"""Where the time of an outer step goes."""

import time

import torch


class Laps:
    """Seconds by phase: each call ends a lap, and adds what has passed since the one before to its phase.

    On a GPU a lap ends when the work that was queued in it is done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget all laps; the next one begins here."""
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def __call__(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def record(self) -> dict[str, float]:
        """Return the phases for `metrics.jsonl`."""
        return {f"{phase}_seconds": seconds for phase, seconds in self.seconds.items()}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
