"""Choose among options by their log-probability, for T tasks at once."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from rayml.lm.batch import Row, collate
from rayml.lm.model import TaskLM
from rayml.meta.adapt import Params


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt, and continuations of it side by side in one forward row: each sees the prompt and itself.

    As in tree attention (Cai et al. 2024, arXiv 2401.10774). A continuation's last token predicts nothing that is
    asked, and is not run: continuations of one token cost no more than the prompt.
    """

    prompt: list[int]
    options: list[list[int]]

    @property
    def branches(self) -> list[list[int]]:
        """Return what is run of each option."""
        return [option[:-1] for option in self.options]

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *chain.from_iterable(self.branches)]

    @property
    def is_forked(self) -> bool:
        """Return whether there are two branches that must not see each other."""
        return sum(map(bool, self.branches)) > 1

    def predictors(self) -> list[list[int]]:
        """Return for each option the places in `tokens` that predict its tokens."""
        lengths = [len(branch) for branch in self.branches]
        firsts = accumulate(lengths[:-1], initial=len(self.prompt))
        return [
            [len(self.prompt) - 1, *range(first, first + length)] for first, length in zip(firsts, lengths, strict=True)
        ]


def trees_of(choices: Sequence[Row], may_fork: bool) -> list[Tree]:
    """Return the forward rows of one query: one for all its options, if they follow the same prompt, else one each."""
    trees = [Tree(row.tokens[: row.start], [row.tokens[row.start :]]) for row in choices]
    whole = Tree(trees[0].prompt, [option for tree in trees for option in tree.options])
    is_shared = all(tree.prompt == whole.prompt for tree in trees)
    return [whole] if is_shared and (may_fork or not whole.is_forked) else trees


def takes_trees(module: Any) -> bool:
    """Return whether a causal LM's attention is given by a mask and positions alone.

    Not by flash kernels, windows of attention, recurrent layers, or positions that are counted inside.
    """
    config = module.config
    is_plain = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    is_plain = is_plain and not getattr(config, "sliding_window", None) and not getattr(module, "_is_stateful", False)
    is_masked = config._attn_implementation in ("eager", "sdpa")
    return is_plain and is_masked and "position_ids" in inspect.signature(module.forward).parameters


class OptionBatch:
    """The queries of T tasks, each with every option of its task: as a rule one forward row a query.

    An option's score is the mean over its tokens, so that length does not decide.
    """

    def __init__(self, lm: TaskLM, tasks: Sequence[Sequence[Sequence[Row]]], pad: int):
        """Take each task's queries, each with a row an option (`Encoder.option_rows`); `pad` is any token."""
        self.lm = lm
        self.shape = [(len(task), len(task[0])) for task in tasks]
        may_fork = takes_trees(lm.module)
        trees = [[tree for choices in task for tree in trees_of(choices, may_fork)] for task in tasks]
        rows = [[Row(tree.tokens, len(tree.tokens)) for tree in task] for task in trees]
        self.batch = collate(rows, pad).to(lm.device)
        self._place(trees)
        forked = any(tree.is_forked for task in trees for tree in task)
        self.inputs = self._branching(trees) if forked else {}

    def _place(self, trees: Sequence[Sequence[Tree]]) -> None:
        """Note for every token of every option, `[M]`: which it is, of which option, and the place that predicts it."""
        count, length = self._rows_a_task, self.batch.tokens.shape[1]
        places, targets, lengths = [], [], []
        for t, task in enumerate(trees):
            for k, tree in enumerate(task):
                first = (t * count + k) * length
                for option, predictors in zip(tree.options, tree.predictors(), strict=True):
                    places += [first + place for place in predictors]
                    targets += option
                    lengths.append(len(option))
        device = self.lm.device
        self.places, self.place_of = torch.tensor(places, device=device).unique(return_inverse=True)
        self.targets = torch.tensor(targets, device=device)
        self.lengths = torch.tensor(lengths, device=device)

    @property
    def _rows_a_task(self) -> int:
        return len(self.batch.tokens) // self.batch.tasks

    def _branching(self, trees: Sequence[Sequence[Tree]]) -> dict[str, Tensor]:
        """Return the attention mask `[N, 1, L, L]`, added to the scores, and the positions `[N, L]`."""
        rows, length = self.batch.tokens.shape
        branch = torch.zeros(rows, length, dtype=torch.int64)
        positions = torch.arange(length).repeat(rows, 1)
        for t, task in enumerate(trees):
            for k, tree in enumerate(task):
                row, place = t * self._rows_a_task + k, len(tree.prompt)
                for number, tokens in enumerate(tree.branches, 1):
                    end = place + len(tokens)
                    branch[row, place:end] = number
                    positions[row, place:end] = torch.arange(len(tokens)) + len(tree.prompt)
                    place = end
        of_key, of_query = branch.unsqueeze(1), branch.unsqueeze(2)
        seen = ((of_key == 0) | (of_key == of_query)).tril().unsqueeze(1)
        dtype = self.lm.module.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return {"attention_mask": mask.to(self.lm.device), "position_ids": positions.to(self.lm.device)}

    @torch.no_grad()
    def log_probs(self, weights: Params | None) -> list[Tensor]:
        """Return, for each task, `[queries, options]`: log-probability of the options, normalized over them."""
        batch = self.batch
        logits = self.lm.logits_at(self.places, weights, batch.tokens, batch.frozen, **self.inputs)
        chosen = logits.float().log_softmax(-1)[self.place_of, self.targets]
        option = torch.arange(len(self.lengths), device=chosen.device).repeat_interleave(self.lengths)
        total = torch.zeros(len(self.lengths), device=chosen.device).index_add(0, option, chosen)
        per_task = (total / self.lengths).split([queries * options for queries, options in self.shape])
        return [
            mean.view(queries, options).log_softmax(-1)
            for mean, (queries, options) in zip(per_task, self.shape, strict=True)
        ]
