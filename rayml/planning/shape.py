"""The shape of a model, from which its memory and traffic follow. It is built on the meta device: no weight is read."""

from dataclasses import dataclass
from typing import Any

from rayml.config import Config
from rayml.lm.abilities import check_model
from rayml.lm.catalog import resolve_model
from rayml.lm.load import load_shape
from rayml.lm.lora import find_linears, is_in_layer, layer_number
from rayml.lm.parameters import trained_parameters
from rayml.lm.sentence import SENTENCES_KEY

WHOLE_BELOW = 100_000
"""Tensors of fewer elements stay whole on every worker under ZeRO-3."""
MEASURED = {"llama", "mistral", "qwen2"}


@dataclass(frozen=True, slots=True)
class Linear:
    """An adapted linear: the last part of its name, its layer, and its widths."""

    name: str
    layer: int
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder. Parameters are counted in elements; tied weights count once."""

    parameters: int
    small_parameters: int
    """In tensors that ZeRO-3 leaves whole, since they are small."""
    trained: int
    """By mode full."""
    trained_tensors: int
    small_trained: tuple[int, ...]
    """Sizes of the trained tensors that are small."""
    backward_parameters: int
    """In large tensors that a backward goes through: the head, and layers down to the first that learns."""
    recomputed_parameters: int
    """Of `backward_parameters`, those in layers, without the last tensor of each layer."""
    tied_forward: int
    """Of the head, if it is tied to the embeddings and so is used at both ends of a forward; else 0."""
    tied_backward: int
    """The same, for a backward that reaches the embeddings; else 0."""
    layer_parameters: int
    """Of all layers: without embeddings, head and the last norm."""
    largest_layer: int
    embedding: int
    """The token embeddings, or the output head, which has as many."""
    layers: int
    hidden: int
    intermediate: int
    query_width: int
    """Query heads times the head width."""
    key_width: int
    """Key heads times the head width; values have the same."""
    heads: int
    vocabulary: int
    adapted: tuple[Linear, ...]
    """Linears with an adapter; none in mode full and with soft prompts."""
    first_layer: int
    """The layer where the backward ends: the lowest one that learns, or 0 if the embeddings do."""
    is_measured: bool
    """The formula for activations was compared with measurements of this architecture; for others it is an estimate."""
    prompt: int = 0
    """Elements of the soft prompt, if that is learned."""

    def adapter(self, rank: int) -> int:
        """Return the elements of one adapter, `A [r, in]` and `B [out, r]` of every adapted linear; or of a prompt."""
        return self.prompt + rank * sum(linear.inputs + linear.outputs for linear in self.adapted)


def read_shape(config: Config) -> Shape:
    """Return the shape of the config's model, with the parts that the config adapts or trains.

    Raises:
        ConfigError: there is no such model, no such linear to adapt, or nothing left to train.
    """
    base = resolve_model(config.model.name)
    check_model(config, base)
    return shape_of(load_shape(base), config)


def shape_of(model: Any, config: Config, whole_below: int = WHOLE_BELOW) -> Shape:
    """Return the shape of a model, on the meta device or any other.

    Args:
        whole_below: tensors of fewer elements stay whole under ZeRO-3.
    """
    text_config = model.config.get_text_config()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers: dict[int, int] = {}
    for name in filter(is_in_layer, sizes):
        layers[layer_number(name)] = layers.get(layer_number(name), 0) + sizes[name]
    adapted, trained, first = _learned(model, config)
    large = {name: size for name, size in sizes.items() if size >= whole_below}
    heads, embeddings = text_config.num_attention_heads, model.get_input_embeddings()
    head_width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return Shape(
        parameters=sum(sizes.values()),
        small_parameters=sum(sizes.values()) - sum(large.values()),
        trained=sum(sizes[name] for name in trained),
        trained_tensors=len(trained),
        small_trained=tuple(sizes[name] for name in trained if name not in large),
        **_sharded(model, large, first, trained),
        layer_parameters=sum(layers.values()),
        largest_layer=max(layers.values()),
        embedding=embeddings.weight.numel(),
        layers=text_config.num_hidden_layers,
        hidden=text_config.hidden_size,
        intermediate=getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size,
        query_width=heads * head_width,
        key_width=(getattr(text_config, "num_key_value_heads", None) or heads) * head_width,
        heads=heads,
        vocabulary=0 if hasattr(model, SENTENCES_KEY) else text_config.vocab_size,
        adapted=adapted,
        first_layer=first,
        is_measured=text_config.model_type in MEASURED,
        prompt=config.soft_tokens * embeddings.embedding_dim,
    )


def _sharded(model: Any, large: dict[str, int], first: int, trained: list[str]) -> dict[str, int]:
    """Return the counts of sharded parameters that a backward needs."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (module and names[module.weight] for module in ends)  # a sentence encoder has no head
    embedding_size, head_size = large.get(embedding, 0), large.get(head, 0)
    is_tied, reaches_embedding = head == embedding, embedding in trained
    layer_sizes: dict[int, list[int]] = {}
    for name, size in large.items():
        if is_in_layer(name) and layer_number(name) >= first:
            layer_sizes.setdefault(layer_number(name), []).append(size)
    reached_embedding = embedding_size if reaches_embedding and not is_tied else 0
    return {
        "backward_parameters": sum(map(sum, layer_sizes.values())) + head_size + reached_embedding,
        "recomputed_parameters": sum(sum(sizes[:-1]) for sizes in layer_sizes.values()),
        "tied_forward": is_tied * head_size,
        "tied_backward": (is_tied and reaches_embedding) * head_size,
    }


def _learned(model: Any, config: Config) -> tuple[tuple[Linear, ...], list[str], int]:
    """Return the adapted linears, the names of trained parameters, and the layer where the backward ends."""
    if config.soft_tokens:
        return (), [], 0
    if config.mode == "adapters":
        linears = find_linears(model, config.lora.targets, config.lora.last_layers)
        adapted = tuple(
            Linear(name.rsplit(".", 1)[-1], layer_number(name), linear.in_features, linear.out_features)
            for name, linear in linears.items()
        )
        return adapted, [], min(linear.layer for linear in adapted)
    trained = list(trained_parameters(model, config.full))
    return (), trained, min(_lowest_layer(name, model) for name in trained)


def _lowest_layer(name: str, model: Any) -> int:
    """Return the lowest layer that a backward goes through to reach a parameter."""
    if is_in_layer(name):
        return layer_number(name)
    is_embedding = model.get_parameter(name) is model.get_input_embeddings().weight
    return 0 if is_embedding else model.config.num_hidden_layers
