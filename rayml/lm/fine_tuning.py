"""Variants of inner steps: learning rates and unfreezing by layer, and adversarial examples.

Rates decay from layer to layer, and layers are unfrozen one after the other (ULMFiT, Howard and Ruder 2018, arXiv
1801.06146).

Adversarial examples come from the fast gradient method (Miyato et al. 2017, arXiv 1605.07725): the embeddings e become
`e + epsilon * g / |g|`, where g is the gradient of the loss at e. Here epsilon is relative to the norm of a row's
embeddings, so that it means the same for every model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rayml.algorithms.inner_loop import Params, TaskLosses
from rayml.lm.batch import TaskBatch
from rayml.lm.lora import is_in_layer, layer_number
from rayml.lm.model import TaskLM
from rayml.lm.sides import TaskSide


def depth_of(model: Any, name: str) -> int:
    """Return the layer number of a tensor: -1 for embeddings and prompts, the last for the final norm and the head."""
    if is_in_layer(name):
        return layer_number(name)
    after_layers = False
    for parameter in dict(model.named_parameters()):
        if parameter == name:
            break
        after_layers |= is_in_layer(parameter)
    else:
        return -1
    is_embedding = model.get_parameter(name) is model.get_input_embeddings().weight
    return model.config.num_hidden_layers - 1 if after_layers and not is_embedding else -1


def rate_factors(model: Any, names: Params, decay: float) -> dict[str, float]:
    """Return a factor for each tensor's inner rate: `decay` to the power of the number of layers above it."""
    top = model.config.num_hidden_layers - 1
    return {name: decay ** (top - depth_of(model, name)) for name in names} if decay != 1 else {}


def gradual_unfreezing(losses: TaskLosses, model: Any, every: int) -> TaskLosses:
    """Return losses in which one more layer learns every `every` inner steps, from the top layer down.

    They detach what is still frozen. They count their calls as steps, so they serve one inner loop only.
    """
    depths: dict[str, int] = {}
    top, calls = model.config.num_hidden_layers - 1, 0

    def unfrozen_losses(weights: Params) -> Tensor:
        nonlocal calls
        lowest, calls = top - calls // every, calls + 1
        for name in weights.keys() - depths.keys():
            depths[name] = depth_of(model, name)
        return losses({name: w if depths[name] >= lowest else w.detach() for name, w in weights.items()})

    return unfrozen_losses


def adversarial(losses: TaskLosses, lm: TaskLM, batch: TaskBatch, epsilon: float) -> TaskLosses:
    """Return the mean of losses on clean and on adversarial embeddings, shifted by `epsilon * |e|` in every row.

    Args:
        losses: of this batch, whose rows hold one example each.
        epsilon: above 0.
    """
    lm.probe()  # its trial forwards must not be shifted

    def mean_losses(weights: Params) -> Tensor:
        shift = EmbeddingShift(lm)
        known, lm.known = lm.known, None  # it is of embeddings without a shift
        try:
            batch.frozen.clear()  # the frozen layers' output depends on the shift
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
            lm.known = known
            shift.hook.remove()

    return mean_losses


class EmbeddingShift:
    """A hook that adds `value` `[N, L, d]` to the embeddings: zero in the first forward, which gives its gradient."""

    def __init__(self, lm: TaskLM):
        self.value: Tensor | None = None
        self.embeddings: Tensor
        self.hook = lm.module.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.value is None:
            self.embeddings = output.detach()
            self.value = torch.zeros_like(output, requires_grad=True)
        return output + self.value


def inner_loss_transform(
    support: TaskSide, unfreeze_every: int, epsilon: float = 0.0
) -> Callable[[TaskLosses], TaskLosses]:
    """Return a function from losses of the support to the losses that an inner loop descends.

    Args:
        unfreeze_every: steps after which one more layer learns; with 0 all layers learn from the start.
        epsilon: of the adversarial step, in meta-training; 0 for none.
    """

    def wrap(losses: TaskLosses) -> TaskLosses:
        if epsilon:
            losses = adversarial(losses, support.lm, support.batch, epsilon)
        return gradual_unfreezing(losses, support.lm.module, unfreeze_every) if unfreeze_every else losses

    return wrap
