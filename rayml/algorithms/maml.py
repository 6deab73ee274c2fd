"""MAML with its exact, second-order gradient (Finn et al. 2017, arXiv 1703.03400), for T tasks at once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rayml.algorithms.base import Algorithm, Side, Turn
from rayml.algorithms.fomaml import adapt_then_query
from rayml.algorithms.inner_loop import InnerLoop, Params, TaskLosses
from rayml.algorithms.meta_gradient import MetaGradient

if TYPE_CHECKING:
    from rayml.config import Config


class Maml(Algorithm):
    """The gradient of the query's loss after adapting, through every inner step."""

    second_order = True

    learn_rates: bool = False
    """Learn an inner rate for each adapter tensor, too."""

    @property
    def learned_rates(self) -> Literal["none", "tensor", "weight"]:
        return "tensor" if self.learn_rates else "none"

    def refuses(self, config: "Config") -> Iterator[str]:
        yield from super().refuses(config)
        if config.engine == "zero":
            yield "algorithm.name: maml differentiates twice, which ZeRO-3's gathers do not survive; use engine=local"
        if config.model.attention == "sdpa":
            yield "model.attention: maml differentiates twice, which fused kernels do not; use model.attention=eager"
        if config.model.activation_checkpointing:
            yield "model.activation_checkpointing: maml keeps the whole inner loop; it does not go with it"
        if config.regularize.adversarial:
            yield "regularize.adversarial: maml's inner loop knows none"
        if config.inner.unfreeze_every:
            yield "inner.unfreeze_every: maml unfreezes nothing gradually"

    def turns(self, steps: int) -> list[Turn]:
        return adapt_then_query(steps)

    def meta_gradient(
        self, support: Side, query: Side, start: Params, inner: InnerLoop, weights: Tensor
    ) -> MetaGradient:
        return exact(self.support_losses(support), self.query_losses(support, query), start, inner, weights)


def exact(
    support_losses: TaskLosses, query_losses: TaskLosses, start: Params, inner: InnerLoop, weights: Tensor
) -> MetaGradient:
    """Return the gradient of the query losses after adapting, for the start and for the rates, summed by `weights`.

    The graph of all inner steps is kept, so memory grows with them. The losses must have a second derivative: fused
    attention kernels have none.
    """
    leaves, scales = (
        {name: value.detach().requires_grad_() for name, value in p.items()} for p in (start, inner.inner_lrs)
    )
    fast = {name: weight.expand(len(weights), *weight.shape) for name, weight in leaves.items()}
    before = None
    for _ in range(inner.steps):
        losses = support_losses(fast)
        gradients = torch.autograd.grad(losses.sum(), [fast[name] for name in scales], create_graph=True)
        fast = fast | {name: fast[name] - scales[name] * g for name, g in zip(scales, gradients, strict=True)}
        before = losses.detach() if before is None else before
    inner.ended()
    after = query_losses(fast)
    total = (after * weights.to(after)).sum()
    wanted = [*leaves.values(), *(scales.values() if inner.learns_inner_lrs else ())]
    found = torch.autograd.grad(total, wanted, materialize_grads=True)
    return MetaGradient(
        start=dict(zip(leaves, found[: len(leaves)], strict=True)),
        inner_lrs=dict(zip(scales, found[len(leaves) :], strict=inner.learns_inner_lrs)),
        support_losses=before,
        query_losses=after.detach(),
    )
