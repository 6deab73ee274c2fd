"""Losses of targets among their choices: a label's rivals, or the whole vocabulary."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rayml.lm.label_trie import IGNORE

MOST_LOGITS = 1 << 26
"""At a time, of free text: 256 MiB in float32. More are computed in parts, and anew in the backward."""


class Among(NamedTuple):
    """Which of M targets are chosen among some tokens, and which among the whole vocabulary: their numbers."""

    some: Tensor
    all: Tensor


def among(allowed: Tensor | None, targets: int) -> Among:
    """Return it of what M targets are chosen among, as `token_losses` takes it. On a GPU it waits for the device."""
    has_some = torch.zeros(targets, dtype=torch.bool) if allowed is None else (allowed != IGNORE).any(1)
    return Among(has_some.nonzero().squeeze(1), (~has_some).nonzero().squeeze(1))


class Choices(NamedTuple):
    """What M targets are chosen among, for logits of `tokens` alone: their columns, or the whole vocabulary."""

    tokens: Tensor | None
    """`[U]`, of the vocabulary; None for all of it."""
    targets: Tensor
    """`[M]`"""
    allowed: Tensor | None
    """`[M, S]`, as `token_losses` takes it."""


def choices(targets: Tensor, allowed: Tensor | None) -> Choices:
    """Return the choices of M targets; the whole vocabulary, where one is chosen among that. On a GPU it waits."""
    if allowed is None or not (allowed != IGNORE).any(1).all():
        return Choices(None, targets, allowed)
    tokens = allowed[allowed != IGNORE].unique()
    columns = torch.searchsorted(tokens, allowed.clamp(min=0)).masked_fill(allowed == IGNORE, IGNORE)
    return Choices(tokens, torch.searchsorted(tokens, targets), columns)


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
