"""Queries of T tasks with labels, as an algorithm sees them when it answers (`rayml.algorithms.base.Asked`)."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import Pooling, Read
from rayml.lm.batch import TaskBatch, class_grid, collate
from rayml.lm.model import TaskLM
from rayml.lm.option_scoring import PromptEnsemble, WeightedPrompts
from rayml.lm.rows import TokenRow


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
