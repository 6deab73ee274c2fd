"""From rows to the tensors of T tasks, side by side.

Rows are padded on the right, where causal attention never looks, so no attention mask is needed. Where that would be
much padding, rows of a task are laid one behind the other, and see nothing of each other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rayml.lm.label_losses import Among, Choices, among, choices
from rayml.lm.label_trie import IGNORE, Label, LabelTrie, label_trie
from rayml.lm.rows import TokenRow

ATTENTION_TOKENS = 1500
"""In a row, about, at which attention takes as long as everything else: longer rows save padding, and cost that."""
WIDTHS = 1.0, 1.5, 2, 3, 4, 6, 8
"""Lengths that packed rows are tried with, in longest examples."""


class Scored(NamedTuple):
    """The M targets of a batch, in order, and what their losses are a mean over: found once, and not in every forward,
    as on a GPU each look at how many there are would wait for all that was queued before."""

    positions: Tensor
    """`[M]`, in the flattened tokens."""
    targets: Tensor
    """`[M]`"""
    task: Tensor
    """`[M]`: whose each is."""
    counts: Tensor
    """`[T]`: what each task's loss is divided by."""
    among: Among
    choices: Choices


class ReadAt(NamedTuple):
    """Where logits are wanted, once each: of targets, and of what follows each prompt."""

    positions: Tensor
    """`[U]`, in the flattened tokens."""
    of_targets: Tensor
    """`[M]`: each target's number among them."""
    of_ends: Tensor
    """`[T, K]`: that of each prompt's end."""
    longest_prompt: int
    """Tokens."""


