"""First-order MAML (Finn et al. 2017, arXiv 1703.03400, section 5.2), for T tasks at once.

With a rate for each weight this is first-order Meta-SGD (Li et al. 2017, arXiv 1707.09835).
"""

from torch import Tensor

from rayml.meta.adapt import Params, TaskLosses, adapt, task_gradients
from rayml.meta.gradient import MetaGradient, weighted_sum


def fomaml(
    support_losses: TaskLosses, query_losses: TaskLosses, start: Params, rates: Params, steps: int, weights: Tensor
) -> MetaGradient:
    """Return the first-order meta-gradient, summed over the T tasks by their `weights` `[T]`.

    The fast weights are `start - rate * gradient_sum` with the inner gradients held constant, which is what
    "first order" means. So the chain rule gives the query gradient itself for the start, and
    `-gradient_sum * query gradient` for the rate, summed over the weights that share it.
    """
    before = None
    for adapted in adapt(support_losses, start, rates, steps, len(weights)):
        before = adapted.support_losses if before is None else before
    losses, gradients = task_gradients(query_losses, adapted.fast)
    return MetaGradient(
        start={name: weighted_sum(gradient, weights) for name, gradient in gradients.items()},
        rates={
            name: -weighted_sum(gradients[name] * total, weights).sum_to_size(rates[name].shape)
            for name, total in adapted.gradient_sum.items()
        },
        support_losses=before,
        query_losses=losses,
    )
