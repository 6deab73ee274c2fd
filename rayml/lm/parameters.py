"""Mode full: which of a model's own parameters are trained, and how an optimizer groups them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rayml.errors import ConfigError
from rayml.lm.lora import is_in_layer, layer_number
from rayml.sections import Full


def trained_parameters(model: Any, full: Full) -> dict[str, nn.Parameter]:
    """Return the parameters of a causal LM, whole or sharded, that are trained, by name; tied ones appear once.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    _refuse_unmatched(full.freeze, list(named), "full.freeze")
    first = model.config.num_hidden_layers - (full.last_layers or model.config.num_hidden_layers)
    embeddings = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embeddings
    parameters, after_layers = {}, False
    for name, parameter in named.items():
        after_layers |= is_in_layer(name)
        if parameter is embeddings:
            is_trained = full.embeddings and (tied or not full.last_layers)
        elif is_in_layer(name):
            is_trained = layer_number(name) >= first
        else:  # the final norm and the output head come after the layers, positions and the like before them
            is_trained = after_layers or not full.last_layers
        if is_trained and not _matches(name, full.freeze):
            parameters[name] = parameter
    if not parameters:
        raise ConfigError("full: nothing is left to train; let full.freeze, full.embeddings leave something")
    return parameters


def parameter_groups(
    trained: dict[str, nn.Parameter], inner_lr: float, inner_modules: Sequence[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Group parameters by inner rate (0 outside `inner_modules`) and weight decay (0 for norms and biases).

    Raises:
        ConfigError: a pattern of `inner_modules` matches no trained parameter.
    """
    _refuse_unmatched(inner_modules, list(trained), "inner.modules")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        rate = inner_lr if not inner_modules or _matches(name, inner_modules) else 0.0
        shape = getattr(parameter, "ds_shape", parameter.shape)  # the shape of a sharded parameter is empty
        groups.setdefault((rate, weight_decay if len(shape) > 1 else 0.0), []).append(parameter)
    return [
        {"params": parameters, "inner_lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()
    ]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unmatched(patterns: Sequence[str], names: list[str], key: str) -> None:
    """Raise ConfigError if a pattern matches none of the names."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{key}: {pattern!r} fits no parameter; their names are like {names[len(names) // 2]!r}")
