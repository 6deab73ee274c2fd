"""How deep in the model a learned tensor lies, and fine-tuning that goes by it (ULMFiT, Howard and Ruder 2018, arXiv
1801.06146): rates that fall from layer to layer, and layers that are unfrozen one after the other."""

from typing import Any

from torch import Tensor

from rayml.algorithms.inner_loop import Params, TaskLosses
from rayml.lm.lora import in_a_layer, layer_number


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
