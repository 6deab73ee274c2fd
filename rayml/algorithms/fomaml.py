"""First-order MAML (Finn et al. 2017, arXiv 1703.03400, section 5.2), and what we add to it.

"First order" means that the inner gradients are held constant in the fast weights, `start - rate * gradient_sum`. Then
the query's gradient at the fast weights is also the start's gradient.
"""

from typing import Literal

from rayml.algorithms.base import Algorithm, Minibatch
from rayml.sections import NotNegativeFloat


class Fomaml(Algorithm):
    """As in the paper: inner rates are fixed, and the start is learned only from the query after adapting."""

    def minibatches(self, steps: int) -> list[Minibatch]:
        return adapt_then_query(steps)


class FomamlPlus(Algorithm):
    """With learned inner rates, and a loss at the start. Both ideas are from MAML++ (Antoniou et al. 2019, arXiv
    1810.09502), but there each step has its own rates, and the losses along the inner loop are on the query."""

    learn_rates: bool = True
    """Learn an inner rate for each adapter tensor, by the first-order chain rule; only in mode=adapters."""
    start_weight: NotNegativeFloat = 1.0
    """Weight of the support's loss before adapting, beside the query's loss after. Above 0, the start itself stays a
    good model, as in multi-task learning. It does not act on tensors that the inner loop leaves alone. It costs
    nothing: the first inner step has the same gradient."""

    @property
    def learned_rates(self) -> Literal["none", "tensor", "weight"]:
        return "tensor" if self.learn_rates else "none"

    def minibatches(self, steps: int) -> list[Minibatch]:
        return adapt_then_query(steps, self.start_weight)


class MetaSgd(Algorithm):
    """Meta-SGD (Li et al. 2017, arXiv 1707.09835) by first order: an inner rate for each weight is learned."""

    start_weight: NotNegativeFloat = 1.0
    """As in `fomaml_plus`; 0 is Meta-SGD alone."""

    @property
    def learned_rates(self) -> Literal["none", "tensor", "weight"]:
        return "weight"

    def minibatches(self, steps: int) -> list[Minibatch]:
        return adapt_then_query(steps, self.start_weight)


def adapt_then_query(steps: int, start_weight: float = 0.0) -> list[Minibatch]:
    """Return `steps` inner steps on the support, then the query. The first step also counts by `start_weight`."""
    return [
        *(Minibatch("support", 0.0 if k else start_weight, descends=True) for k in range(steps)),
        Minibatch("query", 1.0),
    ]
