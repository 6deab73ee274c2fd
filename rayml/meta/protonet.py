"""Prototypical networks (Snell et al. 2017, arXiv 1703.05175), for T tasks at once: no inner loop at all."""

import torch
from torch import Tensor, nn

SHARPNESS = 10.0
"""Logits are minus this much times the squared distance of unit vectors."""


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
