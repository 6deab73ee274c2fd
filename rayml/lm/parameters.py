"""Which of a model's own parameters are trained in mode full."""

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rayml.errors import ConfigError
from rayml.lm.lora import in_a_layer, layer_number


def trained_parameters(model: Any, full: Any) -> dict[str, nn.Parameter]:
    """Return the parameters that `full` (a config's section) leaves free, by name; each tied one once.

    With `last_layers` these are the last layers' and what stands behind them: the final norm and the output head.

    Raises:
        ConfigError: none is left, or a pattern matches nothing.
    """
    parameters = dict(model.named_parameters())
    idle = [pattern for pattern in full.freeze if not any(fnmatchcase(name, pattern) for name in parameters)]
    if idle:
        raise ConfigError(f"full.freeze: {', '.join(idle)} matches no parameter, such as {next(iter(parameters))}")
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    first = model.config.num_hidden_layers - full.last_layers if full.last_layers else 0

    def is_free(name: str, parameter: nn.Parameter) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in full.freeze):
            return False
        if id(parameter) in embeddings:
            return full.embeddings and not full.last_layers
        return not in_a_layer(name) or layer_number(name) >= first

    free = {name: parameter for name, parameter in parameters.items() if is_free(name, parameter)}
    if not free:
        raise ConfigError("full: no parameter is left to train; freeze fewer")
    return free
