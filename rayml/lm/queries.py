"""Queries with labels, as an algorithm answers them.

`TaskQueries` has those of T tasks side by side (`rayml.algorithms.base.QueryBatch`). `Query` is one input of a learned
task: `rayml predict`, the server and the Python API all ask with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rayml.algorithms.base import Algorithm
from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import Pooling, Read
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.lora import stack_adapters
from rayml.lm.model import TaskLM
from rayml.lm.option_scoring import OptionQuery, PromptEnsemble, WeightedPrompts
from rayml.lm.rows import TokenRow
from rayml.lm.sides import TaskSide, pad_classes


@dataclass(eq=False)
class KeptSupport:
    """The support of a task that is kept for answering: K rows."""

    rows: Sequence[TokenRow]
    classes: Sequence[int]
    """The class of each row; -1 for a class that is not among the options."""
    states: Tensor | None = None
    """`[K, D]`, if they were computed before, with the same weights."""


class KnownStates:
    """The supports of T tasks whose states were computed before (`rayml.algorithms.base.LabelledStates`)."""

    def __init__(self, states: Sequence[Tensor], classes: Sequence[Sequence[int]]):
        self._states = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)
        self.classes = pad_classes(classes).to(self._states.device)
        self.is_name = torch.zeros_like(self.classes, dtype=torch.bool)  # they are in the means already

    def states(self, _weights: Params | None, _pooling: Pooling = "last") -> Tensor:
        return self._states


class TaskQueries:
    """The queries of T tasks, all of them with labels.

    Args:
        pad: the token that rows are padded with.
        tasks: each task's prompt ensemble; its options are the labels.
        kept: each task's support, if the algorithm keeps hidden states.
        options: how many labels each task has. None: as many as the ensemble has options. Give it where the ensemble
            has one label alone, since no label tokens are scored.
        label_tokens: the first token of each label, if those are read.
    """

    def __init__(
        self,
        lm: TaskLM,
        pad: int,
        tasks: Sequence[WeightedPrompts],
        kept: Sequence[KeptSupport] = (),
        options: Sequence[int] | None = None,
        label_tokens: Sequence[Sequence[int]] = (),
    ):
        self.lm, self.pad, self.tasks, self.kept = lm, pad, tasks, kept
        queries = [task[0][1] for task in tasks]
        options = [len(task[0].rows) for task in queries] if options is None else options
        self.shape = [(len(task), count) for task, count in zip(queries, options, strict=True)]
        self._label_tokens = label_tokens

    @cached_property
    def _ensemble(self) -> PromptEnsemble:
        return PromptEnsemble(self.lm, self.pad, self.tasks)

    @cached_property
    def _prompts(self) -> TaskBatch:
        prompts = [[query.rows[0].without_target() for query in task[0][1]] for task in self.tasks]
        return collate(prompts, self.pad).to(self.lm.device)

    @cached_property
    def support(self) -> TaskSide | KnownStates:
        classes = [support.classes for support in self.kept]
        known = [support.states for support in self.kept if support.states is not None]
        if len(known) == len(self.kept):
            return KnownStates(known, classes)
        rows = [support.rows for support in self.kept]
        return TaskSide(self.lm, rows, [()] * len(rows), classes, self.pad, packs=False)

    def label_log_probs(self, weights: Params | None) -> list[Tensor]:
        return self._ensemble.log_probs(weights)

    def states(self, weights: Params | None, pooling: Pooling = "last") -> Tensor:
        return self.lm.states(weights, self._prompts, pooling)

    def read(self, weights: Params | None, pooling: Pooling = "last", labels: bool = False) -> Read:
        tokens = pad_classes(self._label_tokens).to(self.lm.device) if labels else None
        return self.lm.read(weights, self._prompts, pooling, tokens)


@dataclass(eq=False)
class Query:
    """One input in every prompt of its task's ensemble, to be answered with the weights of the task."""

    prompts: WeightedPrompts
    """`weighted_prompts` of one input; with one option alone, if the algorithm answers by what it keeps."""
    weights: Params | None
    """Of the task; None for the bare base."""
    algorithm: Algorithm
    """Answers the query."""
    kept: KeptSupport | None = None
    """The task's support, if the algorithm keeps hidden states; they are computed once."""
    classes: Sequence[int] = ()
    """The classes of that support that are options."""
    label_tokens: Sequence[int] = ()
    """The first token of each option, if those are read."""

    @property
    def options(self) -> int:
        return len(self.classes) or len(self.prompts[0][1][0].rows)

    @property
    def option_queries(self) -> list[OptionQuery]:
        """One for each prompt of the ensemble."""
        return [option_query for _, (option_query,) in self.prompts]

    @property
    def longest(self) -> int:
        """The tokens of its longest option with the prompt."""
        return max(len(row.tokens) for option_query in self.option_queries for row in option_query.rows)

    @property
    def tokens(self) -> int:
        """The tokens that are read for it."""
        return sum(len(tree.tokens) for option_query in self.option_queries for tree in option_query.trees)

    def support(self) -> KeptSupport | None:
        """Return the support with its classes renumbered as indices of the options."""
        if self.kept is None:
            return None
        numbers = [self.classes.index(c) if c in self.classes else -1 for c in self.kept.classes]
        return KeptSupport(self.kept.rows, numbers, self.kept.states)


