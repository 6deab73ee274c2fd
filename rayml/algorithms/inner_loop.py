"""The inner loop: adapts to T tasks side by side. Training, evaluation and serving all use it.

Shapes: a shared start holds tensors `[...]`; fast weights hold one copy for each task, `[T, ...]`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]
TaskLosses = Callable[[Params], Tensor]
"""Maps fast weights `[T, ...]` to one loss per task, `[T]`. Task t's loss depends only on slice t."""


class Adapted(NamedTuple):
    """Fast weights after some inner steps."""

    fast: Params
    """`[T, ...]` each, detached."""
    gradient_sum: Params
    """Sum of the inner gradients so far, `[T, ...]` for each tensor with a rate: `fast = start - rate * sum`."""
    support_losses: Tensor | None
    """`[T]`: the losses that the last step descended; None before the first step."""
    gradients: Params
    """The gradients of the last step, for the tensors of `gradient_sum`; empty before the first step."""


@dataclass(frozen=True, slots=True)
class InnerLoop:
    """How tasks learn: the inner rates, the number of steps, and what the steps descend."""

    inner_lrs: Params
    """As `adapt` takes them."""
    steps: int
    learns_inner_lrs: bool = False
    """Whether the meta-gradient is of the rates, too."""
    transform: Callable[[TaskLosses], TaskLosses] = lambda losses: losses
    """Changes the losses that the steps descend: for layers that are unfrozen gradually, or adversarial inputs."""
    after_steps: Callable[[], None] = lambda: None
    """Called in training after the last inner step."""

    def adapt(self, losses: TaskLosses, start: Params, tasks: int, steps: int | None = None) -> Iterator[Adapted]:
        """Yield what the function `adapt` does; `steps` replaces this loop's own number."""
        steps = self.steps if steps is None else steps
        yield from adapt(self.transform(losses), start, self.inner_lrs, steps, tasks)


def adapt(support_losses: TaskLosses, start: Params, inner_lrs: Params, steps: int, tasks: int) -> Iterator[Adapted]:
    """Yield the fast weights after 0, 1, ..., `steps` steps of gradient descent on each task's own support loss.

    This is plain SGD with a learned or fixed rate for each tensor, or for each weight (Meta-SGD, Li et al. 2017, arXiv
    1707.09835). The losses depend on disjoint slices, so the gradient of their sum holds each task's own gradient.

    Args:
        support_losses: fast weights `[T, ...]` to losses `[T]`.
        start: the shared start, `[...]` each.
        inner_lrs: for each tensor that the inner loop changes, a scalar, or a rate for each weight, `[...]`. A tensor
            without a rate stays at the start (ANIL, Raghu et al. 2020, arXiv 1909.09157), and gets no gradient.
        steps: number of inner steps, 0 or more.
        tasks: T.
    """
    for adapted in adapt_in_parts([support_losses], start, inner_lrs, steps, tasks):
        if adapted is not None:
            yield adapted


def adapt_in_parts(
    parts: Sequence[TaskLosses], start: Params, inner_lrs: Params, steps: int, tasks: int
) -> Iterator[Adapted | None]:
    """Yield what `adapt` yields for the sum of the losses in `parts`; between two parts of a step, yield None.

    Only one part's graph is in memory at a time, and after each None the caller may use the model for something else.
    """
    fast = expand(start, tasks)
    gradient_sum = {name: torch.zeros_like(fast[name]) for name in inner_lrs}
    yield Adapted(fast, gradient_sum, None, {})
    for _ in range(steps):
        losses, gradients = task_gradients(parts[0], fast, inner_lrs)
        for part in parts[1:]:
            yield None
            part_losses, part_gradients = task_gradients(part, fast, inner_lrs)
            losses = losses + part_losses
            gradients = {name: gradient + part_gradients[name] for name, gradient in gradients.items()}
        gradient_sum = {name: gradient_sum[name] + gradient for name, gradient in gradients.items()}
        fast = fast | {name: fast[name] - inner_lrs[name] * gradient for name, gradient in gradients.items()}
        yield Adapted(fast, gradient_sum, losses, gradients)


def expand(start: Params, tasks: int) -> Params:
    """Return the fast weights of T tasks before the first step, `[T, ...]`: views of the start, not copies."""
    return {name: weight.detach().expand(tasks, *weight.shape) for name, weight in start.items()}


def task_gradients(task_losses: TaskLosses, fast: Params, names: Params | None = None) -> tuple[Tensor, Params]:
    """Return the losses `[T]` and each task's gradient at its own fast weights, `[T, ...]`, all detached.

    Args:
        names: the keys are the tensors whose gradients are returned; None for all.
    """
    leaves = {name: fast[name].detach().requires_grad_() for name in (fast if names is None else names)}
    losses = task_losses(fast | leaves)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
    return losses.detach(), dict(zip(leaves, gradients, strict=True))
