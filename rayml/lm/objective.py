"""From T encoded episodes to what an algorithm differentiates: their support and query losses under given weights."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rayml.lm.batch import TaskBatch, collate
from rayml.lm.encode import decode_rows
from rayml.lm.model import TaskLM
from rayml.meta.adapt import Params, TaskLosses
from rayml.meta.protonet import prototype_losses

SIDES = "support", "query"


def task_losses(
    lm: TaskLM, episodes: Sequence[dict[str, Any]], pad: int, prototypes: bool, smoothing: float
) -> tuple[TaskLosses, TaskLosses]:
    """Return the support and the query losses of episodes that `Encoder.episode` made, each from weights to `[T]`.

    Args:
        prototypes: score queries by the classes' prototypes, and not by the label tokens.
        smoothing: of the labels, in meta-training.
    """
    packs = lm.packs and not prototypes
    support, query = (side_batch(episodes, side, pad, packs).to(lm.device) for side in SIDES)
    losses = [partial(lm.losses, batch=batch, smoothing=smoothing) for batch in (support, query)]
    if not prototypes:
        return losses[0], losses[1]
    kinds = [class_grid([episode[side]["classes"] for episode in episodes]).to(lm.device) for side in SIDES]

    def by_prototypes(weights: Params) -> Tensor:
        return prototype_losses(lm.states(weights, support), kinds[0], lm.states(weights, query), kinds[1])

    return losses[0], by_prototypes


def side_batch(episodes: Sequence[dict[str, Any]], side: str, pad: int, packs: bool = False) -> TaskBatch:
    rows = [decode_rows(episode[side]) for episode in episodes]
    return collate(rows, pad, [episode["labels"] for episode in episodes], packs)


def class_grid(classes: Sequence[Sequence[int]]) -> Tensor:
    """Return the class of every row of T tasks, `[T, K]`, -1 for rows of padding."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for c in classes], batch_first=True, padding_value=-1)
