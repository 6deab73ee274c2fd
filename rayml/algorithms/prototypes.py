"""Answers read from prototypes: how near a hidden state is to the mean of each class's examples, beside label tokens.

ProtoNet (Snell et al. 2017, arXiv 1703.05175), within an inner loop as in Proto-MAML (Triantafillou et al. 2020, arXiv
1903.03096). The logit of class c is

    -scale * |h - mean of c's examples|^2 + mix * log p(c)

h is the hidden state before the label, of unit length; p the probability of the label's first token among those of all
classes, where label tokens are read, too. Scale and mix are learned by the outer loop: logarithms of both lie in the
start, beside the adapter. Classes are as many as there are, at no cost: one forward of the prompt tells all logits.

Shapes: T tasks, K or Q examples, C classes, D the hidden size.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rayml.algorithms.inner_loop import Params, TaskLosses

SCALE, MIX, MEANS = "readout.scale", "readout.mix", "readout.means"
"""What a start, or a learned task, holds of its readout: the two logarithms `[]`, and, of a task, `[C, D]`."""
FIRST = {SCALE: math.log(10.0), MIX: math.log(0.3)}
"""Where the outer loop begins."""
Pooling = Literal["last", "mean"]


def is_readout(name: str) -> bool:
    """Return whether a tensor of a start is the readout's, and not the adapter's."""
    return name.startswith("readout.")


class Read(NamedTuple):
    """What one forward tells of K examples of each of T tasks."""

    losses: Tensor
    """`[T]`: of the label tokens, or of free text; zero where there are no targets."""
    states: Tensor
    """`[T, K, D]`, of unit length."""
    label_log_probs: Tensor | None
    """`[T, K, C]`, by the labels' first tokens."""


class Examples(Protocol):
    """The supports, or the queries, of T tasks: `rayml.algorithms.base.Side`, as far as it is needed here."""

    @property
    def classes(self) -> Tensor: ...
    @property
    def ways(self) -> int: ...
    @property
    def label_tokens(self) -> Tensor: ...
    def states(self, weights: Params, pooling: Pooling = "last") -> Tensor: ...
    def read(self, weights: Params, pooling: Pooling = "last", label_tokens: Tensor | None = None) -> Read: ...


class Asked(Protocol):
    """The queries of T learned tasks: `rayml.algorithms.base.Asked`, as far as it is needed here."""

    @property
    def shape(self) -> Sequence[tuple[int, int]]: ...
    @property
    def support_classes(self) -> Tensor: ...
    def support_states(self, weights: Params | None, pooling: Pooling = "last") -> Tensor: ...
    def read(self, weights: Params | None, pooling: Pooling = "last", labels: bool = False) -> Read: ...


class Prototypes(NamedTuple):
    means: Tensor
    """`[T, C, D]`"""
    counts: Tensor
    """`[T, C]`: the examples that each is the mean of."""


class Readout(NamedTuple):
    """How classes are read."""

    labels: bool
    """Label tokens have a say, too."""
    pooling: Pooling = "last"

    def start(self) -> Params:
        """Return what the outer loop learns of it, as it begins."""
        return {name: torch.tensor(value) for name, value in FIRST.items() if self.labels or name != MIX}

    def support_losses(self, support: Examples) -> TaskLosses:
        """Return what an inner step descends: the label tokens' loss, and that of leave-one-out prototypes.

        A class of one example has no prototype without it, so with one shot the label tokens alone teach. Free text
        has their loss alone.
        """
        is_label = (support.classes >= 0).any(1)

        def losses(weights: Params) -> Tensor:
            read = support.read(weights, self.pooling)
            found = prototypes(read.states, support.classes, support.ways)
            distances = leave_one_out(squared_distances(read.states, found), support.classes, found.counts)
            counted = found.counts.gather(1, support.classes.clamp(min=0)) > 1
            left_out = support.classes.masked_fill(~counted, -1)
            of_prototypes = class_losses(logits(distances, found.counts, weights), left_out)
            return of_prototypes + (read.losses if self.labels else read.losses.masked_fill(is_label, 0.0))

        return losses

    def query_losses(self, support: Examples, query: Examples, smoothing: float = 0.0) -> TaskLosses:
        """Return the loss of what is answered, by the support's prototypes at the same weights; of free text, its own.

        All workers of a sharded base make the same calls: one forward of each side, whatever the tasks are.
        """
        is_label = (query.classes >= 0).any(1)
        tokens = support.label_tokens if self.labels else None

        def losses(weights: Params) -> Tensor:
            found = prototypes(support.states(weights, self.pooling), support.classes, support.ways)
            read = query.read(weights, self.pooling, tokens)
            distances = squared_distances(read.states, found)
            scores = logits(distances, found.counts, weights, read.label_log_probs)
            return torch.where(is_label, class_losses(scores, query.classes, smoothing), read.losses)

        return losses

    def answer(self, asked: "Asked", weights: Params | None) -> list[Tensor]:
        """Return the log-probabilities of each query's classes, `[Q, C]` of each task."""
        ways = max(options for _, options in asked.shape)
        found = prototypes(asked.support_states(weights, self.pooling), asked.support_classes, ways)
        read = asked.read(weights, self.pooling, self.labels)
        scores = logits(squared_distances(read.states, found), found.counts, weights, read.label_log_probs)
        return [of[:q, :c].log_softmax(-1) for of, (q, c) in zip(scores, asked.shape, strict=True)]

    def kept(self, support: Examples, weights: Params) -> list[Params]:
        """Return what of each task's support its answers need: the means of its classes; nothing of free text."""
        means = prototypes(support.states(weights, self.pooling), support.classes).means
        ways = (support.classes.max(1).values + 1).tolist()
        return [{MEANS: of[:count].clone()} if count else {} for of, count in zip(means, ways, strict=True)]


