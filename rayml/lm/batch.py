"""Batch the rows of T tasks side by side as tensors.

Rows are padded on the right, where causal attention never looks, so no attention mask is needed. Where that would take
much padding, several examples of a task are packed into one row, without seeing each other.
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
"""Row length at which attention takes about as long as everything else: long rows save padding, but cost attention."""
WIDTHS = 1.0, 1.5, 2, 3, 4, 6, 8
"""Lengths of packed rows to try, as multiples of the longest example."""


class Scored(NamedTuple):
    """The M targets of a batch, in order, and what each task's loss is a mean over.

    They are found once, on the host: on a GPU, counting them in every forward would wait for all queued work.
    """

    positions: Tensor
    """`[M]`, in the flattened tokens."""
    targets: Tensor
    """`[M]`"""
    task: Tensor
    """`[M]`: the task of each."""
    counts: Tensor
    """`[T]`: the divisor of each task's loss."""
    among: Among
    choices: Choices


class ReadAt(NamedTuple):
    """The positions where logits are needed, without repeats: for targets, and at the end of each prompt."""

    positions: Tensor
    """`[U]`, in the flattened tokens."""
    of_targets: Tensor
    """`[M]`: the index into `positions` of each target."""
    of_ends: Tensor
    """`[T, K]`: the index into `positions` of each prompt's end."""
    longest_prompt: int
    """In tokens."""


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to a tensor, or to every tensor in nested named tuples; other values stay."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(*(map_tensors(item, change) for item in value)) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class TaskBatch:
    """K rows of each of T tasks, side by side; tasks with fewer rows get rows of padding. All but `frozen` is int64."""

    tokens: Tensor
    """`[T * K, L]`: rows grouped by task, each up to the last token that a target is predicted from."""
    targets: Tensor
    """`[T * K, L]`: the token that each position predicts (already shifted), IGNORE where there is none."""
    tasks: int
    allowed: Tensor | None = None
    """`[M, S]`: the tokens that each of the M targets, in order, is chosen among, padded with IGNORE. None, or a row of
    IGNORE, stands for the whole vocabulary."""
    position_ids: Tensor | None = None
    """`[T * K, L]`: each token's position in its own example; None where a row holds one example."""
    frozen: list[Tensor] = field(default_factory=list, compare=False)
    """The output of the layers below the adapted ones, `[T * K, L, D]`, after a forward has put it there."""
    examples: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    """The row of each example, its first position in that row, and its tokens."""
    prompts: Tensor | None = None
    """`[T, K, 2]`: the first and last position of each example's prompt in the flattened tokens, in the task's own
    order; 0 and 0 for padding."""
    pairs: "TaskBatch | None" = None
    """The two texts of each example that is a pair for a sentence encoder, one after the other: `[T * 2 K, L]`, those
    of other examples with one token. None if there are no pairs."""
    is_pair: Tensor | None = None
    """`[T, K]` bool, if there are pairs: which examples are."""

    def to(self, device: torch.device) -> "TaskBatch":
        """Return the batch on a device, with all that forwards need of it; a copy from pinned memory does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "TaskBatch":
        """Return the batch in pinned memory, which needs a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TaskBatch":
        names = "tokens", "targets", "allowed", "position_ids", "prompts", "is_pair"
        cached = ("scored",) if self.prompts is None else ("scored", "read_at", "seen")
        mapped = {name: map_tensors(getattr(self, name), change) for name in names}
        changed = replace(self, frozen=[], pairs=self.pairs and self.pairs._map(change), **mapped)
        vars(changed).update({name: map_tensors(getattr(self, name), change) for name in cached})
        return changed

    @cached_property
    def scored(self) -> Scored:
        """The targets, found on the host before `to` moves the batch to a device."""
        targets = self.targets.flatten()
        positions = (targets != IGNORE).nonzero().squeeze(1)
        task = positions // (len(targets) // self.tasks)
        counts = self.loss_mask().view(self.tasks, -1).sum(1).clamp(min=1)
        targets, allowed = targets[positions], self.allowed
        return Scored(positions, targets, task, counts, among(allowed, len(targets)), choices(targets, allowed))

    @cached_property
    def read_at(self) -> ReadAt:
        assert self.prompts is not None
        begins, ends = self.prompts.unbind(-1)
        positions, index = torch.cat([self.scored.positions, ends.flatten()]).unique(return_inverse=True)
        of_targets, of_ends = index[: -ends.numel()], index[-ends.numel() :].view_as(ends)
        return ReadAt(positions, of_targets, of_ends, int((ends - begins).max()) + 1)

    @cached_property
    def seen(self) -> Tensor:
        """Where tokens are not padding, `[T * K, L]` bool; a row of padding has its first token marked."""
        ends = [1] * len(self.tokens)
        for row, begin, tokens in self.examples:
            ends[row] = max(ends[row], begin + len(tokens))
        return (torch.arange(self.tokens.shape[1]) < torch.tensor(ends).unsqueeze(1)).to(self.tokens.device)

    @property
    def read_tokens(self) -> int:
        """The tokens of all examples, without padding."""
        return sum(len(tokens) for _, _, tokens in self.examples)

    def take(self, rows: slice) -> "TaskBatch":
        """Return some rows of a batch of one task with one example a row."""
        assert self.position_ids is None
        is_taken = torch.zeros_like(self.targets, dtype=torch.bool)
        is_taken[rows] = True
        allowed = None if self.allowed is None else self.allowed[is_taken[self.targets != IGNORE]]
        return TaskBatch(self.tokens[rows], self.targets[rows], 1, allowed)

    def loss_mask(self) -> Tensor:
        """Return what a task's loss is a mean over, `[T * K, L]` bool: every token of free text, one token a label."""
        is_target = self.targets != IGNORE
        if self.allowed is None:
            return is_target
        continues = nn.functional.pad(is_target[:, :-1], (1, 0))
        if self.position_ids is not None:
            continues &= self.position_ids > 0
        is_first = is_target & ~continues
        is_label = (self.allowed != IGNORE).any(1)
        return is_target.masked_scatter(is_target, is_first[is_target] | ~is_label)


