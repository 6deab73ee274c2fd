"""Multi-task learning, the baseline: the same examples as for the other algorithms, but no inner loop in training.

After training, it adapts to a new task as the others do.
"""

from rayml.algorithms.base import Algorithm, Minibatch


class Multitask(Algorithm):
    """The mean of both sides' losses at the start."""

    def minibatches(self, steps: int) -> list[Minibatch]:
        return [Minibatch("support", 0.5), Minibatch("query", 0.5)]
