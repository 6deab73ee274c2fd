"""One task's rows, spread over the workers, such that the mean of the workers' gradients is the task's own."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rayml.engine import collective
from rayml.lm.batch import TaskBatch
from rayml.lm.choices import IGNORE, token_losses
from rayml.lm.model import TaskLM


class Share(NamedTuple):
    """A worker's rows of one task."""

    batch: TaskBatch
    scale: float
    """On the sum of the rows' token losses: workers / the number that the task's loss is a mean over; 0 for a
    row that stands in."""


def share_of(batch: TaskBatch) -> Share:
    """Return this worker's rows: i, i + W, ... of W workers.

    Sharded engines average gradients over the workers, whatever number of targets each of them has. So every worker's
    sum is scaled by W / the task's number of them. A worker without a row takes the first with a scale of 0: all
    must make the same calls.
    """
    if batch.tasks != 1:
        raise ValueError(f"mode full adapts to one task at a time, got {batch.tasks}: workers' gradients are averaged")
    workers, rank = collective.world_size(), collective.rank()
    own = slice(rank, None, workers) if rank < len(batch.tokens) else slice(0, 1)
    scale = workers / int(batch.counted().sum()) if rank < len(batch.tokens) else 0.0
    return Share(batch.take(own), scale)


def share_loss(lm: TaskLM, share: Share, smoothing: float = 0.0) -> Tensor:
    """Return this worker's part of the loss; the mean over the workers is the task's own (`TaskLM.losses`)."""
    batch = share.batch
    logits, positions = lm.target_logits(None, batch)
    return share.scale * token_losses(logits, batch.targets.flatten()[positions], batch.choices, smoothing).sum()


def join(support: TaskBatch, query: TaskBatch) -> TaskBatch:
    """Return the rows of both sides of one episode as one batch."""
    length = max(support.tokens.shape[1], query.tokens.shape[1])
    tokens, targets = (
        torch.cat([pad(part, (0, length - part.shape[1]), value=fill) for part in parts])
        for parts, fill in (((support.tokens, query.tokens), 0), ((support.targets, query.targets), IGNORE))
    )
    return TaskBatch(tokens, targets, 1, joined_choices(support, query))


def joined_choices(support: TaskBatch, query: TaskBatch) -> Tensor | None:
    sides = [side.choices for side in (support, query) if side.choices is not None]
    if not sides:
        return None
    most = max(side.shape[1] for side in sides)
    return torch.cat([pad(side, (0, most - side.shape[1]), value=IGNORE) for side in sides])
