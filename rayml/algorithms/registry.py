"""The algorithms by name. Each is imported when a config chooses it."""

import os
import sys
from importlib import import_module
from typing import Any

from rayml.algorithms.base import Algorithm
from rayml.errors import ConfigError

DEFAULT = "fomaml_plus"
UNTRAINED = "proto_maml"
"""The algorithm by which an untrained base adapts and answers."""
REGISTERED = {
    "fomaml": "rayml.algorithms.fomaml:Fomaml",
    "fomaml_plus": "rayml.algorithms.fomaml:FomamlPlus",
    "meta_sgd": "rayml.algorithms.fomaml:MetaSgd",
    "maml": "rayml.algorithms.maml:Maml",
    "reptile": "rayml.algorithms.reptile:Reptile",
    "multitask": "rayml.algorithms.multitask:Multitask",
    "metaicl": "rayml.algorithms.metaicl:MetaIcl",
    "proto_maml": "rayml.algorithms.proto_maml:ProtoMaml",
    "protonet": "rayml.algorithms.protonet:ProtoNet",
}


def algorithm_class(name: str) -> type[Algorithm]:
    """Return the class of a registered name, or of `package.module:Class`.

    Raises:
        ConfigError: there is none.
    """
    module, colon, attribute = REGISTERED.get(name, name).partition(":")
    if not colon:
        raise ConfigError(f"algorithm.name: {name!r} is none of {', '.join(REGISTERED)}, nor package.module:Class")
    if name not in REGISTERED and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does, so that a file in the working directory is found
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"algorithm.name: {name!r}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise ConfigError(f"algorithm.name: {name!r} is no subclass of rayml.algorithms.base.Algorithm")
    return cls


def parse_algorithm(values: Any) -> Any:
    """Return the algorithm of a config's section `algorithm`, which holds its name and settings."""
    if not isinstance(values, dict):
        return values  # an algorithm already, or a mistake that pydantic reports
    name = str(values.get("name", DEFAULT))
    try:
        cls = algorithm_class(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return cls.model_validate(values | {"name": name})


def default_algorithm() -> Algorithm:
    return parse_algorithm({})


def algorithm_of(name: str, settings: dict[str, Any]) -> Algorithm:
    """Return the algorithm that an adapter's card names; without a name (plain PEFT), one that reads label tokens.

    Raises:
        ConfigError: there is no such algorithm, or it has no such settings.
    """
    try:
        return parse_algorithm({**settings, "name": name or DEFAULT})
    except ValueError as error:
        raise ConfigError(f"learned by {name!r}, which does not answer here: {error}") from None


def trusted_algorithm(name: str, settings: dict[str, Any], own: Algorithm) -> Algorithm:
    """Return what `algorithm_of` does, but for an adapter from an untrusted source: import no unknown code.

    Args:
        own: the algorithm of the run that serves the adapter.

    Raises:
        ConfigError: it is neither registered nor the run's own, or has no such settings.
    """
    if name not in ("", own.name, *REGISTERED):
        raise ConfigError(f"learned by {name!r}; this run knows {own.name!r} and what comes with rayml")
    return algorithm_of(name, settings)


# Keys that became settings of algorithms, and run folders from before they did


MOVED = {
    "outer.start_weight": "is a setting of the algorithm: algorithm.start_weight (fomaml_plus, meta_sgd)",
    "inner.learn_lr": "is a setting of the algorithm: algorithm.learn_rates (fomaml_plus, maml); fomaml's are fixed",
}


def upgrade_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an old run's `config.yaml` in today's form.

    Before algorithms had settings of their own, `fomaml` was the name of today's `fomaml_plus`, and the file of every
    run held the two keys in MOVED, whatever its algorithm.
    """
    inner, outer = dict(values.get("inner") or {}), dict(values.get("outer") or {})
    if "learn_lr" not in inner and "start_weight" not in outer:
        return values
    learn_rates, start_weight = inner.pop("learn_lr", True), outer.pop("start_weight", 1.0)
    name = (values.get("algorithm") or {}).get("name", "fomaml")
    algorithm = {
        "fomaml": {"name": "fomaml_plus", "learn_rates": learn_rates, "start_weight": start_weight},
        "meta_sgd": {"name": "meta_sgd", "start_weight": start_weight},
        "maml": {"name": "maml", "learn_rates": learn_rates},
    }.get(name, {"name": name})
    return values | {"inner": inner, "outer": outer, "algorithm": algorithm}
