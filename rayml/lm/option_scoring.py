"""Choose among options by their log-probability, for T tasks at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from rayml.algorithms.inner_loop import Params
from rayml.lm.batch import collate, map_tensors, stack_allowed
from rayml.lm.encode import Encoder
from rayml.lm.label_losses import Choices, choices, token_losses
from rayml.lm.label_trie import label_trie
from rayml.lm.model import TaskLM, additive_mask
from rayml.lm.rows import TokenRow
from rayml.tasks.task import Example


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """A prompt, and continuations of it side by side in one forward row: each sees the prompt and itself.

    As in tree attention (Cai et al. 2024, arXiv 2401.10774). A continuation's last token predicts nothing that is
    asked, and is not run: continuations of one token cost no more than the prompt.
    """

    prompt: list[int]
    options: list[list[int]]
    suffix: tuple[int, ...] = ()
    """What a masked model reads behind the prompt, whose last token is the mask."""

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
        """Return for each option the positions in `tokens` that predict its tokens."""
        lengths = [len(branch) for branch in self.branches]
        firsts = accumulate(lengths[:-1], initial=len(self.prompt))
        return [
            [len(self.prompt) - 1, *range(first, first + length)] for first, length in zip(firsts, lengths, strict=True)
        ]


class OptionQuery:
    """One query with its options: what is run, and what each of its tokens is chosen among.

    Options are scored as they are learned, by `rayml.lm.label_trie`. Where they cannot be told apart token by token, or
    are learned over the vocabulary, the mean over an option's tokens is its score, so that length does not decide.
    `data.scoring` may ask for the mean, or for the sum.
    """

    def __init__(self, rows: Sequence[TokenRow], encoder: Encoder, forks: bool):
        """Take a row for each option (`Encoder.option_rows`)."""
        self.rows = rows
        whole = [row.tokens[row.start :] for row in rows]
        if encoder.scoring == "learned" and encoder.as_choices(whole):
            among = label_trie(whole)
            self.allowed = [among.allowed(option) for option in whole]
            self.divisors = [1] * len(whole)
        else:
            self.allowed = [[[] for _ in option] for option in whole]
            is_mean = encoder.scoring in ("learned", "mean")
            self.divisors = [len(option) if is_mean else 1 for option in whole]
        self.options = [option[: len(among)] for option, among in zip(whole, self.allowed, strict=True)]
        prompts = [row.tokens[: row.start] for row in rows]
        suffix = rows[0].suffix
        together = PrefixTree(prompts[0], self.options, suffix)
        shared = all(prompt == prompts[0] for prompt in prompts) and (forks or not together.is_forked)
        apart = [PrefixTree(prompt, [option], suffix) for prompt, option in zip(prompts, self.options, strict=True)]
        self.trees = [together] if shared else apart
        """One for all options, if they follow the same prompt, else one each."""


class OptionBatch:
    """The queries of T tasks, each with every option of its task: as a rule one forward row a query."""

    def __init__(self, lm: TaskLM, pad: int, queries: Sequence[Sequence[OptionQuery]]):
        """Take each task's queries; all of a task have as many options."""
        self.lm = lm
        self.shape = [(len(task), len(task[0].options)) for task in queries]
        trees = [[tree for query in task for tree in query.trees] for task in queries]
        rows = [[TokenRow(tree.tokens, len(tree.tokens), suffix=tree.suffix) for tree in task] for task in trees]
        self.batch = collate(rows, pad).to(lm.device)
        self._note_positions(trees)
        self._note_options([query for task in queries for query in task])
        forked = any(tree.is_forked for task in trees for tree in task)
        self.inputs = self._branching(trees) if forked else {}

    def _note_positions(self, trees: Sequence[Sequence[PrefixTree]]) -> None:
        """Note the positions with logits, and for every token of every option, `[M]`, which of them predicts it."""
        length = self.batch.tokens.shape[1]
        positions = [
            (t * self._rows_a_task + k) * length + position
            for t, task in enumerate(trees)
            for k, tree in enumerate(task)
            for predictors in tree.predictors()
            for position in predictors
        ]
        self.positions, self.position_of = torch.tensor(positions, device=self.lm.device).unique(return_inverse=True)

    def _note_options(self, queries: Sequence[OptionQuery]) -> None:
        """Note every token of every option, `[M]`: what it is chosen among, `[M, S]`, and its option's number.

        An option's score is the sum over its tokens, over `divisors` `[options]`.
        """
        device = self.lm.device
        options = [option for query in queries for option in query.options]
        allowed = stack_allowed([among for query in queries for of in query.allowed for among in of])
        targets = torch.tensor([token for option in options for token in option])
        found = choices(targets, allowed) if self.lm.narrow_head else Choices(None, targets, allowed)
        self.choices: Choices = map_tensors(found, lambda tensor: tensor.to(device))
        numbers = [number for number, option in enumerate(options) for _ in option]
        self.option_of = torch.tensor(numbers, device=device)
        self.divisors = torch.tensor([each for query in queries for each in query.divisors], device=device)

    @property
    def _rows_a_task(self) -> int:
        return len(self.batch.tokens) // self.batch.tasks

    def _branching(self, trees: Sequence[Sequence[PrefixTree]]) -> dict[str, Tensor]:
        """Return the attention mask `[N, 1, L, L]`, added to the scores, and the positions `[N, L]`."""
        rows, length = self.batch.tokens.shape
        branch = torch.zeros(rows, length, dtype=torch.int64)
        positions = torch.arange(length).repeat(rows, 1)
        for t, task in enumerate(trees):
            for k, tree in enumerate(task):
                row, position = t * self._rows_a_task + k, len(tree.prompt)
                for number, tokens in enumerate(tree.branches, 1):
                    end = position + len(tokens)
                    branch[row, position:end] = number
                    positions[row, position:end] = torch.arange(len(tokens)) + len(tree.prompt)
                    position = end
        of_key, of_query = branch.unsqueeze(1), branch.unsqueeze(2)
        visible = ((of_key == 0) | (of_key == of_query)).tril().unsqueeze(1)
        mask = additive_mask(visible, self.lm.module.dtype)
        return {"attention_mask": mask.to(self.lm.device), "position_ids": positions.to(self.lm.device)}

    @torch.no_grad()
    def log_probs(self, weights: Params | None) -> list[Tensor]:
        """Return, for each task, `[queries, options]`: log-probability of the options, normalized over them."""
        batch = self.batch
        slot = batch.frozen if self.inputs else self.lm.slot(batch)  # what is forked sees otherwise than alone
        chosen = self.choices
        logits = self.lm.logits_at(self.positions, weights, batch.tokens, slot, None, chosen.tokens, **self.inputs)
        losses = token_losses(logits, chosen.targets, chosen.allowed, rows=self.position_of)
        scores = torch.zeros(len(self.divisors), device=losses.device).index_add(0, self.option_of, -losses)
        per_task = (scores / self.divisors).split([queries * options for queries, options in self.shape])
        return [
            of.view(queries, options).log_softmax(-1)
            for of, (queries, options) in zip(per_task, self.shape, strict=True)
        ]


