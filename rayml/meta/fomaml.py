"""First-order MAML (Finn et al. 2017, arXiv 1703.03400, section 5.2), for T tasks at once."""

from typing import NamedTuple

from torch import Tensor

from rayml.meta.adapt import Params, TaskLosses, adapt, task_gradients


class MetaGradient(NamedTuple):
    """What one worker's T tasks say about the shared start, summed over the tasks."""

    start: Params
    """Gradient of the sum of query losses at the fast weights, `[...]` each."""
    rates: Params
    """Gradient with respect to each tensor's inner rate, scalars."""
    support_losses: Tensor | None
    """`[T]`, before the last inner step; None if there was no step."""
    query_losses: Tensor
    """`[T]`, after adapting."""


def fomaml(
    support_losses: TaskLosses, query_losses: TaskLosses, start: Params, rates: Params, steps: int, tasks: int
) -> MetaGradient:
    """Return the first-order meta-gradient, summed over the T tasks.

    The fast weights are `start - rate * gradient_sum` with the inner gradients held constant, which is what
    "first order" means. So the chain rule gives the query gradient itself for the start, and
    `-<gradient_sum, query gradient>` for the rate.
    """
    *_, adapted = adapt(support_losses, start, rates, steps, tasks)
    losses, gradients = task_gradients(query_losses, adapted.fast)
    return MetaGradient(
        start={name: gradient.sum(0) for name, gradient in gradients.items()},
        rates={name: -(gradient * adapted.gradient_sum[name]).sum() for name, gradient in gradients.items()},
        support_losses=adapted.support_losses,
        query_losses=losses,
    )
