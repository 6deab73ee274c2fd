"""Prototypes: a query is answered by its distance to the mean of each class's examples, and by label tokens, too.

ProtoNet (Snell et al. 2017, arXiv 1703.05175), within an inner loop as in Proto-MAML (Triantafillou et al. 2020, arXiv
1903.03096). The logit of class c is

    -scale * |h - mean of c's examples|^2 + mix * log p(c)

h is the hidden state before the label, of unit length. The second term is there if label tokens are read: p(c) is the
probability of the label's first token, among the first tokens of all labels. Scale and mix are learned by the outer
loop; the start holds their logarithms, beside the adapter. Any number of classes costs the same: one forward of the
prompt gives all logits.

A label's own text may count as examples in the mean of its class: where shots are few, the word says much about the
class (Luo et al. 2021, "Don't Miss the Labels", Findings of ACL). How many it counts as depends on how well the labels'
own texts tell the examples apart (`example_counts`).

Means know nothing of the other classes. Once a task is learned, its prototypes leave them, to tell its examples apart
(`refine`). That helps most where classes are many.

Shapes: T tasks, K or Q examples, C classes, D the hidden size.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rayml.algorithms.base import QueryBatch, Side
from rayml.algorithms.inner_loop import Params, TaskLosses

SCALE, MIX, MEANS = "readout.scale", "readout.mix", "readout.means"
"""Names of the readout's tensors: the logarithms of scale and mix `[]`, and a learned task's prototypes `[C, D]`."""
INITIAL_LOGS = {SCALE: math.log(10.0), MIX: math.log(0.3)}
"""The logarithms that the outer loop begins with."""
PRIOR_EXAMPLES, PRIOR_SHARE = 2, 0.8
"""Of examples that are nearest to their own label's text, before any was looked at (`example_counts`)."""
LEAST = 0.05
"""What counts as less of an example does not count: means of that little cannot be told from zero in their sums."""
Pooling = Literal["last", "mean"]


def is_readout(name: str) -> bool:
    """Return whether a tensor of a start belongs to the readout, and not to the adapter."""
    return name.startswith("readout.")


class Read(NamedTuple):
    """The results of one forward of K examples of each of T tasks."""

    losses: Tensor
    """`[T]`: of the label tokens, or of free text; zero where there are no targets."""
    states: Tensor
    """`[T, K, D]`, of unit length."""
    label_log_probs: Tensor | None
    """`[T, K, C]`, by the labels' first tokens."""


class Prototypes(NamedTuple):
    means: Tensor
    """`[T, C, D]`"""
    counts: Tensor
    """`[T, C]`: how many examples each is the mean of; a label's own text may count as part of one."""


