"""The frozen layers below the first adapted one: what they make of a batch depends on its tokens alone.

So it is computed once for each batch, however many inner steps and scorings follow: with adapters in the last 10 of 30
layers, every forward after the first runs 10. And where examples come back in later episodes, once for all of training.
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
"""Of examples that go through the layers together, when all of them do."""


class _AllIsKnown(Exception):  # noqa: N818
    """The layers have run: what lies above them need not."""


class FrozenLayers:
    """The first `count` decoder layers of a causal LM, which are skipped where their output is known."""

    def __init__(self, model: Any, count: int):
        self.slot: list[Tensor] | None = None
        self.is_enough = False
        layers = decoder_layers(model)[:count]
        for index, layer in enumerate(layers):
            layer.forward = self._skippable(layer.forward, is_first=index == 0)
        layers[-1].register_forward_hook(self._keep)

    def _skippable(self, forward: Any, is_first: bool) -> Any:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.slot:
                return forward(hidden_states, *args, **kwargs)
            # The first gives what is known, so that every layer above has it as its input, and a checkpointed
            # backward finds it there.
            return self.slot[0] if is_first else hidden_states

        return run

    def _keep(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        if self.slot is not None and not self.slot and isinstance(output, Tensor):
            self.slot.append(output.detach())
            if self.is_enough:
                raise _AllIsKnown

    @contextmanager
    def known(self, slot: list[Tensor] | None) -> Iterator[None]:
        """Take the layers' output from `slot` inside the block, or put it there; None computes it and forgets it."""
        self.slot = slot
        try:
            yield
        finally:
            self.slot = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """End a forward inside the block where these layers end: what lies above them is not wanted."""
        self.is_enough = True
        try:
            with suppress(_AllIsKnown):
                yield
        finally:
            self.is_enough = False


class KnownStates:
    """What the frozen layers make of examples that come back: looked up, where a batch holds nothing else.

    Args:
        rows: the examples; a batch may read a target up to any of its tokens.
        states: of all their tokens, one example behind the other, `[tokens, D]`.
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
        """Return the states of a batch, `[T * K, L, D]`; None, if it holds an example that is not known."""
        index = torch.zeros(batch.tokens.shape, dtype=torch.int64)
        for row, begin, tokens in batch.examples:
            first = self.first.get(tokens)
            if first is None:
                return None
            index[row, begin : begin + len(tokens)] = torch.arange(first, first + len(tokens))
        return self.states[index.to(self.states.device)].to(batch.tokens.device)


def alone(part: Tensor) -> list[Tensor]:
    """Gather from one worker, this one."""
    return [part]


class Share(NamedTuple):
    """A worker's share of parts that all workers divide: `rank`, `rank + workers` and so on."""

    rank: int = 0
    workers: int = 1
    gather: Callable[[Tensor], list[Tensor]] = alone
    """From this worker's `[n, D]`, n may be 0, to those of all workers, by rank."""

    def of(self, parts: Sequence[P]) -> Sequence[P]:
        return parts[self.rank :: self.workers]

    def joined(self, mine: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return what all workers made of the parts, one behind the other, from what this one made of its share.

        Args:
            sizes: rows of each part.
        """
        split = [iter(of.split(list(sizes[rank :: self.workers]))) for rank, of in enumerate(self.gather(mine))]
        return torch.cat([next(split[index % self.workers]) for index in range(len(sizes))])


ALONE = Share()


def known_states(
    lm: "TaskLM",
    rows: Sequence[TokenRow],
    pad: int,
    share: Share = ALONE,
    progress: Callable[[int], None] = lambda done: None,
    room: Callable[[Tensor, tuple[int, int]], Tensor | None] = Tensor.new_empty,
) -> KnownStates | None:
    """Run rows through the frozen layers once; return None, if there is no room for what they make of them.

    Args:
        share: this worker's, of the blocks of rows; the same rows make the same blocks for any number of workers.
        progress: is told the share of the rows that is done, in per cent.
        room: makes a tensor `[tokens, D]` for the states, like one `[0, D]`; where the model lies, if not given.
    """
    unique, parts = blocks(rows)
    sizes = [sum(len(row.tokens) for row in block) for block in parts]
    nothing = lm.frozen_states(parts[0][:1], pad)[:0]  # some models' layers are wider than their embeddings
    states = room(nothing, (sum(sizes), nothing.shape[1]))
    if states is None:
        return None
    left = states
    for first in range(0, len(parts), share.workers):  # a block each at a time
        progress(100 * first // len(parts))
        turn = slice(first, first + share.workers)
        mine = share.of(parts[turn])
        found = share.joined(lm.frozen_states(mine[0], pad) if mine else nothing, sizes[turn])
        left[: len(found)], left = found, left[len(found) :]
    return KnownStates(unique, states)


def in_file(like: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a tensor of a shape in a file in the system's folder for such. The file goes with the process, and what is
    read of it lies in memory as long as there is some.

    Raises:
        OSError: there is no room.
    """
    size = math.prod(shape)
    with tempfile.NamedTemporaryFile(prefix="rayml-states-") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS; a disk that is full later would end the process
            os.posix_fallocate(file.fileno(), 0, size * like.element_size())
        try:
            return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype).view(shape)
        except RuntimeError as error:
            raise OSError(f"{file.name}: {error}") from error


def blocks(rows: Sequence[TokenRow]) -> tuple[list[TokenRow], list[list[TokenRow]]]:
    """Return each row once, in an order that its tokens alone decide, and the same in blocks of like lengths."""
    unique = list({tuple(row.tokens): row for row in rows}.values())
    unique.sort(key=lambda row: (len(row.tokens), row.tokens))
    found: list[list[TokenRow]] = [[]]
    for row in unique:
        if (len(found[-1]) + 1) * len(row.tokens) > BLOCK_TOKENS and found[-1]:
            found.append([])
        found[-1].append(row)
    return unique, found


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the decoder layers of a causal LM, in order."""
    count = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
