"""From T encoded episodes to what an algorithm differentiates: their support and query losses under given weights."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rayml.config import Config
from rayml.lm.adversarial import adversarial
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.depth import thawing
from rayml.lm.encode import decode_rows
from rayml.lm.model import TaskLM
from rayml.meta.adapt import Params, TaskLosses
from rayml.meta.protonet import prototype_losses

SIDES = "support", "query"


def inner_losses(
    lm: TaskLM, batch: TaskBatch, unfreeze_every: int, smoothing: float = 0.0, epsilon: float = 0.0
) -> TaskLosses:
    """Return what one inner loop descends, from weights to `[T]`.

    Args:
        unfreeze_every: steps after which one more layer learns (`rayml.lm.depth`); 0, and all do.
        smoothing: of the labels, in meta-training.
        epsilon: of the adversarial step, in meta-training.
    """
    losses: TaskLosses = partial(lm.losses, batch=batch, smoothing=smoothing)
    if epsilon:
        losses = adversarial(losses, lm, batch, epsilon)
    return thawing(losses, lm.module, unfreeze_every) if unfreeze_every else losses


def task_losses(
    lm: TaskLM, episodes: Sequence[dict[str, Any]], pad: int, config: Config
) -> tuple[TaskLosses, TaskLosses]:
    """Return the support and the query losses of episodes that `Encoder.episode` made, each from weights to `[T]`.

    For protonet, queries are scored by the classes' prototypes, and not by the label tokens.
    """
    prototypes, regularize = config.algorithm.name == "protonet", config.regularize
    packs = lm.packs and not prototypes
    support = side_batch(episodes, "support", pad, packs and not regularize.adversarial).to(lm.device)
    query = side_batch(episodes, "query", pad, packs).to(lm.device)
    smoothing = regularize.label_smoothing
    inner = inner_losses(lm, support, config.inner.unfreeze_every, smoothing, regularize.adversarial)
    if not prototypes:
        return inner, partial(lm.losses, batch=query, smoothing=smoothing)
    kinds = [class_grid([episode[side]["classes"] for episode in episodes]).to(lm.device) for side in SIDES]

    def by_prototypes(weights: Params) -> Tensor:
        return prototype_losses(lm.states(weights, support), kinds[0], lm.states(weights, query), kinds[1])

    return inner, by_prototypes


def side_batch(episodes: Sequence[dict[str, Any]], side: str, pad: int, packs: bool = False) -> TaskBatch:
    rows = [decode_rows(episode[side]) for episode in episodes]
    return collate(rows, pad, [episode["labels"] for episode in episodes], packs)


def class_grid(classes: Sequence[Sequence[int]]) -> Tensor:
    """Return the class of every row of T tasks, `[T, K]`, -1 for rows of padding."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for c in classes], batch_first=True, padding_value=-1)
