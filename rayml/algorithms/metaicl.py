"""MetaICL (Min et al. 2022, arXiv 2110.15943): the support stands in the query's prompt, in training and after it."""

from rayml.algorithms.base import Algorithm, Minibatch


class MetaIcl(Algorithm):
    """The start learns to read examples; there is no inner loop."""

    takes_steps = False
    keeps = "prompt"

    def minibatches(self, steps: int) -> list[Minibatch]:
        return [Minibatch("query", 1.0)]