WeightedPrompts = Sequence[tuple[float, Sequence[OptionQuery]]]
"""A task's prompt ensemble: every prompt's weight, and its queries."""


def weighted_prompts(
    lm: TaskLM, encoder: Encoder, examples: Sequence[Example], options: Sequence[str], shown: Sequence[Example] = ()
) -> WeightedPrompts:
    """Return what is asked about some inputs of a task, as `Encoder.questions` does, ready to be run."""
    found = encoder.ensemble_rows(examples, options, shown)
    return [(share, [OptionQuery(rows, encoder, lm.forks) for rows in queries]) for share, queries in found]


def prompts_of(lm: TaskLM, encoder: Encoder, examples: Sequence[Example], label: str) -> WeightedPrompts:
    """Return what is run of some inputs where no option is scored: the first prompt alone, behind any label's row."""
    return weighted_prompts(lm, replace(encoder, scoring="learned", ensemble=()), examples, [label])


class PromptEnsemble:
    """The queries of T tasks under several prompts, whose answers are weighed."""

    def __init__(self, lm: TaskLM, pad: int, tasks: Sequence[WeightedPrompts]):
        """Take each task's prompts; a task of fewer prompts than others is asked again, for nothing."""
        self.batches = []
        for number in range(max(map(len, tasks))):
            asked = [task[number] if number < len(task) else (0.0, task[0][1]) for task in tasks]
            batch = OptionBatch(lm, pad, [queries for _, queries in asked])
            self.batches.append(([weight for weight, _ in asked], batch))

    def log_probs(self, weights: Params | None) -> list[Tensor]:
        """Return, for each task, `[queries, options]`: log-probability of the options, normalized over them."""
        found = [[w * of for w, of in zip(share, b.log_probs(weights), strict=True)] for share, b in self.batches]
        return found[0] if len(found) == 1 else [sum(of).log_softmax(-1) for of in zip(*found, strict=True)]
