"""Tasks that gained less of late weigh more: what is learned already leaves room for the rest."""

import torch
from torch import Tensor

MEMORY = 0.9
MOST = 4.0
"""No task weighs more than this many times, or less than one in this many, before weights are scaled to a mean of 1."""


class RecentGains:
    """A running mean of each task's gain, its support loss before adapting minus its query loss after.

    Args:
        tasks: how many there are. All start at no gain, and weigh the same.
    """

    def __init__(self, tasks: int, device: torch.device | None = None):
        self.gains = torch.zeros(tasks, device=device)

    def weights(self) -> Tensor:
        """Return a weight for each task, `[tasks]`, 1 on average: a factor e for each nat gained less than the mean."""
        raw = (self.gains.mean() - self.gains).exp().clamp(1 / MOST, MOST)
        return raw / raw.mean()

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Add the gains of one outer step over all workers: their sum and number by task, `[tasks]` each."""
        new = MEMORY * self.gains + (1 - MEMORY) * sums / counts.clamp(min=1)
        self.gains = torch.where(counts > 0, new, self.gains)
