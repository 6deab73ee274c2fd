"""Score options by their log-probability, for T tasks at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

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
    """A prompt and its continuations side by side in one forward row: each sees the prompt and itself.

    This is tree attention (Cai et al. 2024, arXiv 2401.10774). A continuation's last token predicts nothing of
    interest, so it is not run: continuations of one token cost no more than the prompt.
    """

    prompt: list[int]
    options: list[list[int]]
    suffix: tuple[int, ...] = ()
    """What a masked model reads after the prompt, whose last token is the mask."""

    @property
    def branches(self) -> list[list[int]]:
        """The tokens of each option that are run."""
        return [option[:-1] for option in self.options]

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *chain.from_iterable(self.branches)]

    @property
    def is_forked(self) -> bool:
        """Whether there are two branches that must not see each other."""
        return sum(map(bool, self.branches)) > 1

    def predictors(self) -> list[list[int]]:
        """Return for each option the positions in `tokens` that predict its tokens."""
        bounds = accumulate(map(len, self.branches), initial=len(self.prompt))
        return [[len(self.prompt) - 1, *range(first, end)] for first, end in pairwise(bounds)]


class OptionQuery:
    """One query with its options: what is run, and what each of its tokens is chosen among.

    Options are scored as they are learned, by `rayml.lm.label_trie`. If one is the prefix of another, or labels are
    learned over the whole vocabulary, an option's score is the mean over its tokens, so that length does not decide.
    `data.scoring` may ask for the mean, or for the sum.

    Args:
        rows: one for each option (`Encoder.option_rows`).
        forks: whether the model can run options as branches of one row (`TaskLM.forks`).
    """

    def __init__(self, rows: Sequence[TokenRow], encoder: Encoder, forks: bool):
        self.rows = rows
        options = [row.tokens[row.start :] for row in rows]
        if encoder.scoring == "learned" and encoder.as_choices(options):
            trie = label_trie(options)
            self.allowed = [trie.allowed(option) for option in options]
            self.divisors = [1] * len(options)
        else:
            self.allowed = [[[] for _ in option] for option in options]
            is_mean = encoder.scoring in ("learned", "mean")
            self.divisors = [len(option) if is_mean else 1 for option in options]
        self.options = [option[: len(allowed)] for option, allowed in zip(options, self.allowed, strict=True)]
        prompts = [row.tokens[: row.start] for row in rows]
        suffix = rows[0].suffix
        shared = PrefixTree(prompts[0], self.options, suffix)
        can_share = all(prompt == prompts[0] for prompt in prompts) and (forks or not shared.is_forked)
        separate = [PrefixTree(prompt, [option], suffix) for prompt, option in zip(prompts, self.options, strict=True)]
        self.trees = [shared] if can_share else separate
        """One tree for all options if they follow the same prompt, else one for each."""


class OptionBatch:
    """The queries of T tasks, each with every option of its task: usually one forward row a query.

    Args:
        queries: of each task; all queries of a task have the same number of options.
    """

    def __init__(self, lm: TaskLM, pad: int, queries: Sequence[Sequence[OptionQuery]]):
        self.lm = lm
        self.shape = [(len(task), len(task[0].options)) for task in queries]
        trees = [[tree for query in task for tree in query.trees] for task in queries]
        rows = [[TokenRow(tree.tokens, len(tree.tokens), suffix=tree.suffix) for tree in task] for task in trees]
        self.batch = collate(rows, pad).to(lm.device)
        self._set_positions(trees)
        self._set_options([query for task in queries for query in task])
        forked = any(tree.is_forked for task in trees for tree in task)
        self.inputs = self._branch_inputs(trees) if forked else {}

    def _set_positions(self, trees: Sequence[Sequence[PrefixTree]]) -> None:
        """Set the positions with logits, and for every token of every option, `[M]`, the one that predicts it."""
        length = self.batch.tokens.shape[1]
        positions = [
            (t * self._rows_a_task + k) * length + position
            for t, task in enumerate(trees)
            for k, tree in enumerate(task)
            for predictors in tree.predictors()
            for position in predictors
        ]
        self.positions, self.position_of = torch.tensor(positions, device=self.lm.device).unique(return_inverse=True)

    def _set_options(self, queries: Sequence[OptionQuery]) -> None:
        """Set the choices of every token of every option, `[M, S]`, and the number of its option, `[M]`.

        An option's score is the sum over its tokens, divided by its entry in `divisors`, `[options]`.
        """
        device = self.lm.device
        options = [option for query in queries for option in query.options]
        allowed = stack_allowed([tokens for query in queries for option in query.allowed for tokens in option])
        targets = torch.tensor([token for option in options for token in option])
        on_host = choices(targets, allowed) if self.lm.narrow_head else Choices(None, targets, allowed)
        self.choices: Choices = map_tensors(on_host, lambda tensor: tensor.to(device))
        numbers = [number for number, option in enumerate(options) for _ in option]
        self.option_of = torch.tensor(numbers, device=device)
        self.divisors = torch.tensor([n for query in queries for n in query.divisors], device=device)

    @property
    def _rows_a_task(self) -> int:
        return len(self.batch.tokens) // self.batch.tasks

    def _branch_inputs(self, trees: Sequence[Sequence[PrefixTree]]) -> dict[str, Tensor]:
        """Return the additive attention mask `[N, 1, L, L]` and the position ids `[N, L]`."""
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
        key_branch, query_branch = branch.unsqueeze(1), branch.unsqueeze(2)
        visible = ((key_branch == 0) | (key_branch == query_branch)).tril().unsqueeze(1)
        mask = additive_mask(visible, self.lm.module.dtype)
        return {"attention_mask": mask.to(self.lm.device), "position_ids": positions.to(self.lm.device)}

    @torch.no_grad()
    def log_probs(self, weights: Params | None) -> list[Tensor]:
        """Return, for each task, the log-probabilities of its options, `[queries, options]`, normalized over them."""
        batch, choices = self.batch, self.choices
        slot = batch.frozen if self.inputs else self.lm.slot(batch)  # known states are of rows without branches
        logits = self.lm.logits_at(self.positions, weights, batch.tokens, slot, None, choices.tokens, **self.inputs)
        losses = token_losses(logits, choices.targets, choices.allowed, rows=self.position_of)
        scores = torch.zeros(len(self.divisors), device=losses.device).index_add(0, self.option_of, -losses)
        by_task = (scores / self.divisors).split([queries * options for queries, options in self.shape])
        return [task.view(shape).log_softmax(-1) for task, shape in zip(by_task, self.shape, strict=True)]


WeightedPrompts = Sequence[tuple[float, Sequence[OptionQuery]]]
"""A task's prompt ensemble: the weight of each prompt, and its queries."""


