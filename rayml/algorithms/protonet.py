"""Prototypical networks (Snell et al. 2017, arXiv 1703.05175), for T tasks at once: no inner loop at all.

A query is of the class whose mean hidden state, before the label, is nearest.
"""

import torch
from torch import Tensor, nn

from rayml.algorithms.base import Algorithm, Asked, Side, Turn
from rayml.algorithms.inner_loop import Params, TaskLosses

SHARPNESS = 10.0
"""Logits are minus this much times the squared distance of unit vectors."""


class ProtoNet(Algorithm):
    takes_steps = False
    keeps = "states"
    labels_only = True
    by_tokens = False

    def turns(self, steps: int) -> list[Turn]:
        return [Turn("query", 1.0)]

    def query_losses(self, support: Side, query: Side) -> TaskLosses:
        def losses(weights: Params) -> Tensor:
            states = support.states(weights), query.states(weights)
            return prototype_losses(states[0], support.classes, states[1], query.classes)

        return losses

    def answer(self, asked: Asked, weights: Params | None) -> list[Tensor]:
        ways = max(options for _, options in asked.shape)
        logits = prototype_logits(asked.support_states(weights), asked.support_classes, asked.states(weights), ways)
        return [of[:q, :c].log_softmax(-1) for of, (q, c) in zip(logits, asked.shape, strict=True)]


def prototype_logits(support: Tensor, classes: Tensor, query: Tensor, ways: int) -> Tensor:
    """Return `[T, Q, C]` logits: how near each query is to the mean of each class's support.

    Args:
        support: `[T, K, D]`, one vector an example.
        classes: `[T, K]`, from 0 to C - 1, or -1 for rows of padding.
        query: `[T, Q, D]`.
        ways: C. A class without support gets minus infinity.
    """
    support, query = nn.functional.normalize(support, dim=-1), nn.functional.normalize(query, dim=-1)
    members = nn.functional.one_hot(classes + 1, ways + 1)[..., 1:].to(support)  # [T, K, C]
    counts = members.sum(1)  # [T, C]
    prototypes = members.mT @ support / counts.clamp(min=1).unsqueeze(-1)  # [T, C, D]
    distances = (query.unsqueeze(2) - prototypes.unsqueeze(1)).square().sum(-1)
    return (-SHARPNESS * distances).masked_fill((counts == 0).unsqueeze(1), -torch.inf)


def prototype_losses(support: Tensor, support_classes: Tensor, query: Tensor, query_classes: Tensor) -> Tensor:
    """Return each task's mean loss over its queries, `[T]`; classes are -1 for padding, which does not count."""
    ways = int(torch.maximum(support_classes.max(), query_classes.max())) + 1
    logits = prototype_logits(support, support_classes, query, ways)
    losses = nn.functional.cross_entropy(logits.mT, query_classes, ignore_index=-1, reduction="none")  # [T, Q]
    return losses.sum(1) / (query_classes >= 0).sum(1)
