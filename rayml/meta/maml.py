"""MAML with its exact, second-order gradient (Finn et al. 2017, arXiv 1703.03400), for T tasks at once."""

import torch
from torch import Tensor

from rayml.meta.adapt import Params, TaskLosses
from rayml.meta.gradient import MetaGradient


def maml(
    support_losses: TaskLosses, query_losses: TaskLosses, start: Params, rates: Params, steps: int, weights: Tensor
) -> MetaGradient:
    """Return the gradient of the query losses after adapting, through every inner step, summed by `weights` `[T]`.

    The graph of all inner steps is kept, so memory grows with them. The losses must have a second derivative: fused
    attention kernels have none.
    """
    leaves, scales = ({name: value.detach().requires_grad_() for name, value in p.items()} for p in (start, rates))
    fast = {name: weight.expand(len(weights), *weight.shape) for name, weight in leaves.items()}
    before = None
    for _ in range(steps):
        losses = support_losses(fast)
        gradients = torch.autograd.grad(losses.sum(), [fast[name] for name in scales], create_graph=True)
        fast = fast | {name: fast[name] - scales[name] * g for name, g in zip(scales, gradients, strict=True)}
        before = losses.detach() if before is None else before
    after = query_losses(fast)
    total = (after * weights.to(after)).sum()
    found = torch.autograd.grad(total, [*leaves.values(), *scales.values()], materialize_grads=True)
    return MetaGradient(
        start=dict(zip(leaves, found[: len(leaves)], strict=True)),
        rates=dict(zip(scales, found[len(leaves) :], strict=True)),
        support_losses=before,
        query_losses=after.detach(),
    )
