"""The two sides of T episodes, support and query, as an algorithm sees them."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import Pooling, Read
from rayml.config import Config
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.label_trie import Label
from rayml.lm.rows import TokenRow, decode_rows

if TYPE_CHECKING:
    from rayml.lm.model import TaskLM

SIDES = "support", "query"


class TaskSide:
    """The supports, or the queries, of T tasks, as an algorithm sees them (`rayml.algorithms.base.Side`).

    Args:
        tasks: each task's rows.
        labels: for each task, the tokens of the labels that its targets compete with; empty for the whole vocabulary.
        row_classes: the class of each row; empty for free text.
        smoothing: label smoothing, in meta-training.
        packs: allows several examples to share a row.
    """

    def __init__(
        self,
        lm: "TaskLM",
        tasks: Sequence[Sequence[TokenRow]],
        labels: Sequence[Sequence[Label]],
        row_classes: Sequence[Sequence[int]],
        pad: int,
        *,
        smoothing: float = 0.0,
        packs: bool = True,
    ):
        self.lm, self.tasks, self.labels, self.row_classes, self.pad = lm, tasks, labels, row_classes, pad
        self.smoothing, self.packs = smoothing, packs and lm.packs

    @cached_property
    def batch(self) -> TaskBatch:
        return on_device(collate(self.tasks, self.pad, self.labels, self.packs), self.lm.device)

    @cached_property
    def classes(self) -> Tensor:
        tasks = zip(self.tasks, self.row_classes, strict=True)
        return pad_classes([classes or [-1] * len(rows) for rows, classes in tasks]).to(self.lm.device)

    @cached_property
    def is_name(self) -> Tensor:
        names = [torch.tensor([row.is_name for row in rows], dtype=torch.bool) for rows in self.tasks]
        return torch.nn.utils.rnn.pad_sequence(names, batch_first=True).to(self.lm.device)

    @property
    def is_pair(self) -> Tensor | None:
        return self.batch.is_pair

    @property
    def ways(self) -> int:
        return 1 + max((number for classes in self.row_classes for number in classes), default=0)

    @cached_property
    def label_tokens(self) -> Tensor:
        """`[T, C]`: the first token of each class's label, taken from the rows; -1 where a task has no such class."""
        by_task = []
        for rows, classes in zip(self.tasks, self.row_classes, strict=True):
            numbered = zip(rows, classes, strict=bool(classes))
            first = {number: row.tokens[row.start] for row, number in numbered if not row.is_name}
            by_task.append([first.get(number, -1) for number in range(max(first, default=0) + 1)])
        return pad_classes(by_task).to(self.lm.device)

    def losses(self, weights: Params) -> Tensor:
        return self.lm.losses(weights, self.batch, self.smoothing)

    def states(self, weights: Params | None, pooling: Pooling = "last") -> Tensor:
        return self.lm.states(weights, self.batch, pooling)

    def read(self, weights: Params | None, pooling: Pooling = "last", label_tokens: Tensor | None = None) -> Read:
        return self.lm.read(weights, self.batch, pooling, label_tokens, self.smoothing)

    def prepare(self) -> None:
        """Prepare everything that an algorithm may ask of the tasks, ahead of time."""
        _ = self.batch, self.classes, self.is_name, None if self.lm.sentences else self.label_tokens


def on_device(batch: TaskBatch, device: torch.device) -> TaskBatch:
    """Return the batch on a device; a GPU copies it while it still computes earlier work."""
    return (batch.pinned() if device.type == "cuda" else batch).to(device)


def training_sides(
    lm: "TaskLM", episodes: Sequence[dict[str, Any]], pad: int, config: Config
) -> tuple[TaskSide, TaskSide]:
    """Return the supports and the queries of records that `Encoder.episode` made."""
    regularize, labels = config.regularize, [episode["labels"] for episode in episodes]

    def side(name: str, packs: bool) -> TaskSide:
        rows = [decode_rows(episode[name]) for episode in episodes]
        classes = [episode[name]["classes"] for episode in episodes]
        return TaskSide(lm, rows, labels, classes, pad, smoothing=regularize.label_smoothing, packs=packs)

    # Adversarial steps and dropout masks are drawn for each row, so that a row must hold one example.
    drops = regularize.lora_dropout > 0
    return side("support", packs=not (drops or regularize.adversarial > 0)), side("query", packs=not drops)


def side_batch(episodes: Sequence[dict[str, Any]], side: str, pad: int, packs: bool = False) -> TaskBatch:
    """Return one side of records that `Encoder.episode` made."""
    rows = [decode_rows(episode[side]) for episode in episodes]
    return collate(rows, pad, [episode["labels"] for episode in episodes], packs)


def trained_tokens(config: Config, support: TaskBatch, query: TaskBatch) -> int:
    """Return how many tokens, without padding, an outer step on these episodes runs forward and backward."""
    passes = config.algorithm.passes(config.inner.steps)
    return sum(times * side.read_tokens for times, side in zip(passes, (support, query), strict=True))


def pad_classes(classes: Sequence[Sequence[int]]) -> Tensor:
    """Return each task's numbers, such as the class of every row, as `[T, K]`, padded with -1."""
    tensors = [torch.tensor(numbers, dtype=torch.int64) for numbers in classes]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-1)
