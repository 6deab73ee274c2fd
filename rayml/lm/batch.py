"""From text to the tensors of T tasks.

A row is a prompt and its target, tokenised together: tokenising the parts alone can give other tokens at the seam.
Rows are padded on the right, where causal attention never looks, so no attention mask is needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayml.errors import DataError
from rayml.lm.choices import IGNORE, Competition, Label


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised example: `tokens[start:]` is the target."""

    tokens: list[int]
    start: int


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """K rows of each of T tasks, side by side.

    `tokens` `[T * K, L]` int64, rows grouped by task. `targets` `[T * K, L]` int64: the token that each position
    predicts (already shifted), IGNORE where there is none. Tasks with fewer rows are filled up with rows of padding.
    `choices` `[M, S]` int64: the tokens that each of the M targets, in order, is chosen among, filled up with IGNORE;
    None, or a row of IGNORE: the whole vocabulary. `frozen`: what the layers below the adapted ones make of the tokens,
    `[T * K, L, D]`, once a forward has put it there.
    """

    tokens: Tensor
    targets: Tensor
    tasks: int
    choices: Tensor | None = None
    frozen: list[Tensor] = field(default_factory=list, compare=False)

    def to(self, device: torch.device) -> "TaskBatch":
        choices = None if self.choices is None else self.choices.to(device)
        return TaskBatch(self.tokens.to(device), self.targets.to(device), self.tasks, choices)

    def take(self, rows: slice) -> "TaskBatch":
        """Return some rows of a batch of one task."""
        taken = torch.zeros_like(self.targets, dtype=torch.bool)
        taken[rows] = True
        choices = None if self.choices is None else self.choices[taken[self.targets != IGNORE]]
        return TaskBatch(self.tokens[rows], self.targets[rows], 1, choices)

    def counted(self) -> Tensor:
        """Return what a task's loss is a mean over: target tokens of free text, whole labels. `[T * K, L]` bool."""
        targets = self.targets != IGNORE
        if self.choices is None:
            return targets
        is_first = targets & ~targets.roll(1, dims=1)  # no row's last position has a target
        is_label = (self.choices != IGNORE).any(1)
        return targets.masked_scatter(targets, is_first[targets] | ~is_label)


def encode(
    tokenizer, prompt: str, target: str, end: bool, max_tokens: int, keep: Callable[[int], bool] | None = None
) -> Row:
    """Tokenise `prompt + target`, once, and cut the *prompt* from the left to fit `max_tokens`.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        end: add the end-of-sequence token to the target (free text, so that generation learns to stop).
        keep: whether to keep the token of the prompt that begins at this character; all, if None.

    Raises:
        DataError: the target has no token, or leaves no room for the prompt.
    """
    encoding = tokenizer(prompt + target, add_special_tokens=True, return_offsets_mapping=True)
    tokens, offsets = encoding["input_ids"], encoding["offset_mapping"]
    start = next((i for i, (_, stop) in enumerate(offsets) if stop > len(prompt)), len(tokens))
    if not target.strip() or start == len(tokens):
        raise DataError(f"target {target!r} has no token (input: {prompt[:60]!r})")
    if keep is not None:
        # A token of no width, such as the beginning of the sequence, is no part of the text.
        kept = [i for i, (a, b) in enumerate(offsets) if i >= start or a == b or keep(a)]
        tokens, start = [tokens[i] for i in kept], start - (len(tokens) - len(kept))
    if end:
        tokens = [*tokens, tokenizer.eos_token_id]
    start = max(start, 1)  # the first token has nothing to be predicted from
    cut = max(0, len(tokens) - max_tokens)
    if start - cut < 1:
        raise DataError(
            f"target {target[:60]!r} has {len(tokens) - start} tokens, which leaves no room for its input within "
            f"data.max_tokens={max_tokens}; raise it or shorten the target"
        )
    first = tokens[:1] if cut and tokens[0] == tokenizer.bos_token_id else []  # models lean on it
    return Row(first + tokens[cut + len(first) :], start - cut)


def collate(tasks: Sequence[Sequence[Row]], pad: int, labels: Sequence[Sequence[Label]] = ()) -> TaskBatch:
    """Stack the rows of T tasks.

    Args:
        pad: any token, also the end-of-sequence token.
        labels: of each task, those that its targets compete with; none for the whole vocabulary.
    """
    rows = max(len(task) for task in tasks)
    length = max(len(row.tokens) for task in tasks for row in task)
    tokens = torch.full((len(tasks), rows, length), pad, dtype=torch.int64)
    targets = torch.full((len(tasks), rows, length), IGNORE, dtype=torch.int64)
    choices: list[list[int]] = []
    for t, task in enumerate(tasks):
        competition = Competition(labels[t]) if labels and labels[t] else None
        for k, row in enumerate(task):
            ids = torch.tensor(row.tokens)
            tokens[t, k, : len(ids)] = ids
            target = row.tokens[row.start :]
            among = competition.choices(target) if competition else [[] for _ in target]
            choices += among
            targets[t, k, row.start - 1 : row.start - 1 + len(among)] = ids[row.start : row.start + len(among)]
    return TaskBatch(tokens.flatten(0, 1), targets.flatten(0, 1), len(tasks), choice_grid(choices))


def choice_grid(choices: Sequence[Sequence[int]]) -> Tensor | None:
    """Return what each of M targets is chosen among as `[M, S]`, filled up with IGNORE; None, if none has choices."""
    most = max(map(len, choices), default=0)
    filled = [[*some, *[IGNORE] * (most - len(some))] for some in choices]
    return torch.tensor(filled, dtype=torch.int64) if most else None
