"""What is special about inner steps: rates and unfreezing that go by a tensor's depth, and adversarial examples.

Rates fall from layer to layer, and layers are unfrozen one after the other (ULMFiT, Howard and Ruder 2018, arXiv
1801.06146). The support is also learned as a small step on the embeddings makes it worst.

That is the fast gradient method (Miyato et al. 2017, arXiv 1605.07725): `e + epsilon * g / |g|`, g the loss's gradient
at the embeddings e. Here the step's length is a share of the row's own, so that it means the same for every model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rayml.algorithms.inner_loop import Params, TaskLosses
from rayml.lm.batch import TaskBatch
from rayml.lm.lora import in_a_layer, layer_number
from rayml.lm.model import TaskLM
from rayml.lm.sides import TaskSide


def depth_of(model: Any, name: str) -> int:
    """Return the layer of a tensor: -1 for embeddings and prompts, the last for the final norm and the output head."""
    if in_a_layer(name):
        return layer_number(name)
    behind_layers = False
    for parameter in dict(model.named_parameters()):
        if parameter == name:
            break
        behind_layers |= in_a_layer(parameter)
    else:
        return -1
    is_embedding = model.get_parameter(name) is model.get_input_embeddings().weight
    return model.config.num_hidden_layers - 1 if behind_layers and not is_embedding else -1


def rate_factors(model: Any, names: Params, decay: float) -> dict[str, float]:
    """Return a factor on each tensor's inner rate: `decay` to the power of the layers above it."""
    top = model.config.num_hidden_layers - 1
    return {name: decay ** (top - depth_of(model, name)) for name in names} if decay != 1 else {}


def gradual_unfreezing(losses: TaskLosses, model: Any, every: int) -> TaskLosses:
    """Return losses of one inner loop in which the top layer learns from the first step, each `every` steps one more.

    What is frozen still has no gradient. They count their calls: one for each step.
    """
    depths: dict[str, int] = {}
    top, calls = model.config.num_hidden_layers - 1, 0

    def of_step(weights: Params) -> Tensor:
        nonlocal calls
        lowest, calls = top - calls // every, calls + 1
        for name in weights.keys() - depths.keys():
            depths[name] = depth_of(model, name)
        return losses({name: w if depths[name] >= lowest else w.detach() for name, w in weights.items()})

    return of_step


def adversarial(losses: TaskLosses, lm: TaskLM, batch: TaskBatch, epsilon: float) -> TaskLosses:
    """Return the mean of some losses and of the same after the worst step of length `epsilon * |e|` for every row.

    Args:
        losses: of this batch, whose rows hold one example each.
        epsilon: above 0.
    """
    lm.try_out()  # what it tries is not to be shifted

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


def special_steps(support: TaskSide, unfreeze_every: int, epsilon: float = 0.0) -> Callable[[TaskLosses], TaskLosses]:
    """Return what makes of losses of the support those that an inner loop descends.

    Args:
        unfreeze_every: steps after which one more layer learns (`rayml.lm.fine_tuning`); 0, and all do.
        epsilon: of the adversarial step, in meta-training.
    """

    def special(losses: TaskLosses) -> TaskLosses:
        if epsilon:
            losses = adversarial(losses, support.lm, support.batch, epsilon)
        return gradual_unfreezing(losses, support.lm.module, unfreeze_every) if unfreeze_every else losses

    return special
