"""The frozen layers below the first adapted one, whose output depends on a batch's tokens alone.

It is computed once for each batch, however many inner steps and scorings follow: with adapters in the last 10 of 30
layers, every forward after the first runs 10. Where examples come back in later episodes, it is computed once for all
of training.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rayml.lm.batch import TaskBatch
from rayml.lm.rows import TokenRow

if TYPE_CHECKING:
    from rayml.lm.model import TaskLM

P = TypeVar("P")
BLOCK_TOKENS = 2048
"""Tokens that go through the layers in one forward when the states of all examples are computed."""


class _StopForward(Exception):  # noqa: N818
    """Ends a forward above the frozen layers."""


class FrozenLayers:
    """The first `count` decoder layers of a causal LM, which are skipped where their output is known."""

    def __init__(self, model: Any, count: int):
        self.slot: list[Tensor] | None = None
        self.stops = False
        layers = decoder_layers(model)[:count]
        for index, layer in enumerate(layers):
            layer.forward = self._skippable(layer.forward, is_first=index == 0)
        layers[-1].register_forward_hook(self._keep)

    def _skippable(self, forward: Any, is_first: bool) -> Any:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.slot:
                return forward(hidden_states, *args, **kwargs)
            # The first layer returns the known output, so that it is the input of every layer above, where a
            # checkpointed backward finds it.
            return self.slot[0] if is_first else hidden_states

        return run

    def _keep(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        if self.slot is not None and not self.slot and isinstance(output, Tensor):
            self.slot.append(output.detach())
            if self.stops:
                raise _StopForward

    @contextmanager
    def known(self, slot: list[Tensor] | None) -> Iterator[None]:
        """Read the layers' output from `slot` inside the block, or store it there if empty; None does neither."""
        self.slot = slot
        try:
            yield
        finally:
            self.slot = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run forwards inside the block through these layers only, and not the layers above them."""
        self.stops = True
        try:
            with suppress(_StopForward):
                yield
        finally:
            self.stops = False


class KnownStates:
    """The frozen layers' output for all examples, to be looked up by batches of those examples.

    Args:
        rows: the examples; a batch may read a target up to any of its tokens.
        states: of the tokens of all rows, in order, `[tokens, D]`.
    """

    def __init__(self, rows: Sequence[TokenRow], states: Tensor):
        self.states = states
        self.first: dict[tuple[int, ...], int] = {}
        begin = 0
        for row in rows:
            for end in range(row.start, len(row.tokens) + 1):
                self.first[tuple(row.tokens[:end])] = begin
            begin += len(row.tokens)

    def of(self, batch: TaskBatch) -> Tensor | None:
        """Return the states of a batch, `[T * K, L, D]`; None if an example of it is unknown."""
        index = torch.zeros(batch.tokens.shape, dtype=torch.int64)
        for row, begin, tokens in batch.examples:
            first = self.first.get(tokens)
            if first is None:
                return None
            index[row, begin : begin + len(tokens)] = torch.arange(first, first + len(tokens))
        return self.states[index.to(self.states.device)].to(batch.tokens.device)


class WorkerShare(NamedTuple):
    """A worker's share of parts that the workers divide in turn: numbers `rank`, `rank + workers` and so on."""

    rank: int = 0
    workers: int = 1
    gather: Callable[[Tensor], list[Tensor]] = lambda mine: [mine]
    """Turns this worker's `[n, D]`, where n may be 0, into the list of all workers' tensors by rank."""

    def of(self, parts: Sequence[P]) -> Sequence[P]:
        return parts[self.rank :: self.workers]

    def join(self, mine: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the results of all workers in the order of the parts, given this worker's results.

        Args:
            mine: the results for this worker's parts, `[rows, D]`.
            sizes: the rows of each part.
        """
        gathered = enumerate(self.gather(mine))
        by_rank = [iter(results.split(list(sizes[rank :: self.workers]))) for rank, results in gathered]
        return torch.cat([next(by_rank[index % self.workers]) for index in range(len(sizes))])


ALONE = WorkerShare()


def compute_known_states(
    lm: "TaskLM",
    rows: Sequence[TokenRow],
    pad: int,
    share: WorkerShare = ALONE,
    progress: Callable[[int], None] = lambda done: None,
    room: Callable[[Tensor, tuple[int, int]], Tensor | None] = Tensor.new_empty,
) -> KnownStates | None:
    """Run rows through the frozen layers once; return None if `room` finds no room for the states.

    Args:
        share: this worker's share of the blocks of rows; the blocks do not depend on the number of workers.
        progress: is called with the percentage of rows that is done.
        room: makes the tensor `[tokens, D]` for the states, like one of `[0, D]`; by default on the model's device.
    """
    unique, row_blocks = blocks(rows)
    sizes = [sum(len(row.tokens) for row in block) for block in row_blocks]
    empty = lm.frozen_states(row_blocks[0][:1], pad)[:0]  # some models' layers are wider than their embeddings
    states = room(empty, (sum(sizes), empty.shape[1]))
    if states is None:
        return None
    unfilled = states
    for first in range(0, len(row_blocks), share.workers):  # one block for each worker at a time
        progress(100 * first // len(row_blocks))
        turn = slice(first, first + share.workers)
        mine = share.of(row_blocks[turn])
        computed = share.join(lm.frozen_states(mine[0], pad) if mine else empty, sizes[turn])
        unfilled[: len(computed)], unfilled = computed, unfilled[len(computed) :]
    return KnownStates(unique, states)


def tensor_in_file(like: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a tensor backed by a temporary file, which goes when the process ends.

    The system caches what is read in free memory.

    Raises:
        OSError: there is no room.
    """
    size = math.prod(shape)
    with tempfile.NamedTemporaryFile(prefix="rayml-states-") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS; without it, a disk that fills up later ends the process
            os.posix_fallocate(file.fileno(), 0, size * like.element_size())
        try:
            return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype).view(shape)
        except RuntimeError as error:
            raise OSError(f"{file.name}: {error}") from error


def blocks(rows: Sequence[TokenRow]) -> tuple[list[TokenRow], list[list[TokenRow]]]:
    """Return the unique rows, ordered by length and tokens, and the same in blocks of rows of similar length."""
    unique = list({tuple(row.tokens): row for row in rows}.values())
    unique.sort(key=lambda row: (len(row.tokens), row.tokens))
    row_blocks: list[list[TokenRow]] = [[]]
    for row in unique:
        if (len(row_blocks[-1]) + 1) * len(row.tokens) > BLOCK_TOKENS and row_blocks[-1]:
            row_blocks.append([])
        row_blocks[-1].append(row)
    return unique, row_blocks


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the decoder layers of a causal LM, in order."""
    count = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
