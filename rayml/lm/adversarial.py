"""Adversarial training of the inner loop: the support also as a small step on the embeddings makes it worst.

The fast gradient method (Miyato et al. 2017, arXiv 1605.07725): `e + epsilon * g / |g|`, g the loss's gradient at the
embeddings e. Here the step's length is a share of the row's own, so that it means the same for every model.
"""

import torch
from torch import Tensor, nn

from rayml.algorithms.inner_loop import Params, TaskLosses
from rayml.lm.batch import TaskBatch
from rayml.lm.model import TaskLM


def adversarial(losses: TaskLosses, lm: TaskLM, batch: TaskBatch, epsilon: float) -> TaskLosses:
    """Return the mean of some losses and of the same after the worst step of length `epsilon * |e|` for every row.

    Args:
        losses: of this batch, whose rows hold one example each.
        epsilon: above 0.
    """

    def both(weights: Params) -> Tensor:
        shift = Shift(lm)
        try:
            batch.frozen.clear()  # what the lowest layers made of the tokens alone
            clean = losses(weights)
            assert shift.value is not None, "the forward set it"
            (gradient,) = torch.autograd.grad(clean.sum(), shift.value, retain_graph=True)
            length = shift.embeddings.flatten(1).norm(dim=1).view(-1, 1, 1)
            norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1).clamp(min=1e-12)
            shift.value = (epsilon * length * gradient / norm).detach()
            batch.frozen.clear()
            return (clean + losses(weights)) / 2
        finally:
            batch.frozen.clear()
            shift.hook.remove()

    return both


class Shift:
    """What is added to the embeddings, `[N, L, d]`: zero at first, to learn its gradient."""

    def __init__(self, lm: TaskLM):
        self.value: Tensor | None = None
        self.embeddings: Tensor
        self.hook = lm.module.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.value is None:
            self.embeddings = output.detach()
            self.value = torch.zeros_like(output, requires_grad=True)
        return output + self.value
