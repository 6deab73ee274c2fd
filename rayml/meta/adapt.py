"""The inner loop: T tasks adapted side by side. Training, evaluation and serving all call `adapt`.

Shapes: a shared start holds tensors `[...]`; fast weights hold one copy a task, `[T, ...]`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]
TaskLosses = Callable[[Params], Tensor]
"""Maps fast weights `[T, ...]` to one loss per task, `[T]`; task t's loss depends on slice t alone."""


class Adapted(NamedTuple):
    """Fast weights after some inner steps."""

    fast: Params
    """`[T, ...]` each, detached."""
    gradient_sum: Params
    """Sum of the inner gradients so far, `[T, ...]` each: `fast = start - rate * gradient_sum`."""
    support_losses: Tensor | None
    """`[T]`: the support losses that the last step descended; None before the first step."""


def adapt(support_losses: TaskLosses, start: Params, rates: Params, steps: int, tasks: int) -> Iterator[Adapted]:
    """Yield the fast weights after 0, 1, ..., `steps` steps of gradient descent on each task's own support loss.

    Plain SGD with one learned or fixed rate per tensor (Li et al. 2017, arXiv 1707.09835, with one rate a tensor
    instead of one a weight). The losses touch disjoint slices, so the gradient of their sum is every task's own.

    Args:
        support_losses: fast weights `[T, ...]` to losses `[T]`.
        start: the shared start, `[...]` each.
        rates: a scalar tensor for each name in `start`.
        steps: number of inner steps, 0 or more.
        tasks: T.
    """
    fast = {name: weight.detach().expand(tasks, *weight.shape) for name, weight in start.items()}
    total = {name: torch.zeros_like(weight) for name, weight in fast.items()}
    yield Adapted(fast, total, None)
    for _ in range(steps):
        losses, gradients = task_gradients(support_losses, fast)
        total = {name: total[name] + gradient for name, gradient in gradients.items()}
        fast = {name: weight - rates[name] * gradients[name] for name, weight in fast.items()}
        yield Adapted(fast, total, losses)


def task_gradients(task_losses: TaskLosses, fast: Params) -> tuple[Tensor, Params]:
    """Return the losses `[T]` and each task's gradient at its own fast weights, `[T, ...]`, all detached."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in fast.items()}
    losses = task_losses(leaves)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return losses.detach(), dict(zip(leaves, gradients, strict=True))
