"""First-order MAML (Finn et al. 2017, arXiv 1703.03400, section 5.2), and what we add to it.

The query's gradient at the fast weights is taken for the start's. The fast weights are `start - rate * gradient_sum`
with the inner gradients held constant, which is what "first order" means.
"""

from typing import Literal

from rayml.algorithms.base import Algorithm, Turn
from rayml.sections import NotNegativeFloat


class Fomaml(Algorithm):
    """As in the paper: fixed inner rates, and nothing learned but from the query after adapting."""

    def turns(self, steps: int) -> list[Turn]:
        return adapt_then_query(steps)


class FomamlPlus(Algorithm):
    """With inner rates that are learned, and a loss at the start. Not MAML++ (Antoniou et al. 2019, arXiv 1810.09502),
    from which both come: its rates are for every step, and its losses along the inner loop are on the query."""

    learn_rates: bool = True
    """Learn an inner rate for each adapter tensor, by the chain rule of first order; mode=adapters alone."""
    start_weight: NotNegativeFloat = 1.0
    """Weight of the support's loss before adapting, beside the query's after. Above 0 the start stays a good model as
    it stands, as in multi-task learning. What the inner loop leaves alone has no part in it. Its gradient is that of
    the first inner step, so it is free."""

    @property
    def learned_rates(self) -> Literal["none", "tensor", "weight"]:
        return "tensor" if self.learn_rates else "none"

    def turns(self, steps: int) -> list[Turn]:
        return adapt_then_query(steps, self.start_weight)


class MetaSgd(Algorithm):
    """Meta-SGD (Li et al. 2017, arXiv 1707.09835) by first order: an inner rate for each weight is learned."""

    start_weight: NotNegativeFloat = 1.0
    """As in `fomaml_plus`; 0 is Meta-SGD alone."""

    @property
    def learned_rates(self) -> Literal["none", "tensor", "weight"]:
        return "weight"

    def turns(self, steps: int) -> list[Turn]:
        return adapt_then_query(steps, self.start_weight)


def adapt_then_query(steps: int, start_weight: float = 0.0) -> list[Turn]:
    """Return `steps` inner steps on the support, the first of them learned from by `start_weight`, then the query."""
    return [*(Turn("support", 0.0 if k else start_weight, descends=True) for k in range(steps)), Turn("query", 1.0)]