class Readout(NamedTuple):
    """How classes are read."""

    labels: bool
    """Whether label tokens are read, beside the prototypes."""
    pooling: Pooling = "last"
    label_names: int = 0
    """As `Algorithm.label_names`."""
    steps: int = 0
    """As `Algorithm.prototype_steps`."""

    def start(self) -> Params:
        """Return the readout's part of an untrained start."""
        return {name: torch.tensor(log) for name, log in INITIAL_LOGS.items() if self.labels or name != MIX}

    def support_losses(self, support: Side) -> TaskLosses:
        """Return the losses that inner steps descend: those of label tokens, and of leave-one-out prototypes.

        An example must not be part of its own class's mean: it would be near it, whatever the weights. A class of one
        example has no other mean, unless its label's own text is read. So with one shot label tokens may be the only
        loss; as they are for free text. The labels' own texts are in the means, but are not classified themselves. What
        is classified by part of an example, since nothing else is left, counts as that part.
        """
        is_label = (support.classes >= 0).any(1)

        def losses(weights: Params) -> Tensor:
            read = support.read(weights, self.pooling)
            states = weighed(support, read.states)
            protos = self.means_of(support, states)
            distances = leave_one_out(states, protos, support.classes)
            others = protos.counts.gather(1, support.classes.clamp(min=0)) - 1
            classes = support.classes.masked_fill((others <= 0) | support.is_name, -1)
            scores = logits(distances, protos.counts, weights)
            prototype_losses = class_losses(scores, classes, shares=others.clamp(0.0, 1.0))
            return prototype_losses + (read.losses if self.labels else read.losses.masked_fill(is_label, 0.0))

        return losses

    def query_losses(self, support: Side, query: Side) -> TaskLosses:
        """Return the losses of the answers, by the support's prototypes at the same weights; of free text, its own.

        The forwards do not depend on the tasks, one for each side: workers of a sharded base must make the same calls.
        """
        is_label = (query.classes >= 0).any(1)
        tokens = support.label_tokens if self.labels else None

        def losses(weights: Params) -> Tensor:
            protos = self.means_of(support, weighed(support, support.states(weights, self.pooling)))
            read = query.read(weights, self.pooling, tokens)
            distances = squared_distances(read.states, protos)
            scores = logits(distances, protos.counts, weights, read.label_log_probs)
            return torch.where(is_label, class_losses(scores, query.classes, query.smoothing), read.losses)

        return losses

    def answer(self, queries: QueryBatch, weights: Params | None) -> list[Tensor]:
        """Return the log-probabilities of each query's classes, `[Q, C]` for each task."""
        ways = max(options for _, options in queries.shape)
        protos = prototypes(queries.support.states(weights, self.pooling), queries.support.classes, ways)
        read = queries.read(weights, self.pooling, self.labels)
        scores = logits(squared_distances(read.states, protos), protos.counts, weights, read.label_log_probs)
        return [
            task_scores[:count, :options].log_softmax(-1)
            for task_scores, (count, options) in zip(scores, queries.shape, strict=True)
        ]

    def kept(self, support: Side, weights: Params | None) -> list[Params]:
        """Return what answers need of each learned task's support: its prototypes; nothing for free text."""
        read = support.read(weights, self.pooling, support.label_tokens if self.labels else None)
        states = weighed(support, read.states)
        counts = self._counts(support, states)
        means = prototypes(states, support.classes, support.ways, counts)
        protos = refine(means, states, support.classes, counts, weights, self.steps, read.label_log_probs)
        ways = (support.classes.max(1).values + 1).tolist()
        return [{MEANS: mean[:count].clone()} if count else {} for mean, count in zip(protos.means, ways, strict=True)]

    def means_of(self, support: Side, states: Tensor) -> Prototypes:
        """Return the means of the classes of a support with these `states`; labels' own texts are in them, if read."""
        return prototypes(states, support.classes, support.ways, self._counts(support, states))

    def _counts(self, support: Side, states: Tensor) -> Tensor:
        if not self.label_names:
            return torch.ones_like(support.classes, dtype=states.dtype)
        return example_counts(states.detach(), support.classes, support.is_name, self.label_names, support.ways)


def prototypes(states: Tensor, classes: Tensor, ways: int | None = None, counts: Tensor | None = None) -> Prototypes:
    """Return the mean of each class's states.

    Args:
        states: `[T, K, D]`.
        classes: `[T, K]`, from 0 to C - 1; -1 for rows of padding.
        ways: C; None takes it from `classes`, which waits for a GPU.
        counts: `[T, K]`, how many examples each row counts as; None: one.
    """
    ways = max(1, int(classes.max()) + 1) if ways is None else ways
    members = one_hot(classes, ways).to(states)
    if counts is not None:
        members = members * counts.unsqueeze(-1)
    totals = members.sum(1)
    return Prototypes(members.mT @ states / totals.clamp(min=LEAST).unsqueeze(-1), totals)


def refine(
    means: Prototypes,
    states: Tensor,
    classes: Tensor,
    counts: Tensor,
    weights: Params | None,
    steps: int,
    label_log_probs: Tensor | None = None,
) -> Prototypes:
    """Return prototypes that tell the rows of a support apart better than the means of their classes do.

    Each step moves a prototype m to

        m + (sum(n (y - p) (h - m)) + mean - m) / (sum(n (y + (E - 1) p)) + 1)

    with, for each row, its state h, the number of examples that it counts as n, whether it is of the class y, and the
    probability p that it is. Rows that are surely of the class do nothing, those in doubt pull its prototype, and those
    of other classes that are taken for it push it away. One more example is always at the mean, so that a few examples
    do not move it far. E grows with the scale of the logits, so that no step goes too far. This is how the means of
    Gaussians are trained to maximize mutual information: by the extended Baum-Welch algorithm, with I-smoothing (Povey
    and Woodland 2002, "Minimum phone error and I-smoothing for improved discriminative training", ICASSP).

    Args:
        means: of `states` by `classes` and `counts`, as `prototypes` returns them.
        weights, label_log_probs: as for `logits`.
    """
    members = one_hot(classes, means.counts.shape[1]).to(states) * counts.unsqueeze(-1)
    caution = 3 + factor(weights, SCALE) / 2  # E - 1
    protos = means
    for _ in range(steps):
        scores = logits(squared_distances(states, protos), means.counts, weights, label_log_probs)
        taken = members.sum(-1, keepdim=True) * scores.softmax(-1)
        pull = members - taken
        step = pull.mT @ states - pull.sum(1).unsqueeze(-1) * protos.means + means.means - protos.means
        total = means.counts.unsqueeze(-1) + caution * taken.sum(1).unsqueeze(-1) + 1
        protos = protos._replace(means=protos.means + step / total)
    return protos


