"""First-order meta-learning as a `torch.optim.Optimizer`, so that any engine that knows optimizers can train with it.

A sharded engine keeps fp32 parts of the weights, hands them to an optimizer, and refreshes what the forward reads after
every `step()`. So an inner step is an ordinary optimizer step, and no part of the engine has to be worked around.

FOMAML (Finn et al. 2017, arXiv 1703.03400, section 5.2): adapt, ..., adapt, query. Reptile (Nichol et al. 2018, arXiv
1803.02999): its gradient `(start - fast weights) / inner_lr` is the sum of the inner gradients, and the sum is what we
keep: the difference of nearly equal weights would lose most of its digits.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer


class Phase(NamedTuple):
    """What a step does, in this order."""

    collect: bool = False
    """Add the gradient to the meta-gradient; while descending, of what descends."""
    descend: bool = False
    """Keep the start, if this is the task's first step, and take an inner step."""
    restore: bool = False
    """Go back to the start, if there was an inner step; the last task's step then takes the outer step."""


PHASES = {
    "idle": Phase(),
    "adapt": Phase(descend=True),
    "query": Phase(collect=True, restore=True),
    "learn": Phase(collect=True, descend=True),  # reptile's; its last minibatch is a `query`: its step would be undone
    "restore": Phase(restore=True),
}


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
        self.enter("idle")

    def enter(self, phase: str, weight: float = 1.0, tasks: int = 0) -> None:
        """Set what the next steps do.

        Args:
            phase: a key of PHASES.
            weight: the task's, on what is added to the meta-gradient.
            tasks: in the meta-batch, if its last task ends with this step, which takes the outer step; else 0.
        """
        self._phase, self._weight, self._tasks = PHASES[phase], weight, tasks
        if tasks:
            self.squared_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do what the phase says with the shards that are in the groups now."""
        for shard, inner_lr in self._shards():
            descends = self._phase.descend and inner_lr
            if self._phase.collect and shard.grad is not None and (descends or not self._phase.descend):
                self._collect(shard, shard.grad)
            if descends and shard.grad is not None:
                self._descend(shard, shard.grad, inner_lr)
            if self._phase.restore and shard in self._adapted:
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
        shards = [shard for shard, _ in self._shards() if shard in self.meta_gradients]
        gradients = [shard.grad for shard in shards]
        for shard in shards:
            shard.grad = self.meta_gradients[shard].div_(self._tasks)
            self.squared_norm += float(torch.linalg.vector_norm(shard.grad, dtype=torch.float64)) ** 2
        self.outer.param_groups, self.outer.state = self.param_groups, self.state
        self.outer.step()
        for shard, gradient in zip(shards, gradients, strict=True):
            shard.grad = gradient
            self.meta_gradients[shard].zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the outer optimizer's state; the rates and the like stay those of this run."""
        options = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, ours in zip(self.param_groups, options, strict=True):
            group.update(ours)
