"""Mode full: which of a model's own parameters are trained, and how an optimizer groups them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rayml.errors import ConfigError
from rayml.lm.lora import in_a_layer, layer_number
from rayml.sections import Full


def trained_parameters(model: Any, full: Full) -> dict[str, nn.Parameter]:
    """Return the parameters of a causal LM, whole or sharded, that `full` leaves free, by name; each tied one once.

    Raises:
        ConfigError: a pattern fits no parameter, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    _refuse_idle(full.freeze, list(named), "full.freeze")
    first = model.config.num_hidden_layers - (full.last_layers or model.config.num_hidden_layers)
    embeddings = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embeddings
    free, behind_layers = {}, False
    for name, parameter in named.items():
        behind_layers |= in_a_layer(name)
        if parameter is embeddings:
            trained = full.embeddings and (tied or not full.last_layers)
        elif in_a_layer(name):
            trained = layer_number(name) >= first
        else:  # the final norm and the output head come behind the layers, positions and the like before them
            trained = behind_layers or not full.last_layers
        if trained and not _fits(name, full.freeze):
            free[name] = parameter
    if not free:
        raise ConfigError("full: nothing is left to train; let full.freeze, full.embeddings leave something")
    return free


def parameter_groups(
    trained: dict[str, nn.Parameter], inner_lr: float, inner_modules: Sequence[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Return parameters by inner rate (0 outside `inner_modules`) and decay (none for norms and biases).

    Raises:
        ConfigError: a pattern of `inner_modules` fits no trained parameter.
    """
    _refuse_idle(inner_modules, list(trained), "inner.modules")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        rate = inner_lr if not inner_modules or _fits(name, inner_modules) else 0.0
        shape = getattr(parameter, "ds_shape", parameter.shape)  # a sharded parameter's own shape is empty
        groups.setdefault((rate, weight_decay if len(shape) > 1 else 0.0), []).append(parameter)
    return [
        {"params": parameters, "inner_lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()
    ]


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_idle(patterns: Sequence[str], names: list[str], key: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{key}: {pattern!r} fits no parameter; their names are like {names[len(names) // 2]!r}")