def prototypes(states: Tensor, classes: Tensor, ways: int | None = None) -> Prototypes:
    """Return the mean of each class's states.

    Args:
        states: `[T, K, D]`.
        classes: `[T, K]`, from 0 to C - 1; -1 for rows of padding.
        ways: C; as many as there are, if None.
    """
    ways = max(1, int(classes.max()) + 1) if ways is None else ways
    members = (classes.unsqueeze(-1) == torch.arange(ways, device=classes.device)).to(states)  # [T, K, C]
    counts = members.sum(1)
    return Prototypes(members.mT @ states / counts.clamp(min=1).unsqueeze(-1), counts)


def squared_distances(states: Tensor, found: Prototypes) -> Tensor:
    """Return `[T, Q, C]`: `|h - mean|^2` as `|h|^2 + |mean|^2 - 2 h mean`, so that nothing is as large as Q * C * D."""
    lengths = states.square().sum(-1, keepdim=True) + found.means.square().sum(-1).unsqueeze(1)
    return lengths - 2 * states @ found.means.mT


def leave_one_out(distances: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Return the distances `[T, K, C]` of examples to the means of the *other* examples of each class.

    Without h the mean m of n examples is (n m - h) / (n - 1), which is n / (n - 1) times as far from h as m.
    """
    own = torch.arange(counts.shape[1], device=classes.device) == classes.unsqueeze(-1)
    n = counts.clamp(min=2).unsqueeze(1)
    return distances * torch.where(own, (n / (n - 1)).square(), 1.0)


def logits(distances: Tensor, counts: Tensor, weights: Params | None, label_log_probs: Tensor | None = None) -> Tensor:
    """Return the classes' logits `[T, Q, C]`, minus infinity for a class without an example, in a task that has some.

    Args:
        weights: hold the scale and the mix `[T]`; what is not there is as it begins.
        label_log_probs: `[T, Q, C]`; None where label tokens have no say.
    """
    found = -factor(weights, SCALE) * distances
    if label_log_probs is not None:
        found = found + factor(weights, MIX) * label_log_probs
    missing = (counts == 0) & (counts > 0).any(1, keepdim=True)
    return found.masked_fill(missing.unsqueeze(1), -torch.inf)


def factor(weights: Params | None, name: str) -> Tensor | float:
    """Return a positive factor, `[T, 1, 1]`, of its logarithm among the weights."""
    log = (weights or {}).get(name)
    return math.exp(FIRST[name]) if log is None else log.exp().view(-1, 1, 1)


def label_log_probs(found: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of classes by their labels' first tokens; labels that begin alike share it evenly.

    Args:
        found: the tokens' logits, `[T, Q, C]`.
        tokens: `[T, C]`; -1 where a task has no such class, which gets 0.
    """
    missing = (tokens < 0).unsqueeze(1)
    alike = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).sum(-1)
    shared = (found.float() - alike.log().unsqueeze(1)).masked_fill(missing, torch.finfo(torch.float32).min)
    return shared.log_softmax(-1).masked_fill(missing, 0.0)


def class_losses(scores: Tensor, classes: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return each task's mean loss `[T]` of logits `[T, Q, C]`; 0 for a task without a class.

    Args:
        classes: `[T, Q]`; -1 does not count.
        smoothing: share of the target's weight that is spread evenly over the classes.
    """
    log_probs = scores.log_softmax(-1)
    losses = -log_probs.gather(2, classes.clamp(min=0).unsqueeze(2)).squeeze(2)
    if smoothing:
        possible = scores > -torch.inf
        evenly = -log_probs.masked_fill(~possible, 0.0).sum(-1) / possible.sum(-1)
        losses = (1 - smoothing) * losses + smoothing * evenly
    counted = classes >= 0
    return losses.masked_fill(~counted, 0.0).sum(1) / counted.sum(1).clamp(min=1)
