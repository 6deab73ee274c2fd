"""Activations: the bytes that a Llama-like decoder keeps for its backward.

What each operation saves, in elements a token, with D = hidden, Q = query_width, K = key_width, I = intermediate:

    both norms       2 D in fp32, whatever the dtype (the norm computes in fp32), and in mode full 2 D of their outputs
    attention, sdpa  Q queries, 2 K keys and values, Q output, and a fp32 number a head
    attention, eager 3 Q (keys and values repeated for the query heads) and L probabilities a head: in fp32, and again
                     in the model's dtype if that is another
    gated MLP        3 I: gate, activation, up
    linears          only what computes the gradient of a weight: nothing for frozen linears, the input of adapted and
                     trained ones (q, k, v share theirs, so do gate and up), and in fp32 r for an adapter
    below            nothing: layers below the first adapted one, nor in that one what comes before its adapters

A test counts what autograd really saves.
"""

from rayml.config import Config
from rayml.planning.batch import Pass
from rayml.planning.shape import Linear, Shape

FP32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
SHARED_INPUT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
# Where in a layer an adapter stands: 0 before attention, 1 behind it, 2 before the MLP's product, 3 behind it.
PLACES = {"o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}


def activation_bytes(shape: Shape, config: Config, batch: Pass, checkpointing: bool) -> int:
    """Return one worker's activations in its largest pass, at the peak of the backward.

    The layers below the first learned one keep nothing. On top comes what the backward itself works with: in a layer,
    two gradients as wide as the MLP; in the last norm, five fp32 numbers a hidden unit. With checkpointing every
    layer keeps its input, and one layer at a time all the rest.
    """
    element = DTYPE_BYTES[config.model.dtype]
    reached = shape.layers - shape.first_layer
    layers = [_layer_bytes(shape, config, batch, number) for number in range(shape.first_layer, shape.layers)]
    last_norm = batch.tokens * shape.hidden * FP32_BYTES
    working = 2 * shape.intermediate * element
    norm_working = 5 * shape.hidden * FP32_BYTES
    if checkpointing:
        kept = batch.tokens * reached * shape.hidden * element
        in_layer = max(layers, default=0) + batch.tokens * (working + shape.hidden * element)
        return kept + max(in_layer, last_norm + batch.tokens * norm_working)
    return sum(layers) + last_norm + batch.tokens * max(working, norm_working)


def logits_bytes(shape: Shape, config: Config, batch: Pass) -> int:
    """Return the bytes of the logits of free text: fp32, log-softmax and gradient, beside the model's own.

    Labels, which compete with each other alone, take less. Only where a target stands are there any.
    """
    copy = 0 if config.model.dtype == "float32" else DTYPE_BYTES[config.model.dtype]
    return batch.scored_tokens * shape.vocabulary * (3 * FP32_BYTES + copy)


def _layer_bytes(shape: Shape, config: Config, batch: Pass, number: int) -> int:
    """Return what layer `number` keeps for its backward."""
    element = DTYPE_BYTES[config.model.dtype]
    is_full, is_eager = config.mode == "full", config.model.attention == "eager"
    adapted = [linear for linear in shape.adapted if linear.layer == number]
    is_first = number == shape.first_layer and not is_full
    begins = min(PLACES.get(linear.name, 0) for linear in adapted) if is_first else -1
    norms = (2 - (begins >= 0) - (begins >= 2)) * shape.hidden * (FP32_BYTES + element * is_full)
    attention = _attention_bytes(shape, batch, element, is_eager) if begins < 1 else 0
    gated = 3 * shape.intermediate * element if begins < 3 else 0
    if is_full:
        inputs = (2 * shape.hidden + shape.intermediate + shape.query_width * is_eager) * element
    else:
        inputs = _adapter_input_bytes(adapted, config, element, shares_output=bool(attention) and not is_eager)
    return batch.tokens * (norms + attention + gated + inputs)


def _attention_bytes(shape: Shape, batch: Pass, element: int, is_eager: bool) -> int:
    """Return the bytes a token that attention keeps, queries, keys and values included."""
    if is_eager:
        again = 0 if element == FP32_BYTES else element
        return 3 * shape.query_width * element + shape.heads * batch.row_tokens * (FP32_BYTES + again)
    return 2 * (shape.query_width + shape.key_width) * element + shape.heads * FP32_BYTES


def _adapter_input_bytes(adapted: list[Linear], config: Config, element: int, shares_output: bool) -> int:
    """Return the bytes a token that the adapters of one layer keep: their inputs, and r between A and B.

    Args:
        shares_output: o_proj's input is attention's output, which sdpa keeps anyway.
    """
    # On a base of less precision that is computed again (`rayml.lm.lora.MixedUpdate`).
    between = len(adapted) * config.lora.rank * element if element == FP32_BYTES else 0
    if config.regularize.lora_dropout:  # each has its own masked input, and the mask
        return between + sum(linear.inputs for linear in adapted) * (element + 1)
    inputs = {SHARED_INPUT.get(linear.name, linear.name): linear.inputs for linear in adapted}
    if shares_output:
        inputs.pop("o_proj", None)
    return between + sum(inputs.values()) * element
