"""Where the time of an outer step goes."""

import time

import torch


class StepTimer:
    """Seconds by phase: each call adds what has passed since the one before to its phase.

    On a GPU it waits for the work that was queued meanwhile.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget all seconds; the next phase begins here."""
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
