"""Queries of learned tasks: what is asked of the model about one input, and the log-probabilities that come of it.

`rayml predict`, the server and the Python API all ask by these, each adapter as its own card says.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayml.lm.batch import Row, collate
from rayml.lm.encode import Encoder
from rayml.lm.lora import side_by_side
from rayml.lm.model import TaskLM
from rayml.lm.score import OptionBatch, Question, may_fork
from rayml.meta.adapt import Params
from rayml.meta.protonet import prototype_logits


class Support:
    """The examples that a protonet's adapter tells classes apart by; their states are taken once, `[K, D]`."""

    def __init__(self, rows: list[Row], classes: list[int]):
        self.rows, self.classes = rows, classes
        self.states: Tensor | None = None

    def log_probs(self, state: Tensor, among: Sequence[int]) -> Tensor:
        """Return the log-probabilities of some of the classes for a query's state, `[1, D]` to `[options]`."""
        assert self.states is not None
        classes = torch.tensor([self.classes], device=state.device)
        logits = prototype_logits(self.states.unsqueeze(0), classes, state.unsqueeze(0), max(self.classes) + 1)[0, 0]
        return logits[list(among)].log_softmax(-1)


class Query:
    """One input, asked about in one way, under the weights of its task.

    Args:
        lm: that will be asked.
        encoder: the task's own: it says how options are scored.
        rows: one for each option; with a `support`, one alone.
        weights: of the task; None for the bare base.
        share: how much this way of asking counts (`Encoder.questions`).
        support: score by the classes' prototypes.
        among: the support's classes that are options.
    """

    def __init__(
        self,
        lm: TaskLM,
        encoder: Encoder,
        rows: list[Row],
        weights: Params | None,
        share: float = 1.0,
        support: Support | None = None,
        among: Sequence[int] = (),
    ):
        self.rows, self.weights, self.share, self.support, self.among = rows, weights, share, support, among
        self.question = Question(rows, encoder, may_fork(lm.module))


def first_batch(queries: Sequence[Query], most_tokens: int) -> int:
    """Return how many of the first queries are scored in one forward: all of one kind, and one at least."""
    rows = longest = 0
    for number, query in enumerate(queries):
        trees = query.question.trees
        rows, longest = max(rows, len(trees)), max(longest, *(len(tree.tokens) for tree in trees))
        other_kind = bool(query.support) != bool(queries[0].support)
        if number and ((number + 1) * rows * longest > most_tokens or other_kind):
            return number
    return len(queries)


def log_probs(lm: TaskLM, pad: int, queries: Sequence[Query]) -> list[Tensor]:
    """Return each query's log-probabilities of its options, `[options]`, all from one forward.

    Args:
        pad: the token that rows are filled up with.
        queries: of any adapters; all with a support, or none.
    """
    if queries[0].support:
        return _by_prototypes(lm, pad, queries)
    weights = [query.weights for query in queries]
    alike = all(one is weights[0] for one in weights) and len({len(query.rows) for query in queries}) == 1
    tasks = [[query.question for query in queries]] if alike else [[query.question] for query in queries]
    stacked = side_by_side(weights[:1] if alike else weights)
    return [scores for task in OptionBatch(lm, pad, tasks).log_probs(stacked) for scores in task]


def _by_prototypes(lm: TaskLM, pad: int, queries: Sequence[Query]) -> list[Tensor]:
    supports = [query.support for query in queries if query.support]
    for query, support in zip(queries, supports, strict=True):
        if support.states is None:
            support.states = _states(lm, pad, [query.weights], [support.rows])[0]
    states = _states(lm, pad, [query.weights for query in queries], [query.rows for query in queries])
    return [s.log_probs(state, q.among) for q, s, state in zip(queries, supports, states, strict=True)]


@torch.no_grad()
def _states(lm: TaskLM, pad: int, weights: Sequence[Params | None], rows: list[list[Row]]) -> Tensor:
    """Return the state before each row's target, `[T, K, D]`."""
    return lm.states(side_by_side(weights), collate(rows, pad).to(lm.device))


def weighed(shares: Sequence[float], found: Sequence[Tensor]) -> Tensor:
    """Return the log-probabilities of one input's options, `[options]`, from those of each way of asking."""
    if len(found) == 1:
        return found[0]
    return torch.stack([share * of for share, of in zip(shares, found, strict=True)]).sum(0).log_softmax(-1)