def each_tensor(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a tensor, or named tuples of some, with `change` made to each; what is none stays."""
    if isinstance(part, Tensor):
        return change(part)
    return type(part)(*(each_tensor(one, change) for one in part)) if isinstance(part, tuple) else part


@dataclass(frozen=True)
class TaskBatch:
    """K rows of each of T tasks, side by side.

    `tokens` `[T * K, L]` int64, rows grouped by task, each up to the last token that a target is predicted from.
    `targets` `[T * K, L]` int64: the token that each position predicts (already shifted), IGNORE where there is none.
    Tasks with fewer rows are filled up with rows of padding. `allowed` `[M, S]` int64: the tokens that each of the M
    targets, in order, is chosen among, filled up with IGNORE; None, or a row of IGNORE: the whole vocabulary.
    `position_ids`, where rows hold several examples each: `[T * K, L]` int64, each token's position in its own example.
    `frozen`: what the layers below the adapted ones make of the tokens, `[T * K, L, D]`, once a forward has put it
    there. `examples`: the row, the position in it, and the tokens of each example. `prompts` `[T, K, 2]` int64: the
    first and the last position, in the flattened tokens, of each example's prompt, in the task's own order; 0 and 0 for
    padding.
    """

    tokens: Tensor
    targets: Tensor
    tasks: int
    allowed: Tensor | None = None
    position_ids: Tensor | None = None
    frozen: list[Tensor] = field(default_factory=list, compare=False)
    examples: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    prompts: Tensor | None = None

    def to(self, device: torch.device) -> "TaskBatch":
        """Return the batch on a device, with all that forwards ask of it; pinned memory is not waited for."""
        return self._with_each(lambda part: part.to(device, non_blocking=True))

    def pinned(self) -> "TaskBatch":
        """Return the batch in memory that a GPU reads by itself. Without a GPU there is none."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "TaskBatch":
        found = ("scored",) if self.prompts is None else ("scored", "read_at", "seen")
        names = "tokens", "targets", "allowed", "position_ids", "prompts"
        changed = replace(self, frozen=[], **{name: each_tensor(getattr(self, name), change) for name in names})
        vars(changed).update({name: each_tensor(getattr(self, name), change) for name in found})
        return changed

    @cached_property
    def scored(self) -> Scored:
        """The targets; found on the host, where `to` is what brings the batch to a device."""
        targets = self.targets.flatten()
        positions = (targets != IGNORE).nonzero().squeeze(1)
        task = positions // (len(targets) // self.tasks)
        counts = self.counted().view(self.tasks, -1).sum(1).clamp(min=1)
        found, allowed = targets[positions], self.allowed
        return Scored(positions, found, task, counts, among(allowed, len(found)), choices(found, allowed))

    @cached_property
    def read_at(self) -> ReadAt:
        assert self.prompts is not None
        begins, ends = self.prompts.unbind(-1)
        positions, found = torch.cat([self.scored.positions, ends.flatten()]).unique(return_inverse=True)
        targets = len(self.scored.positions)
        return ReadAt(positions, found[:targets], found[targets:].view_as(ends), int((ends - begins).max()) + 1)

    @cached_property
    def seen(self) -> Tensor:
        """Where tokens are no padding, `[T * K, L]` bool; a row of padding has one that is."""
        ends = [1] * len(self.tokens)
        for row, begin, tokens in self.examples:
            ends[row] = max(ends[row], begin + len(tokens))
        return (torch.arange(self.tokens.shape[1]) < torch.tensor(ends).unsqueeze(1)).to(self.tokens.device)

    @property
    def read_tokens(self) -> int:
        """Of all examples, without padding."""
        return sum(len(tokens) for _, _, tokens in self.examples)

    def take(self, rows: slice) -> "TaskBatch":
        """Return some rows of a batch of one task, of one example each."""
        assert self.position_ids is None
        taken = torch.zeros_like(self.targets, dtype=torch.bool)
        taken[rows] = True
        allowed = None if self.allowed is None else self.allowed[taken[self.targets != IGNORE]]
        return TaskBatch(self.tokens[rows], self.targets[rows], 1, allowed)

    def counted(self) -> Tensor:
        """Return what a task's loss is a mean over: target tokens of free text, whole labels. `[T * K, L]` bool."""
        targets = self.targets != IGNORE
        if self.allowed is None:
            return targets
        goes_on = nn.functional.pad(targets[:, :-1], (1, 0))
        if self.position_ids is not None:
            goes_on &= self.position_ids > 0
        is_first = targets & ~goes_on
        is_label = (self.allowed != IGNORE).any(1)
        return targets.masked_scatter(targets, is_first[targets] | ~is_label)


def collate(
    tasks: Sequence[Sequence[TokenRow]], pad: int, labels: Sequence[Sequence[Label]] = (), packs: bool = False
) -> TaskBatch:
    """Stack the rows of T tasks.

    Args:
        pad: any token, also the end-of-sequence token.
        labels: of each task, those that its targets compete with; none for the whole vocabulary.
        packs: lay rows of a task one behind the other, where that saves much of the batch.
    """
    read = [readings(task, labels[t] if labels else ()) for t, task in enumerate(tasks)]
    one_each: Packing = [[[one] for one in task] for task in read]
    packing = min([one_each, *packings(read)], key=cost) if packs else one_each
    rows, length = grid(packing)
    tokens = torch.full((len(tasks), rows, length), pad, dtype=torch.int64)
    targets = torch.full((len(tasks), rows, length), IGNORE, dtype=torch.int64)
    position_ids = torch.zeros(len(tasks), rows, length, dtype=torch.int64)
    prompts = torch.zeros(len(tasks), max(map(len, tasks)), 2, dtype=torch.int64)
    allowed: list[list[int]] = []
    held: list[tuple[int, int, tuple[int, ...]]] = []
    for t, task in enumerate(packing):
        for k, examples in enumerate(task):
            begin = 0
            for one in examples:
                end, first = begin + len(one.tokens), begin + one.first
                tokens[t, k, begin:end] = torch.tensor(one.tokens)
                position_ids[t, k, begin:end] = torch.arange(len(one.tokens))
                targets[t, k, first : first + len(one.targets)] = torch.tensor(one.targets)
                prompts[t, one.number] = (t * rows + k) * length + torch.tensor([begin, first])
                allowed += one.allowed
                held.append((t * rows + k, begin, tuple(one.tokens)))
                begin = end
    return TaskBatch(
        tokens.flatten(0, 1),
        targets.flatten(0, 1),
        len(tasks),
        allowed_grid(allowed),
        None if packing is one_each else position_ids.flatten(0, 1),
        examples=tuple(held),
        prompts=prompts,
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model reads of a row, and what it is to say."""

    tokens: list[int]
    first: int
    """The position that predicts the first target."""
    targets: list[int]
    """What each position from there on predicts; IGNORE for nothing."""
    allowed: list[list[int]]
    """Of each target that is something."""
    number: int = 0
    """Of the row in its task."""


def readings(task: Sequence[TokenRow], labels: Sequence[Label]) -> list[Reading]:
    """Return what is read of a task's rows, whose targets compete with its labels, or with the whole vocabulary."""
    trie = label_trie(labels) if labels else None
    return [reading(row, trie, number) for number, row in enumerate(task)]


def reading(row: TokenRow, trie: LabelTrie | None, number: int) -> Reading:
    """Return a row up to the last token that a target is predicted from; all of it, where it has no target."""
    target, first = row.tokens[row.start :], row.start - 1
    if trie:
        allowed = trie.allowed(target)
        target = target[: len(allowed)]
    else:
        target = [IGNORE if position in row.loss_masked else token for position, token in enumerate(target, row.start)]
        allowed = [[] for token in target if token != IGNORE]
    read = row.tokens[: first + len(target) if target else None]
    return Reading([*read, *row.suffix], first, target, allowed, number)


Packing = Sequence[Sequence[Sequence[Reading]]]
"""The examples in each row of each task."""


def packings(tasks: Sequence[Sequence[Reading]]) -> Iterator[Packing]:
    """Yield ways to lay tasks' examples into rows of about equal length."""
    example = max(len(one.tokens) for task in tasks for one in task)
    longest = max(sum(len(one.tokens) for one in task) for task in tasks)
    for rows in {ceil(longest / (width * example)) for width in WIDTHS}:
        yield [balanced(task, rows) for task in tasks]


def cost(packing: Packing) -> float:
    """Return about what a forward takes, in tokens outside of attention."""
    rows, length = grid(packing)
    return rows * length * (1 + length / ATTENTION_TOKENS)


def balanced(examples: Sequence[Reading], rows: int) -> list[list[Reading]]:
    """Return examples in so many rows: the longest first, each into the row that is shortest so far."""
    packing: list[list[Reading]] = [[] for _ in range(rows)]
    lengths = [0] * rows
    for example in sorted(examples, key=lambda one: -len(one.tokens)):
        shortest = lengths.index(min(lengths))
        packing[shortest].append(example)
        lengths[shortest] += len(example.tokens)
    return packing


def grid(packing: Packing) -> tuple[int, int]:
    """Return the rows of a task, and their length, that all tasks find room in."""
    return max(map(len, packing)), max(
        sum(len(one.tokens) for one in examples) for task in packing for examples in task
    )


def allowed_grid(allowed: Sequence[Sequence[int]]) -> Tensor | None:
    """Return what each of M targets is chosen among as `[M, S]`, filled up with IGNORE; None, if none has choices."""
    most = max(map(len, allowed), default=0)
    filled = [[*some, *[IGNORE] * (most - len(some))] for some in allowed]
    return torch.tensor(filled, dtype=torch.int64) if most else None
