"""First-order MAML (Finn et al. 2017, arXiv 1703.03400, section 5.2), for T tasks at once.

With a rate for each weight this is first-order Meta-SGD (Li et al. 2017, arXiv 1707.09835).
"""

from torch import Tensor

from rayml.meta.adapt import Params, TaskLosses, adapt, task_gradients
from rayml.meta.gradient import MetaGradient, weighted_sum


def fomaml(
    support_losses: TaskLosses,
    query_losses: TaskLosses,
    start: Params,
    rates: Params,
    steps: int,
    weights: Tensor,
    start_weight: float = 0.0,
) -> MetaGradient:
    """Return the first-order meta-gradient, summed over the T tasks by their `weights` `[T]`.

    The fast weights are `start - rate * gradient_sum` with the inner gradients held constant, which is what
    "first order" means. So the chain rule gives the query gradient itself for the start, and
    `-gradient_sum * query gradient` for the rate, summed over the weights that share it.

    Args:
        start_weight: of the support loss at the start, which is learned beside the query loss after adapting: the
            start then stays a good model as it stands. Its gradient is that of the first inner step, so it is free.
            (The first of the losses along the inner loop that MAML++ adds up, Antoniou et al. 2019, arXiv 1810.09502;
            those are on the query.) What the inner loop does not change has none.
    """
    before, first = None, {}
    for step, adapted in enumerate(adapt(support_losses, start, rates, steps, len(weights))):
        if step == 1:
            before, first = adapted.support_losses, adapted.gradient_sum
    losses, gradients = task_gradients(query_losses, adapted.fast)
    both = {name: gradient + start_weight * first.get(name, 0) for name, gradient in gradients.items()}
    return MetaGradient(
        start={name: weighted_sum(gradient, weights) for name, gradient in both.items()},
        rates={
            name: -weighted_sum(gradients[name] * total, weights).sum_to_size(rates[name].shape)
            for name, total in adapted.gradient_sum.items()
        },
        support_losses=before,
        query_losses=losses,
    )
