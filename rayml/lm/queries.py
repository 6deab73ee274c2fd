"""Queries with labels, as an algorithm answers them.

`TaskQueries` has those of T tasks side by side (`rayml.algorithms.base.QueryBatch`). `Query` is one input of a learned
task: `rayml predict`, the server and the Python API all ask with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rayml.algorithms.base import Algorithm, LabelledStates
from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import MEANS, Pooling, Read
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

    def states(self, _weights: Params | None, _pooling: Pooling = "last") -> Tensor:
        return self._states


class LearnedPrototypes:
    """The prototypes that an algorithm keeps of the supports of T tasks (`rayml.algorithms.base.LabelledStates`)."""

    def __init__(self, algorithm: Algorithm, support: TaskSide):
        self._algorithm, self._support = algorithm, support
        by_task = []
        for rows, classes in zip(support.tasks, support.row_classes, strict=True):
            known = {number for row, number in zip(rows, classes, strict=True) if not row.is_name}
            by_task.append([number if number in known else -1 for number in range(1 + max(classes))])
        self.classes = pad_classes(by_task).to(support.lm.device)

    def states(self, weights: Params | None, _pooling: Pooling = "last") -> Tensor:
        kept = self._algorithm.kept(self._support, weights)
        return torch.nn.utils.rnn.pad_sequence([task[MEANS] for task in kept], batch_first=True)


class TaskQueries:
    """The queries of T tasks, all of them with labels.

    Args:
        pad: the token that rows are padded with.
        tasks: each task's prompt ensemble; its options are the labels.
        support: what is kept of the tasks' supports, if the algorithm keeps hidden states.
        options: how many labels each task has. None: as many as the ensemble has options. Give it where the ensemble
            has one label alone, since no label tokens are scored.
        label_tokens: the first token of each label, if those are read.
    """

    def __init__(
        self,
        lm: TaskLM,
        pad: int,
        tasks: Sequence[WeightedPrompts],
        support: LabelledStates | None = None,
        options: Sequence[int] | None = None,
        label_tokens: Sequence[Sequence[int]] = (),
    ):
        self.lm, self.pad, self.tasks, self._support = lm, pad, tasks, support
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

    @property
    def support(self) -> LabelledStates:
        assert self._support is not None  # only algorithms that keep hidden states ask for it
        return self._support

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
    first = queries[0]
    is_one_task = all(query.weights is first.weights and query.kept is first.kept for query in queries)
    is_one_task = is_one_task and len({(query.options, tuple(query.classes)) for query in queries}) == 1
    groups = [queries] if is_one_task else [[query] for query in queries]
    tasks = [merge_prompts([query.prompts for query in group]) for group in groups]
    known = [found for group in groups if (found := _known_support(lm, pad, group[0]))]
    options, label_tokens = zip(*((group[0].options, group[0].label_tokens) for group in groups), strict=True)
    support = KnownStates(*zip(*known, strict=True)) if known else None
    batch = TaskQueries(lm, pad, tasks, support, options, label_tokens)
    answers = first.algorithm.answer(batch, stack_adapters([group[0].weights for group in groups]))
    return [scores for task in answers for scores in task]


def _known_support(lm: TaskLM, pad: int, query: Query) -> tuple[Tensor, list[int]] | None:
    """Return the states of a query's kept support, and which option each is of; -1 for none. They are computed once."""
    kept = query.kept
    if kept is None:
        return None
    if kept.states is None:
        rows = TaskSide(lm, [kept.rows], [()], [kept.classes], pad, packs=False)
        kept.states = rows.states(stack_adapters([query.weights]), query.algorithm.pooling)[0]
    return kept.states, [query.classes.index(c) if c in query.classes else -1 for c in kept.classes]


def merge_prompts(inputs: Sequence[WeightedPrompts]) -> WeightedPrompts:
    """Return one prompt ensemble for several inputs of one task, from the ensemble of each input."""
    weights = [weight for weight, _ in inputs[0]]
    return [(weight, [prompts[number][1][0] for prompts in inputs]) for number, weight in enumerate(weights)]
