"""Reptile (Nichol et al. 2018, arXiv 1803.02999)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rayml.algorithms.base import Algorithm, Minibatch

if TYPE_CHECKING:
    from rayml.config import Config


class Reptile(Algorithm):
    """The outer optimizer's gradient is (start - fast weights) / rate.

    That is the sum of the inner gradients: every inner step counts, and what the inner loop does not change stays as it
    is. Reptile has no query; its inner steps are on minibatches of all of a task's data. Here support and query take
    turns, because steps on one and the same batch would lose what makes Reptile learn to learn (section 5 of the
    paper).
    """

    def minibatches(self, steps: int) -> list[Minibatch]:
        return [Minibatch("query" if k % 2 else "support", 1.0, descends=True) for k in range(steps)]

    def conflicts(self, config: "Config") -> Iterator[str]:
        yield from super().conflicts(config)
        if not config.inner.steps:
            yield "inner.steps: reptile learns from its inner steps; give it one or more"
        if config.regularize.adversarial:
            yield "regularize.adversarial: reptile's inner loop takes turns on both sides, and does not have it"
        if config.inner.unfreeze_every:
            yield "inner.unfreeze_every: reptile cannot unfreeze layers gradually"
