"""Reptile (Nichol et al. 2018, arXiv 1803.02999), for T tasks at once."""

from itertools import cycle

from torch import Tensor

from rayml.meta.adapt import Params, TaskLosses, adapt
from rayml.meta.gradient import MetaGradient, weighted_sum


def reptile(
    support_losses: TaskLosses, query_losses: TaskLosses, start: Params, rates: Params, steps: int, weights: Tensor
) -> MetaGradient:
    """Return the way from the fast weights back to the start, over the rate, summed by `weights` `[T]`.

    Reptile knows no query: it takes its inner steps on all of a task's data, minibatch by minibatch. Here the two
    sides take turns, since steps on one and the same batch would lose what makes Reptile learn to learn (section 5 of
    the paper). Over the rate, the way is the sum of the inner gradients, which the outer optimizer takes for a
    gradient. What the inner loop does not change has none: it stays as it is.
    """
    turns = cycle((support_losses, query_losses))
    losses: list[Tensor] = []
    for adapted in adapt(lambda fast: next(turns)(fast), start, rates, steps, len(weights)):
        losses += [adapted.support_losses] if adapted.support_losses is not None else []
    zero = {name: weight * 0 for name, weight in start.items()}
    return MetaGradient(
        start=zero | {name: weighted_sum(total, weights) for name, total in adapted.gradient_sum.items()},
        rates={},
        support_losses=losses[0],
        query_losses=(losses[1::2] or losses)[-1],
    )
