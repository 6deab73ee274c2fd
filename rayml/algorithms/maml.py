"""MAML with its exact, second-order gradient (Finn et al. 2017, arXiv 1703.03400), for T tasks at once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rayml.algorithms.base import Algorithm, Minibatch, Side
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

    def conflicts(self, config: "Config") -> Iterator[str]:
        yield from super().conflicts(config)
        if config.engine == "zero":
            yield "algorithm.name: maml differentiates twice, which ZeRO-3 does not support; use engine=local"
        if config.model.attention == "sdpa":
            yield "model.attention: maml differentiates twice, which fused kernels cannot; use model.attention=eager"
        if config.model.activation_checkpointing:
            yield "model.activation_checkpointing: maml keeps the graph of the whole inner loop, so it cannot use it"
        if config.regularize.adversarial:
            yield "regularize.adversarial: maml's inner loop does not have it"
        if config.inner.unfreeze_every:
            yield "inner.unfreeze_every: maml cannot unfreeze layers gradually"

    def minibatches(self, steps: int) -> list[Minibatch]:
        return adapt_then_query(steps)

    def meta_gradient(
        self, support: Side, query: Side, start: Params, inner: InnerLoop, weights: Tensor
    ) -> MetaGradient:
        return exact(self.support_losses(support), self.query_losses(support, query), start, inner, weights)


def exact(
    support_losses: TaskLosses, query_losses: TaskLosses, start: Params, inner: InnerLoop, weights: Tensor
) -> MetaGradient:
    """Return the gradient of the query losses after adapting, for the start and for the rates, summed by `weights`.

    It keeps the graph of all inner steps, so memory grows with their number. The losses must have a second derivative,
    which fused attention kernels lack.
    """
    leaves = {name: weight.detach().requires_grad_() for name, weight in start.items()}
    rates = {name: rate.detach().requires_grad_() for name, rate in inner.inner_lrs.items()}
    fast = {name: weight.expand(len(weights), *weight.shape) for name, weight in leaves.items()}
    losses_before = None
    for _ in range(inner.steps):
        losses = support_losses(fast)
        gradients = torch.autograd.grad(losses.sum(), [fast[name] for name in rates], create_graph=True)
        fast = fast | {name: fast[name] - rates[name] * g for name, g in zip(rates, gradients, strict=True)}
        losses_before = losses.detach() if losses_before is None else losses_before
    inner.after_steps()
    losses_after = query_losses(fast)
    total = (losses_after * weights.to(losses_after)).sum()
    inputs = [*leaves.values(), *(rates.values() if inner.learns_inner_lrs else ())]
    meta_gradients = torch.autograd.grad(total, inputs, materialize_grads=True)
    return MetaGradient(
        start=dict(zip(leaves, meta_gradients[: len(leaves)], strict=True)),
        inner_lrs=dict(zip(rates, meta_gradients[len(leaves) :], strict=inner.learns_inner_lrs)),
        support_losses=losses_before,
        query_losses=losses_after.detach(),
    )