def one_hot(classes: Tensor, ways: int) -> Tensor:
    """Return `[..., C]` bool; all False where the class is -1."""
    return classes.unsqueeze(-1) == torch.arange(ways, device=classes.device)


def example_counts(states: Tensor, classes: Tensor, is_name: Tensor, most: int, ways: int | None = None) -> Tensor:
    """Return how many examples each row of a support counts as in the mean of its class, `[T, K]`.

    An example counts as one. A label's own text counts as

        min(most * (a - 1/C) / (1 - 1/C), the examples of its class),    0 below chance

    a is the share of the examples that are nearest to their own label's text. So names that say what the classes are
    outweigh a few examples, and names that do not, or mislead, are left out. A few examples say little about the names,
    which mostly do mean something: the share begins with `PRIOR_EXAMPLES`, of which `PRIOR_SHARE` are right.

    Args:
        states: `[T, K, D]`.
        classes: `[T, K]`; -1 for rows of padding.
        is_name: `[T, K]`, the rows of labels' own texts.
        ways: as for `prototypes`.
    """
    ways = max(1, int(classes.max()) + 1) if ways is None else ways
    members = one_hot(classes, ways)
    names, examples = ((members & rows.unsqueeze(-1)).to(states) for rows in (is_name, ~is_name))
    distances = squared_distances(states, Prototypes(names.mT @ states, names.sum(1)))
    nearest = distances.masked_fill((names.sum(1) == 0).unsqueeze(1), torch.inf).argmin(-1)
    right = ((nearest == classes) & ~is_name).sum(1)
    share = (right + PRIOR_EXAMPLES * PRIOR_SHARE) / (examples.sum((1, 2)) + PRIOR_EXAMPLES)
    chance = 1 / (names.sum(1) > 0).sum(1).clamp(min=2)
    worth = most * ((share - chance) / (1 - chance)).clamp(min=0.0)
    own = (members * examples.sum(1).unsqueeze(1)).sum(-1)  # the examples of each row's class
    counts = torch.minimum(worth.unsqueeze(1), own)
    return torch.where(is_name, counts.where(counts >= LEAST, 0.0), 1.0)


def weighed(support: Side, states: Tensor) -> Tensor:
    """Return the states of a support, with the similarity of its pairs weighed, if it has any."""
    return weigh_similarity(states, support.classes, support.is_pair, support.ways)


