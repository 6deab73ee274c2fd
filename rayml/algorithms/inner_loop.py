"""The inner loop: T tasks adapted side by side. Training, evaluation and serving all call `adapt`.

Shapes: a shared start holds tensors `[...]`; fast weights hold one copy a task, `[T, ...]`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    """Sum of the inner gradients so far, `[T, ...]` for each tensor with a rate: `fast = start - rate * sum`."""
    support_losses: Tensor | None
    """`[T]`: the support losses that the last step descended; None before the first step."""
    gradients: Params
    """Of the last step, as `gradient_sum`; empty before the first."""


def _same(losses: TaskLosses) -> TaskLosses:
    return losses


@dataclass(frozen=True, slots=True)
class InnerLoop:
    """How tasks learn: with which rates, in how many steps, and what is special about the steps."""

    inner_lrs: Params
    """As `adapt` takes them."""
    steps: int
    learns_inner_lrs: bool = False
    """The meta-gradient is of the rates, too."""
    special: Callable[[TaskLosses], TaskLosses] = _same
    """Makes of the losses what its steps descend: layers that are unfrozen one by one, a support that is made worse."""
    ended: Callable[[], None] = lambda: None
    """Is told in training that the last step is taken."""

    def adapt(self, losses: TaskLosses, start: Params, tasks: int, steps: int | None = None) -> Iterator[Adapted]:
        """Yield as the function `adapt` does; `steps` in place of this loop's own."""
        steps = self.steps if steps is None else steps
        yield from adapt(self.special(losses), start, self.inner_lrs, steps, tasks)


def adapt(support_losses: TaskLosses, start: Params, inner_lrs: Params, steps: int, tasks: int) -> Iterator[Adapted]:
    """Yield the fast weights after 0, 1, ..., `steps` steps of gradient descent on each task's own support loss.

    Plain SGD with a learned or fixed rate for each tensor, or for each weight (Meta-SGD, Li et al. 2017, arXiv
    1707.09835). The losses touch disjoint slices, so the gradient of their sum is every task's own.

    Args:
        support_losses: fast weights `[T, ...]` to losses `[T]`.
        start: the shared start, `[...]` each.
        inner_lrs: a scalar, or `[...]` as its tensor, for each tensor that the inner loop changes. What has no rate
            stays at the start (ANIL, Raghu et al. 2020, arXiv 1909.09157), and no gradient is computed for it.
        steps: number of inner steps, 0 or more.
        tasks: T.
    """
    for adapted in adapt_in_parts([support_losses], start, inner_lrs, steps, tasks):
        if adapted is not None:
            yield adapted


def adapt_in_parts(
    parts: Sequence[TaskLosses], start: Params, inner_lrs: Params, steps: int, tasks: int
) -> Iterator[Adapted | None]:
    """Yield what `adapt` yields for losses that are the sum of `parts`, and None after each part that others follow.

    Only one part's graph is in memory at a time, and others may use the model in between.
    """
    fast = expand(start, tasks)
    total = {name: torch.zeros_like(fast[name]) for name in inner_lrs}
    yield Adapted(fast, total, None, {})
    for _ in range(steps):
        losses, gradients = task_gradients(parts[0], fast, inner_lrs)
        for part in parts[1:]:
            yield None
            more_losses, more = task_gradients(part, fast, inner_lrs)
            losses = losses + more_losses
            gradients = {name: gradient + more[name] for name, gradient in gradients.items()}
        total = {name: total[name] + gradient for name, gradient in gradients.items()}
        fast = fast | {name: fast[name] - inner_lrs[name] * gradient for name, gradient in gradients.items()}
        yield Adapted(fast, total, losses, gradients)


def expand(start: Params, tasks: int) -> Params:
    """Return the start as the fast weights of T tasks before the first step, `[T, ...]`, without a copy."""
    return {name: weight.detach().expand(tasks, *weight.shape) for name, weight in start.items()}


def task_gradients(task_losses: TaskLosses, fast: Params, names: Params | None = None) -> tuple[Tensor, Params]:
    """Return the losses `[T]` and each task's gradient at its own fast weights, `[T, ...]`, all detached.

    Args:
        names: the gradients that are wanted, by the names in it; all, if None.
    """
    leaves = {name: fast[name].detach().requires_grad_() for name in (fast if names is None else names)}
    losses = task_losses(fast | leaves)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
    return losses.detach(), dict(zip(leaves, gradients, strict=True))
