"""One task's rows, spread over the workers, such that the mean of the workers' gradients is the task's own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rayml.lm.batch import TaskBatch
from rayml.lm.label_trie import IGNORE, token_losses
from rayml.lm.model import TaskLM
from rayml.training import collective


class Share(NamedTuple):
    """A worker's rows of one task."""

    batch: TaskBatch
    scale: Tensor
    """`[rows]`, on the sum of each row's token losses: workers / the number that its side's loss is a mean over, by the
    side's part in the loss; 0 for a row that stands in."""


def share_of(sides: Sequence[tuple[TaskBatch, float]]) -> Share:
    """Return this worker's rows of some sides of a task, each with its part in the loss: i, i + W, ... of W workers.

    Sharded engines average gradients over the workers, whatever number of targets each of them has. So every row's sum
    is scaled by W / its side's number of them. A worker without a row takes the first with a scale of 0: all must make
    the same calls.
    """
    for batch, _ in sides:
        if batch.tasks != 1:
            raise ValueError(
                f"mode full adapts to one task at a time, got {batch.tasks}: workers' gradients are averaged"
            )
    workers, rank = collective.world_size(), collective.rank()
    whole = joined([batch for batch, _ in sides])
    scales = [torch.full((len(b.tokens),), workers * part / int(b.counted().sum())) for b, part in sides]
    scale = torch.cat(scales).to(whole.tokens.device)
    if rank < len(whole.tokens):
        own = slice(rank, None, workers)
        return Share(whole.take(own), scale[own])
    return Share(whole.take(slice(0, 1)), torch.zeros_like(scale[:1]))


def share_loss(lm: TaskLM, share: Share, smoothing: float = 0.0) -> Tensor:
    """Return this worker's part of the loss; the mean over the workers is the task's own (`TaskLM.losses`)."""
    batch = share.batch
    logits, positions = lm.target_logits(None, batch)
    losses = token_losses(logits, batch.scored.targets, batch.allowed, smoothing, known=batch.scored.among)
    return (share.scale[positions // batch.tokens.shape[1]] * losses).sum()


def joined(sides: Sequence[TaskBatch]) -> TaskBatch:
    """Return the rows of some sides of one episode as one batch."""
    if len(sides) == 1:
        return sides[0]
    length = max(side.tokens.shape[1] for side in sides)
    tokens, targets = (
        torch.cat([pad(part, (0, length - part.shape[1]), value=fill) for part in parts])
        for parts, fill in (([side.tokens for side in sides], 0), ([side.targets for side in sides], IGNORE))
    )
    return TaskBatch(tokens, targets, 1, joined_choices(sides))


def joined_choices(sides: Sequence[TaskBatch]) -> Tensor | None:
    allowed = [side.allowed for side in sides if side.allowed is not None]
    if not allowed:
        return None
    most = max(some.shape[1] for some in allowed)
    return torch.cat([pad(some, (0, most - some.shape[1]), value=IGNORE) for some in allowed])
