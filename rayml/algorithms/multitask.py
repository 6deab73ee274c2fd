"""Multi-task learning, the baseline: the same examples as for the other algorithms, but no inner loop in training.

After training, it adapts to a new task as the others do.
"""

from rayml.algorithms.base import Algorithm, Turn


class Multitask(Algorithm):
    """The mean of both sides' losses at the start."""

    def turns(self, steps: int) -> list[Turn]:
        return [Turn("support", 0.5), Turn("query", 0.5)]
