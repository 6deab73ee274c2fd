"""Prototypical networks (Snell et al. 2017, arXiv 1703.05175), for T tasks at once, without any inner loop.

A query belongs to the class whose examples have the nearest mean hidden state (`rayml.algorithms.prototypes`).
"""

from typing import Literal

from rayml.algorithms.base import Algorithm, Turn


class ProtoNet(Algorithm):
    takes_steps = False
    labels_only = True

    readout: Literal["labels", "prototypes", "both"] = "prototypes"
    """As for the other algorithms; `both` reads label tokens beside the prototypes."""

    def turns(self, steps: int) -> list[Turn]:
        return [Turn("query", 1.0)]