def weigh_similarity(states: Tensor, classes: Tensor, is_pair: Tensor | None, ways: int) -> Tensor:
    """Return the states of a support, with the similarity of each pair, their last number, moved towards its mean.

    What is left of its distance to the mean is the share

        min(1, 3 (a - 1/C) / (1 - 1/C)),    0 below chance

    where a is the share of the examples whose similarity is nearest to the mean of their own class, of its other
    examples. So it counts where classes differ in how similar the texts are, as with paraphrases or answers, and not
    where one text is a name in the other. As in `example_counts`, a begins with a few examples that are right.

    Args:
        states: `[T, K, D + 1]`.
        classes: `[T, K]`; -1 for rows of padding.
        is_pair: `[T, K]`; None returns the states as they are.
    """
    if is_pair is None:
        return states
    similarity = states[..., -1].detach()
    known = is_pair & (classes >= 0)
    classes = classes.masked_fill(~known, -1)
    members = one_hot(classes, ways)
    alone = similarity.unsqueeze(-1)
    left = members.sum(1, keepdim=True) - members.int()
    others = ((members * alone).sum(1, keepdim=True) - members * alone) / left.clamp(min=1)
    nearest = (alone - others).abs().masked_fill(left == 0, torch.inf).argmin(-1)
    asked = (members & (left > 0)).any(-1)
    share = ((nearest == classes) & asked).sum(1) + PRIOR_EXAMPLES * PRIOR_SHARE
    share = share / (asked.sum(1) + PRIOR_EXAMPLES)
    chance = 1 / members.any(1).sum(1).clamp(min=2)
    kept = (3 * (share - chance) / (1 - chance)).clamp(0.0, 1.0).unsqueeze(-1)
    mean = (similarity * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    return torch.cat([states[..., :-1], (mean + kept * (similarity - mean)).unsqueeze(-1)], dim=-1)


def squared_distances(states: Tensor, protos: Prototypes) -> Tensor:
    """Return `|h - mean|^2`, `[T, Q, C]`, as `|h|^2 + |mean|^2 - 2 h mean`, which never builds a `[T, Q, C, D]`."""
    lengths = states.square().sum(-1, keepdim=True) + protos.means.square().sum(-1).unsqueeze(1)
    return lengths - 2 * states @ protos.means.mT


def leave_one_out(states: Tensor, protos: Prototypes, classes: Tensor) -> Tensor:
    """Return the squared distances `[T, K, C]` of examples to the means of the *other* examples of each class.

    Without h the mean m of n examples is (n m - h) / (n - 1), which is n / (n - 1) times as far from h as m. m - h is
    taken number by number: where little but h is in m, a difference of lengths would be mostly rounding.
    """
    own = one_hot(classes, protos.counts.shape[1])
    n = (own * protos.counts.unsqueeze(1)).sum(-1, keepdim=True).clamp(min=1 + LEAST)
    to_others = (own.to(states) @ protos.means - states) * (n / (n - 1))
    return torch.where(own, to_others.square().sum(-1, keepdim=True), squared_distances(states, protos))


def logits(distances: Tensor, counts: Tensor, weights: Params | None, label_log_probs: Tensor | None = None) -> Tensor:
    """Return the classes' logits, `[T, Q, C]`.

    A class without an example gets minus infinity, unless no class of the task has one (free text).

    Args:
        weights: hold the logarithms of scale and mix, `[T]`; what they lack has its initial value.
        label_log_probs: `[T, Q, C]`; None if label tokens are not read.
    """
    scores = -factor(weights, SCALE) * distances
    if label_log_probs is not None:
        scores = scores + factor(weights, MIX) * label_log_probs
    missing = (counts == 0) & (counts > 0).any(1, keepdim=True)
    return scores.masked_fill(missing.unsqueeze(1), -torch.inf)


def factor(weights: Params | None, name: str) -> Tensor | float:
    """Return scale or mix from its logarithm among the weights, `[T, 1, 1]`; without one, its initial value."""
    log = (weights or {}).get(name)
    return math.exp(INITIAL_LOGS[name]) if log is None else log.exp().view(-1, 1, 1)


def label_log_probs(token_logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the classes' log-probabilities by their labels' first tokens; labels with the same one share it evenly.

    Args:
        token_logits: `[T, Q, C]`.
        tokens: `[T, C]`; -1 where a task has no such class, which gets 0.
    """
    missing = (tokens < 0).unsqueeze(1)
    sharing = (tokens.unsqueeze(1) == tokens.unsqueeze(2)).sum(-1)
    shared = (token_logits.float() - sharing.log().unsqueeze(1)).masked_fill(missing, torch.finfo(torch.float32).min)
    return shared.log_softmax(-1).masked_fill(missing, 0.0)


def class_losses(scores: Tensor, classes: Tensor, smoothing: float = 0.0, shares: Tensor | float = 1.0) -> Tensor:
    """Return each task's mean loss `[T]`, from logits `[T, Q, C]`; 0 for a task without any class.

    Args:
        classes: `[T, Q]`; -1 does not count.
        smoothing: share of the target's weight that is spread evenly over the classes.
        shares: `[T, Q]`, the factor on each loss.
    """
    log_probs = scores.log_softmax(-1)
    losses = -log_probs.gather(2, classes.clamp(min=0).unsqueeze(2)).squeeze(2)
    if smoothing:
        possible = scores > -torch.inf
        evenly = -log_probs.masked_fill(~possible, 0.0).sum(-1) / possible.sum(-1)
        losses = (1 - smoothing) * losses + smoothing * evenly
    counted = classes >= 0
    return (shares * losses).masked_fill(~counted, 0.0).sum(1) / counted.sum(1).clamp(min=1)
