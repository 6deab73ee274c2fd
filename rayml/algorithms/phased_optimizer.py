"""First-order meta-learning as a `torch.optim.Optimizer`, so that any engine that takes an optimizer can train with it.

A sharded engine keeps fp32 shards of the weights, hands them to an optimizer, and after every `step()` refreshes the
weights that the forward reads. Here an inner step is an ordinary optimizer step, so the engine needs no changes.

The minibatches of an algorithm (`rayml.algorithms.base.Minibatch`) say what each step does. The meta-gradient is a sum
of gradients, also for Reptile: the difference of nearly equal weights would lose most of its digits.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rayml.algorithms.base import Minibatch, group_minibatches


class Phase(NamedTuple):
    """What an optimizer step does, in this order."""

    collects: bool = False
    """Add the gradient to the meta-gradient. In a step that descends, only that of what the inner loop changes."""
    descends: bool = False
    """Take an inner step, after saving the start if it is the task's first. Not if `restores` would undo it at once."""
    restores: bool = False
    """Go back to the start, if there was an inner step. After the meta-batch's last task, take the outer step."""


IDLE = Phase()


class Step(NamedTuple):
    """One optimizer step of a task: a loss, and what is done with its gradient."""

    sides: Sequence[tuple[str, float]]
    """The sides of the episode that the loss is of, each with its part in it."""
    phase: Phase
    share: float
    """The factor on its gradient in the meta-gradient."""


def optimizer_steps(minibatches: Sequence[Minibatch]) -> list[Step]:
    """Return the optimizer steps of one task. Minibatches at the same weights share a step."""
    groups, steps = group_minibatches(minibatches), []
    for index, group in enumerate(groups):
        share = sum(minibatch.share for minibatch in group)
        sides = [(minibatch.side, minibatch.share / share if len(group) > 1 else 1.0) for minibatch in group]
        phase = Phase(share != 0, group[0].descends, restores=index == len(groups) - 1)
        steps.append(Step(sides, phase, share))
    return steps


class PhasedOptimizer(Optimizer):
    """An outer optimizer whose `step` does what the phase says; `enter` sets the phase.

    Starts and meta-gradients are not part of `state`: a checkpoint between outer steps needs only the outer optimizer's
    state. Their buffers, at most two of a shard's size, are kept from one outer step to the next.

    Args:
        outer: its groups have an `inner_lr`; 0 leaves a group out of the inner loop (ANIL, Raghu et al. 2020, arXiv
            1909.09157). An engine may swap a group's parameters, or hide groups, from one `step` to the next.
    """

    def __init__(self, outer: Optimizer):
        super().__init__(outer.param_groups, outer.defaults)
        self.outer = outer
        self.starts: dict[Tensor, Tensor] = {}
        self.meta_gradients: dict[Tensor, Tensor] = {}
        self.squared_norm = 0.0
        """Of the last outer step's mean meta-gradient, over this worker's shards."""
        self._adapted: set[Tensor] = set()
        self.enter(IDLE)

    def enter(self, phase: Phase, weight: float = 1.0, tasks: int = 0) -> None:
        """Set what the next steps do.

        Args:
            weight: factor on the gradient that is added to the meta-gradient.
            tasks: the number of tasks in the meta-batch, if its last task ends with this step, so that the outer step
                follows; else 0.
        """
        self._phase, self._weight, self._tasks = phase, weight, tasks
        if tasks:
            self.squared_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do what the phase says, with the shards that are in the groups now."""
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
        """Step on the mean meta-gradient, and put the gradients back: offloading reuses their buffers."""
        shards = [shard for shard, _ in self._shards()]
        gradients = [shard.grad for shard in shards]
        norms = []
        for shard in shards:
            shard.grad = None  # the outer optimizer skips shards for which nothing was collected
            if shard in self.meta_gradients:
                shard.grad = self.meta_gradients[shard].div_(self._tasks)
                norms.append(torch.linalg.vector_norm(shard.grad, dtype=torch.float64))
        if norms:
            self.squared_norm += float(torch.stack(norms).square().sum())  # waits for the device only once
        self.outer.param_groups, self.outer.state = self.param_groups, self.state
        self.outer.step()
        for shard, gradient in zip(shards, gradients, strict=True):
            shard.grad = gradient
            if shard in self.meta_gradients:
                self.meta_gradients[shard].zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the outer optimizer's state, but keep this run's rates and other options."""
        options = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, group_options in zip(self.param_groups, options, strict=True):
            group.update(group_options)
