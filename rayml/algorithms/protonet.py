"""Prototypical networks (Snell et al. 2017, arXiv 1703.05175), for T tasks at once: no inner loop at all.

A query is of the class whose mean hidden state, before the label, is nearest (`rayml.algorithms.prototypes`).
"""

from typing import Literal

from rayml.algorithms.base import Algorithm, Turn


class ProtoNet(Algorithm):
    takes_steps = False
    labels_only = True

    readout: Literal["labels", "prototypes", "both"] = "prototypes"
    """As for the others; `both` has label tokens beside the prototypes."""

    def turns(self, steps: int) -> list[Turn]:
        return [Turn("query", 1.0)]