def weighted_prompts(
    lm: TaskLM, encoder: Encoder, examples: Sequence[Example], options: Sequence[str], shown: Sequence[Example] = ()
) -> WeightedPrompts:
    """Return the prompt ensemble for some inputs of a task (`Encoder.ensemble_rows`), ready to be run."""
    prompts = encoder.ensemble_rows(examples, options, shown)
    return [(weight, [OptionQuery(rows, encoder, lm.forks) for rows in queries]) for weight, queries in prompts]


def prompts_of(lm: TaskLM, encoder: Encoder, examples: Sequence[Example], label: str) -> WeightedPrompts:
    """Return the first prompt alone for some inputs, where no options are scored; `label` may be any."""
    return weighted_prompts(lm, replace(encoder, scoring="learned", ensemble=()), examples, [label])


class PromptEnsemble:
    """The queries of T tasks under several prompts, whose scores are added up with weights."""

    def __init__(self, lm: TaskLM, pad: int, tasks: Sequence[WeightedPrompts]):
        self.batches = []
        for number in range(max(map(len, tasks))):
            # A task with fewer prompts than others repeats its first with weight 0.
            prompts = [task[number] if number < len(task) else (0.0, task[0][1]) for task in tasks]
            batch = OptionBatch(lm, pad, [queries for _, queries in prompts])
            self.batches.append(([weight for weight, _ in prompts], batch))

    def log_probs(self, weights: Params | None) -> list[Tensor]:
        """Return, for each task, the log-probabilities of its options, `[queries, options]`, normalized over them."""
        by_prompt = [
            [factor * scores for factor, scores in zip(factors, batch.log_probs(weights), strict=True)]
            for factors, batch in self.batches
        ]
        if len(by_prompt) == 1:
            return by_prompt[0]
        return [sum(prompts).log_softmax(-1) for prompts in zip(*by_prompt, strict=True)]
