"""First-order meta-learning as a `torch.optim.Optimizer`, so that any engine that knows optimizers can train with it.

A sharded engine keeps fp32 parts of the weights, hands them to an optimizer, and refreshes what the forward reads after
every `step()`. So an inner step is an ordinary optimizer step, and no part of the engine has to be worked around.

What a step does is said by the turns of an algorithm (`rayml.algorithms.base.Turn`). What descends and is learned from
is summed up as gradients: the difference of nearly equal weights would lose most of its digits.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rayml.algorithms.base import Turn, batches


class Phase(NamedTuple):
    """What a step does, in this order."""

    collects: bool = False
    """Add the gradient to the meta-gradient; of a step that descends, only of what descends."""
    descends: bool = False
    """Keep the start, if this is the task's first step, and take an inner step; but not where it is undone at once."""
    restores: bool = False
    """Go back to the start, if there was an inner step; the last task's step then takes the outer step."""


IDLE = Phase()


class Step(NamedTuple):
    """One optimizer step of a task: a loss, and what is done with its gradient."""

    sides: Sequence[tuple[str, float]]
    """What the loss is of: the sides of the episode, each with its part."""
    phase: Phase
    share: float
    """Of its gradient in the meta-gradient."""


def steps_of(turns: Sequence[Turn]) -> list[Step]:
    """Return the steps of one task by an algorithm's turns; turns at the same weights share one."""
    together, found = batches(turns), []
    for index, some in enumerate(together):
        share = sum(turn.share for turn in some)
        sides = [(turn.side, turn.share / share if len(some) > 1 else 1.0) for turn in some]
        phase = Phase(share != 0, some[0].descends, restores=index == len(together) - 1)
        found.append(Step(sides, phase, share))
    return found


class PhasedOptimizer(Optimizer):
    """An outer optimizer whose `step` does what the phase says; `enter` sets the phase.

    Starts and meta-gradients lie outside `state`: between outer steps a checkpoint needs nothing but the outer
    optimizer's state. Their buffers, at most two of a shard's size, are kept from one outer step to the next.

    Args:
        outer: its groups have `inner_lr`, the inner rate; 0 leaves a group to the outer loop (ANIL, Raghu et al. 2020,
            arXiv 1909.09157). An engine may swap a group's parameters, or hide groups, from one `step` to the next.
    """

    def __init__(self, outer: Optimizer):
        super().__init__(outer.param_groups, outer.defaults)
        self.outer = outer
        self.starts: dict[Tensor, Tensor] = {}
        self.meta_gradients: dict[Tensor, Tensor] = {}
        self.squared_norm = 0.0
        """Of the last outer step's mean meta-gradient, over the shards that are here."""
        self._adapted: set[Tensor] = set()
        self.enter(IDLE)

    def enter(self, phase: Phase, weight: float = 1.0, tasks: int = 0) -> None:
        """Set what the next steps do.

        Args:
            weight: the task's, on what is added to the meta-gradient.
            tasks: in the meta-batch, if its last task ends with this step, which takes the outer step; else 0.
        """
        self._phase, self._weight, self._tasks = phase, weight, tasks
        if tasks:
            self.squared_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do what the phase says with the shards that are in the groups now."""
        phase = self._phase
        for shard, inner_lr in self._shards():
            if shard.grad is not None and (inner_lr or not phase.descends):
                if phase.collects:
                    self._collect(shard, shard.grad)
                if phase.descends and not phase.restores:
                    self._descend(shard, shard.grad, inner_lr)
            if phase.restores and shard in self._adapted:
                shard.copy_(self.starts[shard])
                self._adapted.remove(shard)
        if self._tasks:
            self._outer_step()

    def _shards(self) -> Iterator[tuple[Tensor, float]]:
        return ((shard, group["inner_lr"]) for group in self.param_groups for shard in group["params"])

    def _collect(self, shard: Tensor, gradient: Tensor) -> None:
        if shard not in self.meta_gradients:
            self.meta_gradients[shard] = torch.zeros_like(shard)
        self.meta_gradients[shard].add_(gradient, alpha=self._weight)

    def _descend(self, shard: Tensor, gradient: Tensor, inner_lr: float) -> None:
        if shard not in self._adapted:
            if shard not in self.starts:
                self.starts[shard] = torch.empty_like(shard)
            self.starts[shard].copy_(shard)
            self._adapted.add(shard)
        shard.add_(gradient, alpha=-inner_lr)

    def _outer_step(self) -> None:
        """Step on the mean meta-gradient, and put the gradients back: with offloading they are the engine's buffers."""
        shards = [shard for shard, _ in self._shards()]
        gradients = [shard.grad for shard in shards]
        norms = []
        for shard in shards:
            shard.grad = None  # where nothing was collected, nothing is learned
            if shard in self.meta_gradients:
                shard.grad = self.meta_gradients[shard].div_(self._tasks)
                norms.append(torch.linalg.vector_norm(shard.grad, dtype=torch.float64))
        if norms:
            self.squared_norm += float(torch.stack(norms).square().sum())  # waits for the device, once
        self.outer.param_groups, self.outer.state = self.param_groups, self.state
        self.outer.step()
        for shard, gradient in zip(shards, gradients, strict=True):
            shard.grad = gradient
            if shard in self.meta_gradients:
                self.meta_gradients[shard].zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the outer optimizer's state; the rates and the like stay those of this run."""
        options = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, ours in zip(self.param_groups, options, strict=True):
            group.update(ours)
