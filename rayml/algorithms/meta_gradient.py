"""The meta-gradient that every algorithm returns, and its first-order computation."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rayml.algorithms.base import Minibatch
from rayml.algorithms.inner_loop import InnerLoop, Params, TaskLosses, task_gradients


class MetaGradient(NamedTuple):
    """The gradient of one worker's T tasks: a sum over the tasks by their weights."""

    start: Params
    """Gradient for the start, `[...]` each."""
    inner_lrs: Params
    """Gradient for the inner rates, of their shapes; empty if they are not learned."""
    support_losses: Tensor | None
    """`[T]`, before the first inner step; None if no loss of the support is taken there."""
    query_losses: Tensor
    """`[T]`, at the last minibatch on the query."""


def first_order(
    minibatches: Sequence[Minibatch], losses: Mapping[str, TaskLosses], start: Params, inner: InnerLoop, weights: Tensor
) -> MetaGradient:
    """Return the sum of the minibatches' gradients by their shares, each taken at the fast weights of its minibatch.

    Fast weights are `start - rate * gradient_sum`. First order means that the inner gradients are held constant. Then
    the chain rule gives the start the gradient at the fast weights as it is, and the rate `-gradient_sum * gradient`,
    summed over all weights that share the rate. A minibatch that descends has gradients only of what the inner loop
    changes.

    Args:
        losses: of each side, fast weights to `[T]`.
        start: the shared start, `[...]` each.
        weights: `[T]`, of the tasks in the sum.
    """
    step_count, steps_taken = sum(minibatch.descends for minibatch in minibatches), 0
    # The losses of the minibatch that takes the step: `minibatch` is the variable of the loop below. `inner` may call
    # this several times in a step.
    steps = inner.adapt(lambda fast: losses[minibatch.side](fast), start, len(weights), step_count)
    adapted = next(steps)
    start_gradient = {name: torch.zeros_like(weight) for name, weight in start.items()}
    rate_gradient = {}
    if inner.learns_inner_lrs:
        rate_gradient = {name: torch.zeros_like(rate) for name, rate in inner.inner_lrs.items()}
    minibatch_losses: list[tuple[str, Tensor]] = []
    for minibatch in minibatches:
        before = adapted
        if minibatch.descends:
            adapted = next(steps)
            assert adapted.support_losses is not None
            task_losses, gradients = adapted.support_losses, adapted.gradients
            steps_taken += 1
            if steps_taken == step_count:
                inner.after_steps()
        else:
            task_losses, gradients = task_gradients(losses[minibatch.side], adapted.fast)
        minibatch_losses.append((minibatch.side, task_losses))
        for name, gradient in gradients.items() if minibatch.share else ():
            start_gradient[name] += minibatch.share * weighted_sum(gradient, weights)
            if name in rate_gradient and before.gradients:  # before the first step, no rate has had an effect
                chained = weighted_sum(gradient * before.gradient_sum[name], weights)
                rate_gradient[name] -= minibatch.share * chained.sum_to_size(rate_gradient[name].shape)
    first_side, first_losses = minibatch_losses[0]
    query_losses = [task_losses for side, task_losses in minibatch_losses if side == "query"]
    return MetaGradient(
        start_gradient,
        rate_gradient,
        support_losses=first_losses if first_side == "support" else None,
        query_losses=query_losses[-1] if query_losses else minibatch_losses[-1][1],
    )


def weighted_sum(per_task: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over tasks of `[T, ...]` by weights `[T]`."""
    return torch.tensordot(weights.to(per_task), per_task, dims=1)
