"""Prototypical networks (Snell et al. 2017, arXiv 1703.05175), for T tasks at once, without any inner loop.

A query belongs to the class whose examples have the nearest mean hidden state (`rayml.algorithms.prototypes`).
"""

from typing import Literal

from rayml.algorithms.base import Algorithm, Minibatch


class ProtoNet(Algorithm):
    takes_steps = False
    labels_only = True

    readout: Literal["labels", "prototypes", "both"] = "prototypes"
    """As for the other algorithms; `both` reads label tokens beside the prototypes."""

    def minibatches(self, steps: int) -> list[Minibatch]:
        return [Minibatch("query", 1.0)]
