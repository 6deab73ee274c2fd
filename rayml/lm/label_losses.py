"""Losses of targets over their choices: the tokens that compete with a label's, or the whole vocabulary."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rayml.lm.label_trie import IGNORE

MOST_LOGITS = 1 << 26
"""Logits of free text in memory at a time: 256 MiB in float32. More are computed in chunks, again in the backward."""


class Among(NamedTuple):
    """The indices of the targets, of M, that are chosen among some tokens, and among all of the vocabulary."""

    some: Tensor
    all: Tensor


def among(allowed: Tensor | None, targets: int) -> Among:
    """Split M targets by whether they have choices in `allowed`, `[M, S]`. On a GPU this waits for the device."""
    has_some = torch.zeros(targets, dtype=torch.bool) if allowed is None else (allowed != IGNORE).any(1)
    return Among(has_some.nonzero().squeeze(1), (~has_some).nonzero().squeeze(1))


class Choices(NamedTuple):
    """M targets and their choices, renumbered as columns of logits that are computed for `tokens` alone."""

    tokens: Tensor | None
    """`[U]`: the tokens that have a column; None for the whole vocabulary, without renumbering."""
    targets: Tensor
    """`[M]`"""
    allowed: Tensor | None
    """`[M, S]`, as `token_losses` takes it."""


def choices(targets: Tensor, allowed: Tensor | None) -> Choices:
    """Return the choices of M targets; if a target is chosen among the whole vocabulary, all tokens have a column.

    On a GPU this waits for the device.
    """
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
        allowed: `[M, S]`, the choices of each target, which include it, padded with IGNORE; None, or a row of IGNORE,
            stands for the whole vocabulary.
        smoothing: share of the target's weight that is spread evenly over the choices.
        rows: `[M]`, the row of each target's logits; None for one row each, in order.
        known: the result of `among`, if it was computed before.
    """
    some, all_ = known or among(allowed, len(targets))
    if allowed is None or not len(some):
        return _vocabulary_losses(logits, targets, smoothing, rows)
    if not len(all_):
        return _choice_losses(logits, targets, allowed, smoothing, rows)
    rows = torch.arange(len(targets), device=targets.device) if rows is None else rows
    losses = torch.zeros(len(targets), device=logits.device)
    losses[some] = _choice_losses(logits, targets[some], allowed[some], smoothing, rows[some])
    losses[all_] = _vocabulary_losses(logits, targets[all_], smoothing, rows[all_])
    return losses


def _vocabulary_losses(logits: Tensor, targets: Tensor, smoothing: float, rows: Tensor | None) -> Tensor:
    if rows is not None:
        logits = logits[rows]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)


def _choice_losses(logits: Tensor, targets: Tensor, allowed: Tensor, smoothing: float, rows: Tensor | None) -> Tensor:
    is_choice, ids = allowed != IGNORE, allowed.clamp(min=0)
    choice_logits = (logits.gather(1, ids) if rows is None else logits[rows.unsqueeze(1), ids]).float()
    log_probs = choice_logits.masked_fill(~is_choice, -torch.inf).log_softmax(-1)
    of_target = log_probs.gather(1, (allowed == targets.unsqueeze(1)).int().argmax(1, keepdim=True)).squeeze(1)
    if not smoothing:
        return -of_target
    mean = log_probs.masked_fill(~is_choice, 0).sum(1) / is_choice.sum(1)
    return -(1 - smoothing) * of_target - smoothing * mean
