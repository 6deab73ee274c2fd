"""The meta-gradient: what every algorithm returns, and how it comes about by first order."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rayml.algorithms.base import Turn
from rayml.algorithms.inner_loop import InnerLoop, Params, TaskLosses, task_gradients


class MetaGradient(NamedTuple):
    """What one worker's T tasks say about the shared start, summed over the tasks by their weights."""

    start: Params
    """Gradient for the start, `[...]` each."""
    inner_lrs: Params
    """Gradient for the inner rates, shaped as they are; empty where they are not learned."""
    support_losses: Tensor | None
    """`[T]`, before the first inner step; None where the support is not scored."""
    query_losses: Tensor
    """`[T]`, where the query is asked last."""


def first_order(
    turns: Sequence[Turn], losses: Mapping[str, TaskLosses], start: Params, inner: InnerLoop, weights: Tensor
) -> MetaGradient:
    """Return the sum of the turns' gradients by their shares, each at the fast weights that it finds.

    Fast weights are `start - rate * gradient_sum`, with the inner gradients held constant. So by the chain rule a
    turn's gradient there is its part of the start's, and `-gradient_sum * gradient` its part of the rate's, summed over
    the weights that share it. A turn that descends has a gradient of what the inner loop changes alone.

    Args:
        losses: of the sides, fast weights to `[T]`.
        start: the shared start, `[...]` each.
        weights: the tasks', `[T]`.
    """
    descended = iter([turn for turn in turns if turn.descends])
    steps = inner.adapt(
        lambda fast: losses[next(descended).side](fast), start, len(weights), sum(turn.descends for turn in turns)
    )
    adapted = next(steps)
    of_start = {name: torch.zeros_like(weight) for name, weight in start.items()}
    of_rates = (
        {name: torch.zeros_like(rate) for name, rate in inner.inner_lrs.items()} if inner.learns_inner_lrs else {}
    )
    seen: list[tuple[str, Tensor | None]] = []
    last_step = max((index for index, turn in enumerate(turns) if turn.descends), default=-1)
    for index, turn in enumerate(turns):
        before = adapted
        if turn.descends:
            adapted = next(steps)
            found, gradients = adapted.support_losses, adapted.gradients
            if index == last_step:
                inner.ended()
        else:
            found, gradients = task_gradients(losses[turn.side], adapted.fast)
        seen.append((turn.side, found))
        for name, gradient in gradients.items() if turn.share else ():
            of_start[name] += turn.share * weighted_sum(gradient, weights)
            if name in of_rates and before.gradients:  # without a step before, no rate had a part in it
                chained = weighted_sum(gradient * before.gradient_sum[name], weights)
                of_rates[name] -= turn.share * chained.sum_to_size(of_rates[name].shape)
    queries = [found for side, found in seen if side == "query"]
    last = (queries or [seen[-1][1]])[-1]
    assert last is not None
    return MetaGradient(of_start, of_rates, seen[0][1] if seen[0][0] == "support" else None, last)


def weighted_sum(per_task: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over tasks of `[T, ...]` by weights `[T]`."""
    return torch.tensordot(weights.to(per_task), per_task, dims=1)
