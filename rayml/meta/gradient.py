"""What every algorithm returns, and how tasks weigh in it."""

from typing import NamedTuple

import torch
from torch import Tensor

from rayml.meta.adapt import Params


class MetaGradient(NamedTuple):
    """What one worker's T tasks say about the shared start, summed over the tasks by their weights."""

    start: Params
    """Gradient for the start, `[...]` each."""
    rates: Params
    """Gradient for the inner rates, shaped as they are; empty where the algorithm has none."""
    support_losses: Tensor | None
    """`[T]`, before the first inner step; None where the support is not scored."""
    query_losses: Tensor
    """`[T]`, after adapting."""


def weighted_sum(per_task: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over tasks of `[T, ...]` by weights `[T]`."""
    return torch.tensordot(weights.to(per_task), per_task, dims=1)