def collate(
    tasks: Sequence[Sequence[TokenRow]], pad: int, labels: Sequence[Sequence[Label]] = (), packs: bool = False
) -> TaskBatch:
    """Stack the rows of T tasks.

    Args:
        pad: any token; the end-of-sequence token will do.
        labels: for each task, the labels that its targets compete with; empty for the whole vocabulary.
        packs: put several examples of a task into one row, if that makes the batch cheaper.
    """
    examples = [readings(task, labels[t] if labels else ()) for t, task in enumerate(tasks)]
    one_each: Packing = [[[example] for example in task] for task in examples]
    packing = min([one_each, *candidate_packings(examples)], key=forward_cost) if packs else one_each
    rows, length = packed_shape(packing)
    tokens = torch.full((len(tasks), rows, length), pad, dtype=torch.int64)
    targets = torch.full((len(tasks), rows, length), IGNORE, dtype=torch.int64)
    position_ids = torch.zeros(len(tasks), rows, length, dtype=torch.int64)
    prompts = torch.zeros(len(tasks), max(map(len, tasks)), 2, dtype=torch.int64)
    allowed: list[list[int]] = []
    located: list[tuple[int, int, tuple[int, ...]]] = []
    for t, packed_task in enumerate(packing):
        for k, row in enumerate(packed_task):
            begin = 0
            for example in row:
                end, first = begin + len(example.tokens), begin + example.first
                tokens[t, k, begin:end] = torch.tensor(example.tokens)
                position_ids[t, k, begin:end] = torch.arange(len(example.tokens))
                targets[t, k, first : first + len(example.targets)] = torch.tensor(example.targets)
                prompts[t, example.number] = (t * rows + k) * length + torch.tensor([begin, first])
                allowed += example.allowed
                located.append((t * rows + k, begin, tuple(example.tokens)))
                begin = end
    return TaskBatch(
        tokens.flatten(0, 1),
        targets.flatten(0, 1),
        len(tasks),
        stack_allowed(allowed),
        None if packing is one_each else position_ids.flatten(0, 1),
        examples=tuple(located),
        prompts=prompts,
        **pairs_of(tasks, pad),
    )


