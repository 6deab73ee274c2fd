"""Choose among options by their log-probability, for T tasks at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayml.lm.batch import Row, collate
from rayml.lm.model import TaskLM
from rayml.meta.adapt import Params


class OptionBatch:
    """The queries of T tasks, each with every option of its task.

    Options of one token share their query's row: one forward row a query, whatever the number of options. Longer
    options take a row each, and are scored by the mean over their tokens, so that length does not decide.
    """

    def __init__(self, rows: Sequence[Sequence[Sequence[Row]]], pad: int):
        """Take each task's queries, each with a row an option (`Encoder.option_rows`); `pad` is any token."""
        self.shape = [(len(task), len(task[0])) for task in rows]
        self.shared = all(share_a_row(choices) for task in rows for choices in task)
        self.ids = [[[row.tokens[-1] for row in choices] for choices in task] for task in rows] if self.shared else []
        kept = [[row for choices in task for row in (choices[:1] if self.shared else choices)] for task in rows]
        self.batch = collate(kept, pad)

    def to(self, device: torch.device) -> "OptionBatch":
        self.batch = self.batch.to(device)
        return self

    @torch.no_grad()
    def log_probs(self, lm: TaskLM, adapters: Params | None) -> list[Tensor]:
        """Return, for each task, `[queries, options]`: log-probability of the options, normalized over them."""
        logits, positions = lm.target_logits(adapters, self.batch)
        scores = logits.float().log_softmax(-1)
        return self._shared(scores) if self.shared else self._separate(scores, positions)

    def _shared(self, scores: Tensor) -> list[Tensor]:
        per_task = scores.split([queries for queries, _ in self.shape])
        ids = [torch.tensor(task, device=scores.device) for task in self.ids]
        return [score.gather(1, choices).log_softmax(-1) for score, choices in zip(per_task, ids, strict=True)]

    def _separate(self, scores: Tensor, positions: Tensor) -> list[Tensor]:
        targets = self.batch.targets.flatten()[positions]
        chosen = scores.gather(1, targets.unsqueeze(1)).squeeze(1)
        row = positions // self.batch.tokens.shape[1]
        rows = self.batch.tokens.shape[0]
        total = torch.zeros(rows, device=scores.device).index_add(0, row, chosen)
        mean = total / torch.bincount(row, minlength=rows).clamp(min=1)
        per_task = mean.view(self.batch.tasks, -1)
        return [
            task[: queries * options].view(queries, options).log_softmax(-1)
            for task, (queries, options) in zip(per_task, self.shape, strict=True)
        ]


def share_a_row(choices: Sequence[Row]) -> bool:
    """Return whether these differ in their last token alone, so that one row scores all of them."""
    first = choices[0]
    return all(row.start == len(row.tokens) - 1 and row.tokens[:-1] == first.tokens[:-1] for row in choices)
