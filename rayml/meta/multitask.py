"""Learning without an inner loop: multi-task learning, and what is scored as it stands."""

from torch import Tensor

from rayml.meta.adapt import Params, TaskLosses, expand, task_gradients
from rayml.meta.gradient import MetaGradient, weighted_sum


def multitask(
    support_losses: TaskLosses, query_losses: TaskLosses, start: Params, rates: Params, steps: int, weights: Tensor
) -> MetaGradient:
    """Return the gradient of the mean of both sides' losses at the start, summed by `weights` `[T]`.

    The baseline: the same examples as the others, no inner loop. `rates` and `steps` are for adapting afterwards.
    """
    fast = expand(start, len(weights))
    (support, ours), (query, theirs) = (task_gradients(losses, fast) for losses in (support_losses, query_losses))
    gradients = {name: weighted_sum((ours[name] + theirs[name]) / 2, weights) for name in start}
    return MetaGradient(gradients, {}, support, query)


def as_it_stands(
    support_losses: TaskLosses, query_losses: TaskLosses, start: Params, rates: Params, steps: int, weights: Tensor
) -> MetaGradient:
    """Return the gradient of the query losses at the start, summed by `weights` `[T]`.

    For what takes the support in by other ways than gradients, inside `query_losses`: as prototypes (`protonet`), or
    in the prompt (MetaICL, Min et al. 2022, arXiv 2110.15943).
    """
    losses, gradients = task_gradients(query_losses, expand(start, len(weights)))
    return MetaGradient({name: weighted_sum(g, weights) for name, g in gradients.items()}, {}, None, losses)
