"""Queries with labels: of T tasks side by side, as an algorithm answers them (`rayml.algorithms.base.Asked`); and of
learned tasks, what is asked of the model about one input, and the log-probabilities that come of it.

`rayml predict`, the server and the Python API all ask by the latter, each adapter as its own card says.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from rayml.algorithms.base import Algorithm
from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import Pooling, Read
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.lora import side_by_side
from rayml.lm.model import TaskLM
from rayml.lm.option_scoring import OptionQuery, PromptEnsemble, WeightedPrompts
from rayml.lm.rows import TokenRow
from rayml.lm.sides import class_grid


class KeptSupport:
    """The support of a task that is kept to answer with: K rows, and the class of each, -1 for none of the options."""

    def __init__(self, rows: Sequence[TokenRow], classes: Sequence[int], states: Tensor | None = None):
        self.rows, self.classes = rows, classes
        self.states = states
        """`[K, D]`, where they were taken before, under the same weights."""


class AskedTasks:
    """The queries of T tasks, all of them with labels.

    Args:
        pad: the token that rows are filled up with.
        tasks: each task's prompt ensemble; its options are the labels.
        kept: each task's support, where the algorithm keeps hidden states.
        options: how many labels each task has, where rows are of one alone: their tokens then cannot be scored.
        label_tokens: the first token of each of them, where that is read.
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
        options = [len(of[0].rows) for of in queries] if options is None else options
        self.shape = [(len(of), count) for of, count in zip(queries, options, strict=True)]
        self._label_tokens = label_tokens

    @cached_property
    def _ensemble(self) -> PromptEnsemble:
        return PromptEnsemble(self.lm, self.pad, self.tasks)

    @cached_property
    def _prompts(self) -> TaskBatch:
        asked = [[query.rows[0] for query in task[0][1]] for task in self.tasks]
        return self._one_a_row(
            [[TokenRow(r.tokens[: r.start], r.start, suffix=r.suffix) for r in rows] for rows in asked]
        )

    @cached_property
    def _kept_rows(self) -> TaskBatch:
        return self._one_a_row([one.rows for one in self.kept])

    def _one_a_row(self, rows: Sequence[Sequence[TokenRow]]) -> TaskBatch:
        return collate(rows, self.pad).to(self.lm.device)

    @cached_property
    def support_classes(self) -> Tensor:
        return class_grid([one.classes for one in self.kept]).to(self.lm.device)

    def label_log_probs(self, weights: Params | None) -> list[Tensor]:
        if self.lm.sentences:  # it knows no labels' tokens: before it has seen a task, it can but guess
            return [torch.full(shape, 1 / shape[1], device=self.lm.device).log() for shape in self.shape]
        return self._ensemble.log_probs(weights)

    @torch.no_grad()
    def states(self, weights: Params | None, pooling: Pooling = "last") -> Tensor:
        return self.lm.states(weights, self._prompts, pooling)

    @torch.no_grad()
    def read(self, weights: Params | None, pooling: Pooling = "last", labels: bool = False) -> Read:
        tokens = class_grid(self._label_tokens).to(self.lm.device) if labels else None
        return self.lm.read(weights, self._prompts, pooling, tokens)

    @torch.no_grad()
    def support_states(self, weights: Params | None, pooling: Pooling = "last") -> Tensor:
        known = [one.states for one in self.kept if one.states is not None]
        if len(known) == len(self.kept):
            return torch.nn.utils.rnn.pad_sequence(known, batch_first=True)
        return self.lm.states(weights, self._kept_rows, pooling)


class Query:
    """One input, in every prompt of its task's ensemble, under the weights of the task.

    Args:
        prompts: `weighted_prompts` of one input; with one option alone, where the algorithm answers by what it keeps.
        weights: of the task; None for the bare base.
        algorithm: answers.
        kept: the task's support, where the algorithm keeps hidden states; they are taken once.
        classes: of that support, those that are options.
        label_tokens: the first token of each option, where that is read.
    """

    def __init__(
        self,
        prompts: WeightedPrompts,
        weights: Params | None,
        algorithm: Algorithm,
        kept: KeptSupport | None = None,
        classes: Sequence[int] = (),
        label_tokens: Sequence[int] = (),
    ):
        self.prompts, self.weights, self.algorithm = prompts, weights, algorithm
        self.kept, self.classes, self.label_tokens = kept, tuple(classes), tuple(label_tokens)

    @property
    def options(self) -> int:
        return len(self.classes) or len(self.prompts[0][1][0].rows)

    @property
    def option_queries(self) -> list[OptionQuery]:
        """One for each prompt of the ensemble."""
        return [option_query for _, (option_query,) in self.prompts]

    @property
    def longest(self) -> int:
        """Tokens of its longest option with what stands before it."""
        return max(len(row.tokens) for option_query in self.option_queries for row in option_query.rows)

    def support(self) -> KeptSupport | None:
        """Return the support with the classes as numbers of the options that are asked for."""
        if self.kept is None:
            return None
        numbers = [self.classes.index(kind) if kind in self.classes else -1 for kind in self.kept.classes]
        return KeptSupport(self.kept.rows, numbers, self.kept.states)


def first_batch(queries: Sequence[Query], most_tokens: int) -> int:
    """Return how many of the first queries are answered in one forward: in one way, and one at least."""
    rows = longest = 0
    for number, query in enumerate(queries):
        for option_query in query.option_queries:
            rows = max(rows, len(option_query.trees))
            longest = max(longest, *(len(tree.tokens) for tree in option_query.trees))
        too_many = (number + 1) * rows * longest > most_tokens
        if number and (too_many or not query.algorithm.answers_as(queries[0].algorithm)):
            return number
    return len(queries)


def log_probs(lm: TaskLM, pad: int, queries: Sequence[Query]) -> list[Tensor]:
    """Return each query's log-probabilities of its options, `[options]`, all from one forward.

    Args:
        pad: the token that rows are filled up with.
        queries: of any adapters, whose algorithms answer alike.
    """
    _take_states(lm, pad, queries)
    first = queries[0]
    alike = all(query.weights is first.weights for query in queries)
    alike = alike and len({(query.options, query.classes) for query in queries}) == 1
    groups = [queries] if alike else [[query] for query in queries]
    tasks = [together([query.prompts for query in group]) for group in groups]
    kept = [support for group in groups if (support := group[0].support())]
    options, label_tokens = zip(*((group[0].options, group[0].label_tokens) for group in groups), strict=True)
    asked = AskedTasks(lm, pad, tasks, kept, options, label_tokens)
    found = first.algorithm.answer(asked, side_by_side([group[0].weights for group in groups]))
    return [scores for task in found for scores in task]


def _take_states(lm: TaskLM, pad: int, queries: Sequence[Query]) -> None:
    """Take the hidden states of the supports that are kept, where they were not taken yet."""
    for query in queries:
        kept = query.kept
        if kept and kept.states is None:
            asked = AskedTasks(lm, pad, [query.prompts], [kept])
            kept.states = asked.support_states(side_by_side([query.weights]), query.algorithm.pooling)[0]


def together(inputs: Sequence[WeightedPrompts]) -> WeightedPrompts:
    """Return the ways of several inputs of one task, from those of each."""
    shares = [share for share, _ in inputs[0]]
    return [(share, [one[number][1][0] for one in inputs]) for number, share in enumerate(shares)]
