"""From a model's config.json to its shape: the model is built on the meta device, and no weight is read."""

import re
from fnmatch import fnmatchcase
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayml.config import Config, Full
from rayml.errors import ConfigError
from rayml.lm.load import resolve_model
from rayml.lm.lora import find_linears, layer_number
from rayml.planning.shape import Linear, Shape

WHOLE_BELOW = 100_000
"""Elements; what the sharded engines leave whole."""
MEASURED = {"llama", "mistral", "qwen2"}


def read_shape(config: Config) -> Shape:
    """Return the shape of the config's model, with what the config adapts or trains of it.

    Raises:
        ConfigError: there is no such model, no such linear to adapt, or nothing left to train.
    """
    path = resolve_model(config.model.name)
    try:
        found = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found, attn_implementation=config.model.attention)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: no causal language model's config at {path!r}: {error}") from error
    return shape_of(model, config)


def shape_of(model: Any, config: Config) -> Shape:
    """Return the shape of a model, on the meta device or any other."""
    text = model.config.get_text_config()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers: dict[int, int] = {}
    for name, size in sizes.items():
        if (number := _layer(name)) is not None:
            layers[number] = layers.get(number, 0) + size
    adapted, trained, first = _learned(model, config, sizes)
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    return Shape(
        parameters=sum(sizes.values()),
        small_parameters=sum(size for size in sizes.values() if size < WHOLE_BELOW),
        trained=trained,
        largest_layer=max(layers.values()),
        embedding=model.get_output_embeddings().weight.numel(),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query_width=heads * head_width,
        key_width=key_heads * head_width,
        heads=heads,
        vocabulary=text.vocab_size,
        adapted=adapted,
        first_layer=first,
        is_measured=text.model_type in MEASURED,
    )


def _learned(model: Any, config: Config, sizes: dict[str, int]) -> tuple[tuple[Linear, ...], int, int]:
    """Return the adapted linears, the count of trained parameters, and the layer where the backward ends."""
    if config.mode == "adapters":
        linears = find_linears(model, config.lora.targets, config.lora.last_layers)
        adapted = tuple(
            Linear(name.rsplit(".", 1)[-1], layer_number(name), linear.in_features, linear.out_features)
            for name, linear in linears.items()
        )
        return adapted, 0, min(linear.layer for linear in adapted)
    trained = {name: size for name, size in sizes.items() if _is_trained(name, model, config.full)}
    if not trained:
        raise ConfigError("full: freeze, last_layers and embeddings leave nothing to train")
    return (), sum(trained.values()), min(_reaches(name, model) for name in trained)


def _is_trained(name: str, model: Any, full: Full) -> bool:
    if any(fnmatchcase(name, pattern) for pattern in full.freeze):
        return False
    if _is_input_embedding(name, model):
        is_head = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return full.embeddings and (full.last_layers is None or is_head)
    number = _layer(name)
    first = model.config.num_hidden_layers - (full.last_layers or model.config.num_hidden_layers)
    return number is None or number >= first


def _reaches(name: str, model: Any) -> int:
    """Return the lowest layer that the backward runs through to reach a parameter."""
    number = _layer(name)
    if number is not None:
        return number
    return 0 if _is_input_embedding(name, model) else model.config.num_hidden_layers


def _is_input_embedding(name: str, model: Any) -> bool:
    return model.get_parameter(name) is model.get_input_embeddings().weight


def _layer(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return int(match.group(1)) if match else None
