"""Mode full: which parameters are trained, and how they are grouped for the optimizer."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rayml.config import Full
from rayml.errors import ConfigError

LAYER = re.compile(r"\.(\d+)\.")


def choose_trained(model: Any, full: Full) -> None:
    """Set `requires_grad` of every parameter of a causal LM, whole or sharded.

    Raises:
        ConfigError: a pattern fits no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    _refuse_idle(full.freeze, names, "full.freeze")
    depth = 1 + max((layer for name in names if (layer := _layer(name)) is not None), default=-1)
    first = depth - (full.last_layers or depth)
    embeddings = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embeddings
    behind_layers = False
    for name, parameter in model.named_parameters():
        layer = _layer(name)
        behind_layers |= layer is not None
        if parameter is embeddings:
            trained = full.embeddings and (tied or not full.last_layers)
        elif layer is not None:
            trained = layer >= first
        else:  # the final norm and the output head come behind the layers, positions and the like before them
            trained = behind_layers or not full.last_layers
        parameter.requires_grad_(trained and not _fits(name, full.freeze))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("full: nothing is left to train; let full.freeze, full.embeddings leave something")


def parameter_groups(
    model: nn.Module, inner_lr: float, inner_modules: Sequence[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the trained parameters by inner rate (0 outside `inner_modules`) and decay (none for norms and biases).

    Raises:
        ConfigError: a pattern of `inner_modules` fits no trained parameter.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _refuse_idle(inner_modules, list(trained), "inner.modules")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        rate = inner_lr if not inner_modules or _fits(name, inner_modules) else 0.0
        shape = getattr(parameter, "ds_shape", parameter.shape)  # a sharded parameter's own shape is empty
        groups.setdefault((rate, weight_decay if len(shape) > 1 else 0.0), []).append(parameter)
    return [
        {"params": parameters, "inner_lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()
    ]


def _layer(name: str) -> int | None:
    found = LAYER.search(name)
    return int(found.group(1)) if found else None


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_idle(patterns: Sequence[str], names: list[str], key: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{key}: {pattern!r} fits no parameter; their names are like {names[len(names) // 2]!r}")