def pairs_of(tasks: Sequence[Sequence[TokenRow]], pad: int) -> dict[str, Any]:
    """Return a batch's texts of pairs, and which examples are pairs; nothing if none is."""
    are_pairs = [torch.tensor([bool(row.pair) for row in task]) for task in tasks]
    if not any(some.any() for some in are_pairs):
        return {}
    texts = [[text for row in task for text in row.pair or ((pad,), (pad,))] for task in tasks]
    rows = [[TokenRow(list(tokens), len(tokens)) for tokens in task] for task in texts]
    return {"pairs": collate(rows, pad), "is_pair": nn.utils.rnn.pad_sequence(are_pairs, batch_first=True)}


@dataclass(frozen=True, slots=True)
class Reading:
    """The part of a row that the model reads, and its targets."""

    tokens: list[int]
    first: int
    """The position that predicts the first target."""
    targets: list[int]
    """What each position from `first` on predicts; IGNORE for nothing."""
    allowed: list[list[int]]
    """The choices of each target that is not IGNORE; empty for the whole vocabulary."""
    number: int = 0
    """The row's index in its task."""


def readings(task: Sequence[TokenRow], labels: Sequence[Label]) -> list[Reading]:
    """Return the readings of a task's rows, whose targets compete with `labels`, or with the whole vocabulary."""
    trie = label_trie(labels) if labels else None
    return [read_row(row, trie, number) for number, row in enumerate(task)]


def read_row(row: TokenRow, trie: LabelTrie | None, number: int) -> Reading:
    """Return a row up to the last token that a target is predicted from, or all of a row without a target."""
    target, first = row.tokens[row.start :], row.start - 1
    if trie:
        allowed = trie.allowed(target)
        target = target[: len(allowed)]
    else:
        target = [IGNORE if position in row.loss_masked else token for position, token in enumerate(target, row.start)]
        allowed = [[] for token in target if token != IGNORE]
    tokens = row.tokens[: first + len(target) if target else None]
    return Reading([*tokens, *row.suffix], first, target, allowed, number)


Packing = Sequence[Sequence[Sequence[Reading]]]
"""The examples in each row of each task."""


def candidate_packings(tasks: Sequence[Sequence[Reading]]) -> Iterator[Packing]:
    """Yield ways to pack each task's examples into rows of about equal length."""
    longest_example = max(len(example.tokens) for task in tasks for example in task)
    longest_task = max(sum(len(example.tokens) for example in task) for task in tasks)
    for rows in {ceil(longest_task / (width * longest_example)) for width in WIDTHS}:
        yield [pack(task, rows) for task in tasks]


def forward_cost(packing: Packing) -> float:
    """Return the approximate cost of a forward, in tokens outside of attention."""
    rows, length = packed_shape(packing)
    return rows * length * (1 + length / ATTENTION_TOKENS)


def pack(examples: Sequence[Reading], rows: int) -> list[list[Reading]]:
    """Put examples into rows: the longest first, each into the row that is shortest so far."""
    packed: list[list[Reading]] = [[] for _ in range(rows)]
    lengths = [0] * rows
    for example in sorted(examples, key=lambda example: -len(example.tokens)):
        shortest = lengths.index(min(lengths))
        packed[shortest].append(example)
        lengths[shortest] += len(example.tokens)
    return packed


def packed_shape(packing: Packing) -> tuple[int, int]:
    """Return the most rows that a task has, and the length of the longest row."""
    length = max(sum(len(example.tokens) for example in row) for task in packing for row in task)
    return max(map(len, packing)), length


def stack_allowed(allowed: Sequence[Sequence[int]]) -> Tensor | None:
    """Return the choices of M targets as `[M, S]`, padded with IGNORE; None if no target has choices."""
    most = max(map(len, allowed), default=0)
    padded = [[*tokens, *[IGNORE] * (most - len(tokens))] for tokens in allowed]
    return torch.tensor(padded, dtype=torch.int64) if most else None
