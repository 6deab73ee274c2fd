"""A label's probability among the labels that it competes with, and the losses that follow from it.

A label is written token by token, and at each one competes with the labels that begin as it does: its probability is
the product of these choices (as in GENRE's constrained decoding, De Cao et al. 2021, arXiv 2010.00904), and those of
all labels sum to 1. So nothing is spent on learning that a label comes at all, and a label's length does not decide.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

IGNORE = -100

Label = Sequence[int]
"""Its tokens."""


def compete(labels: Sequence[Label]) -> bool:
    """Return whether labels can be told apart token by token: none is the beginning of another."""
    ordered = sorted(map(tuple, labels))  # a beginning stands right before what begins so
    return all(b[: len(a)] != a for a, b in pairwise(ordered))


def rivals(label: Label, labels: Sequence[Label]) -> list[list[int]]:
    """Return for each token of a label the tokens that labels with the same beginning go on with, itself among them."""
    label = list(label)
    found = []
    for place, token in enumerate(label):
        alike = [other for other in labels if list(other[:place]) == label[:place] and len(other) > place]
        found.append(sorted({token, *(other[place] for other in alike)}))
    return found


def token_losses(
    logits: Tensor, targets: Tensor, choices: Tensor | None, smoothing: float = 0.0, rows: Tensor | None = None
) -> Tensor:
    """Return `[M]` in fp32: minus the log-probability of each target among its choices.

    Args:
        logits: `[N, V]`, of the whole vocabulary.
        targets: `[M]`.
        choices: `[M, S]`, each target's own and its rivals, filled up with IGNORE; None, or a row of IGNORE, stands for
            the whole vocabulary.
        smoothing: share of the target's weight that is spread evenly over the choices.
        rows: `[M]`, the place of each target's logits; as they stand, if None.
    """
    if rows is None:
        rows = torch.arange(len(targets), device=targets.device)
    if choices is None:
        return _among_all(logits, targets, smoothing, rows)
    few = (choices != IGNORE).any(1)
    if few.all():
        return _among(logits, targets, choices, smoothing, rows)
    losses = torch.zeros(len(targets), device=logits.device)
    losses[few] = _among(logits, targets[few], choices[few], smoothing, rows[few])
    losses[~few] = _among_all(logits, targets[~few], smoothing, rows[~few])
    return losses


def _among_all(logits: Tensor, targets: Tensor, smoothing: float, rows: Tensor) -> Tensor:
    every = logits.float()
    losses = every.logsumexp(-1)[rows] - (1 - smoothing) * every[rows, targets]
    return losses - smoothing * every.mean(-1)[rows] if smoothing else losses


def _among(logits: Tensor, targets: Tensor, choices: Tensor, smoothing: float, rows: Tensor) -> Tensor:
    possible = choices != IGNORE
    found = logits[rows.unsqueeze(1), choices.clamp(min=0)].float()
    log_probs = found.masked_fill(~possible, -torch.inf).log_softmax(-1)
    chosen = log_probs[choices == targets.unsqueeze(1)]  # one in every row
    if not smoothing:
        return -chosen
    spread = log_probs.masked_fill(~possible, 0).sum(1) / possible.sum(1)
    return -(1 - smoothing) * chosen - smoothing * spread
