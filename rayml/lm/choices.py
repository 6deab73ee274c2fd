"""A label's probability among the labels that it competes with, and the losses that follow from it.

A label is written token by token, and at each one competes with the labels that begin as it does: its probability is
the product of these choices (as in GENRE's constrained decoding, De Cao et al. 2021, arXiv 2010.00904), and those of
all labels sum to 1. So nothing is spent on learning that a label comes at all, and a label's length does not decide.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn

IGNORE = -100

Label = Sequence[int]
"""Its tokens."""


def compete(labels: Sequence[Label]) -> bool:
    """Return whether labels can be told apart token by token: none is the beginning of another."""
    return competition(labels).tells_apart


def competition(labels: Sequence[Label]) -> "Competition":
    """Return the competition of labels, built once: all queries of a task, and both sides of an episode, have it."""
    return _competition(tuple(map(tuple, labels)))


class Competition:
    """Labels that compete: for every beginning, the tokens that some of them go on with."""

    def __init__(self, labels: Sequence[Label]):
        self.following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for label in map(tuple, labels):
            for place, token in enumerate(label):
                self.following[label[:place]].add(token)
        ordered = sorted(map(tuple, labels))  # a beginning stands right before what begins so
        self.tells_apart = all(b[: len(a)] != a for a, b in pairwise(ordered))
        self._choices: dict[tuple[int, ...], list[list[int]]] = {}

    def choices(self, label: Label) -> list[list[int]]:
        """Return for each token of a label what it is chosen among, up to the last that has a rival.

        What follows that is certain, and need not be run. There is always a first.
        """
        label = tuple(label)
        if label not in self._choices:
            self._choices[label] = self._among(label)
        return self._choices[label]

    def _among(self, label: tuple[int, ...]) -> list[list[int]]:
        found = [sorted(self.following.get(label[:place], set()) | {token}) for place, token in enumerate(label)]
        last = max((place for place, among in enumerate(found) if len(among) > 1), default=0)
        return found[: last + 1]


@lru_cache(maxsize=1024)
def _competition(labels: tuple[tuple[int, ...], ...]) -> Competition:
    return Competition(labels)


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
    few = torch.zeros_like(targets, dtype=torch.bool) if choices is None else (choices != IGNORE).any(1)
    if choices is not None and few.all():
        return _among(logits, targets, choices, smoothing, rows)
    if choices is None or not few.any():
        return _among_all(logits, targets, smoothing, rows)
    own = torch.arange(len(targets), device=targets.device) if rows is None else rows
    losses = torch.zeros(len(targets), device=logits.device)
    losses[few] = _among(logits, targets[few], choices[few], smoothing, own[few])
    losses[~few] = _among_all(logits, targets[~few], smoothing, own[~few])
    return losses


def _among_all(logits: Tensor, targets: Tensor, smoothing: float, rows: Tensor | None) -> Tensor:
    if rows is not None:
        logits = logits[rows]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)


def _among(logits: Tensor, targets: Tensor, choices: Tensor, smoothing: float, rows: Tensor | None) -> Tensor:
    possible, ids = choices != IGNORE, choices.clamp(min=0)
    found = (logits.gather(1, ids) if rows is None else logits[rows.unsqueeze(1), ids]).float()
    log_probs = found.masked_fill(~possible, -torch.inf).log_softmax(-1)
    chosen = log_probs.gather(1, (choices == targets.unsqueeze(1)).int().argmax(1, keepdim=True)).squeeze(1)
    if not smoothing:
        return -chosen
    spread = log_probs.masked_fill(~possible, 0).sum(1) / possible.sum(1)
    return -(1 - smoothing) * chosen - smoothing * spread
