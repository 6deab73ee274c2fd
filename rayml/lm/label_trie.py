"""A label's probability among the labels that it competes with, and the losses that follow from it.

A label is written token by token, and at each one competes with the labels that begin as it does: its probability is
the product of these choices (as in GENRE's constrained decoding, De Cao et al. 2021, arXiv 2010.00904), and those of
all labels sum to 1. So nothing is spent on learning that a label comes at all, and a label's length does not decide.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

IGNORE = -100

Label = Sequence[int]
"""Its tokens."""


def can_tell_apart(labels: Sequence[Label]) -> bool:
    """Return whether labels can be told apart token by token: none is the beginning of another."""
    return label_trie(labels).tells_apart


def label_trie(labels: Sequence[Label]) -> "LabelTrie":
    """Return the trie of labels, built once: all queries of a task, and both sides of an episode, have it."""
    return _label_trie(tuple(map(tuple, labels)))


class LabelTrie:
    """A trie of labels: for every prefix, the tokens that some of them go on with."""

    def __init__(self, labels: Sequence[Label]):
        self.following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for label in map(tuple, labels):
            for position, token in enumerate(label):
                self.following[label[:position]].add(token)
        ordered = sorted(map(tuple, labels))  # a beginning stands right before what begins so
        self.tells_apart = all(b[: len(a)] != a for a, b in pairwise(ordered))
        self._allowed: dict[tuple[int, ...], list[list[int]]] = {}

    def allowed(self, label: Label) -> list[list[int]]:
        """Return for each token of a label what it is chosen among, up to the last that has a rival.

        What follows that is certain, and need not be run. There is always a first.
        """
        label = tuple(label)
        if label not in self._allowed:
            self._allowed[label] = self._among(label)
        return self._allowed[label]

    def _among(self, label: tuple[int, ...]) -> list[list[int]]:
        found = [sorted(self.following.get(label[:position], set()) | {token}) for position, token in enumerate(label)]
        last = max((position for position, among in enumerate(found) if len(among) > 1), default=0)
        return found[: last + 1]


@lru_cache(maxsize=1024)
def _label_trie(labels: tuple[tuple[int, ...], ...]) -> LabelTrie:
    return LabelTrie(labels)


class Among(NamedTuple):
    """Which of M targets are chosen among some tokens, and which among the whole vocabulary: their numbers."""

    some: Tensor
    all: Tensor


def among(allowed: Tensor | None, targets: int) -> Among:
    """Return it of what M targets are chosen among, as `token_losses` takes it. On a GPU it waits for the device."""
    has_some = torch.zeros(targets, dtype=torch.bool) if allowed is None else (allowed != IGNORE).any(1)
    return Among(has_some.nonzero().squeeze(1), (~has_some).nonzero().squeeze(1))


def token_losses(
    logits: Tensor,
    targets: Tensor,
    allowed: Tensor | None,
    smoothing: float = 0.0,
    rows: Tensor | None = None,
    known: Among | None = None,
) -> Tensor:
    """Return `[M]` in fp32: minus the log-probability of each target among its choices.

    Args:
        logits: `[N, V]`, of the whole vocabulary.
        targets: `[M]`.
        allowed: `[M, S]`, each target's own and its rivals, filled up with IGNORE; None, or a row of IGNORE, stands for
            the whole vocabulary.
        smoothing: share of the target's weight that is spread evenly over the choices.
        rows: `[M]`, the row of each target's logits; as they stand, if None.
        known: what `among` returns; found here, if None.
    """
    some, all_ = known or among(allowed, len(targets))
    if allowed is None or not len(some):
        return _among_all(logits, targets, smoothing, rows)
    if not len(all_):
        return _among(logits, targets, allowed, smoothing, rows)
    own = torch.arange(len(targets), device=targets.device) if rows is None else rows
    losses = torch.zeros(len(targets), device=logits.device)
    losses[some] = _among(logits, targets[some], allowed[some], smoothing, own[some])
    losses[all_] = _among_all(logits, targets[all_], smoothing, own[all_])
    return losses


def _among_all(logits: Tensor, targets: Tensor, smoothing: float, rows: Tensor | None) -> Tensor:
    if rows is not None:
        logits = logits[rows]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)


def _among(logits: Tensor, targets: Tensor, allowed: Tensor, smoothing: float, rows: Tensor | None) -> Tensor:
    possible, ids = allowed != IGNORE, allowed.clamp(min=0)
    found = (logits.gather(1, ids) if rows is None else logits[rows.unsqueeze(1), ids]).float()
    log_probs = found.masked_fill(~possible, -torch.inf).log_softmax(-1)
    chosen = log_probs.gather(1, (allowed == targets.unsqueeze(1)).int().argmax(1, keepdim=True)).squeeze(1)
    if not smoothing:
        return -chosen
    uniform = log_probs.masked_fill(~possible, 0).sum(1) / possible.sum(1)
    return -(1 - smoothing) * chosen - smoothing * uniform