def first_batch_size(queries: Sequence[Query], most_tokens: int) -> int:
    """Return how many of the first queries fit into one forward, at least one; their algorithms answer alike."""
    rows = longest = 0
    for number, query in enumerate(queries):
        for option_query in query.option_queries:
            rows = max(rows, len(option_query.trees))
            longest = max(longest, *(len(tree.tokens) for tree in option_query.trees))
        too_many = (number + 1) * rows * longest > most_tokens
        if number and (too_many or not query.algorithm.can_share_batch(queries[0].algorithm)):
            return number
    return len(queries)


@torch.no_grad()
def answer_queries(lm: TaskLM, pad: int, queries: Sequence[Query]) -> list[Tensor]:
    """Return each query's log-probabilities of its options, `[options]`, all from one forward.

    Args:
        pad: the token that rows are padded with.
        queries: of any adapters whose algorithms answer alike.
    """
    _compute_states(lm, pad, queries)
    first = queries[0]
    is_one_task = all(query.weights is first.weights and query.kept is first.kept for query in queries)
    is_one_task = is_one_task and len({(query.options, tuple(query.classes)) for query in queries}) == 1
    groups = [queries] if is_one_task else [[query] for query in queries]
    tasks = [merge_prompts([query.prompts for query in group]) for group in groups]
    kept = [support for group in groups if (support := group[0].support())]
    options, label_tokens = zip(*((group[0].options, group[0].label_tokens) for group in groups), strict=True)
    batch = TaskQueries(lm, pad, tasks, kept, options, label_tokens)
    answers = first.algorithm.answer(batch, stack_adapters([group[0].weights for group in groups]))
    return [scores for task in answers for scores in task]


def _compute_states(lm: TaskLM, pad: int, queries: Sequence[Query]) -> None:
    """Compute the hidden states of kept supports that have none yet."""
    for query in queries:
        kept = query.kept
        if kept and kept.states is None:
            batch = TaskQueries(lm, pad, [query.prompts], [kept])
            kept.states = batch.support.states(stack_adapters([query.weights]), query.algorithm.pooling)[0]


def merge_prompts(inputs: Sequence[WeightedPrompts]) -> WeightedPrompts:
    """Return one prompt ensemble for several inputs of one task, from the ensemble of each input."""
    weights = [weight for weight, _ in inputs[0]]
    return [(weight, [prompts[number][1][0] for prompts in inputs]) for number, weight in enumerate(weights)]
