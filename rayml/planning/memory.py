"""The memory of one worker, by plain arithmetic on a model's shape and a config.

What each operation of a Llama-like decoder saves for its backward, in elements per token, with D = hidden,
Q = query_width, K = key_width, I = intermediate:

    both norms       2 D in fp32, whatever the dtype (the norm computes in fp32), and in mode full 2 D of their outputs
    attention, sdpa  Q queries, 2 K keys and values, Q output, and a fp32 number per head
    attention, eager 3 Q (keys and values repeated for the query heads) and L probabilities per head: in fp32, and again
                     in the model's dtype if that is another
    gated MLP        3 I: gate, activation, up
    linears          only what the gradient of a weight needs: nothing for frozen linears, the input of adapted and
                     trained ones (q, k, v share theirs, so do gate and up), and in fp32 r for an adapter
    below            nothing, in layers below the first adapted one, and in that one before its adapters

A test counts what autograd saves (tests/test_plan_activations.py).
"""

from dataclasses import dataclass

from rayml.config import Config
from rayml.lm.label_losses import MOST_LOGITS
from rayml.planning.shape import Linear, Shape
from rayml.planning.step import BUCKET, DTYPE_BYTES, FP32_BYTES, Pass, inner_steps, largest_pass

GATHERED = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: the most parameters that ZeRO-3 gathers at a time. It uses all of them."""
MAML_STEP = 2.5
"""The graph of an inner step of exact MAML, forward and backward, in units of the forward's activations."""
ALLOWANCE = 0.10
"""For the CUDA context, and memory that the allocator rounds up or cannot reuse."""
SHARED_INPUT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
# Positions of adapters in a layer: 0 before attention, 1 after it, 2 before the MLP's product, 3 after it.
POSITIONS = {"o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One kind of tensors, on the GPU (`device_bytes`) and in CPU memory (`host_bytes`) of one worker."""

    name: str
    device_bytes: int
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One worker's memory at its peak. The parts are added as if all existed at once."""

    parts: tuple[MemoryPart, ...]

    @property
    def device_bytes(self) -> int:
        return sum(part.device_bytes for part in self.parts)

    @property
    def host_bytes(self) -> int:
        return sum(part.host_bytes for part in self.parts)

    def fits(self, gpu_bytes: int) -> bool:
        return self.device_bytes <= gpu_bytes


def plan_memory(shape: Shape, config: Config, target_tokens: int = 1) -> MemoryPlan:
    """Return one worker's memory, in parts.

    Args:
        target_tokens: of each row: 1 for labels of one token, more for free text.
    """
    if config.mode == "adapters":
        states = _adapter_states(shape, config)
    elif config.engine == "local":
        states = _local_full_states(shape, config)
    else:
        states = _zero_full_states(shape, config)
    checkpointing = config.model.activation_checkpointing
    parts = [*states, *activation_parts(shape, config, target_tokens, checkpointing)]
    return MemoryPlan((*parts, MemoryPart("allowance", int(ALLOWANCE * sum(part.device_bytes for part in parts)))))


def activation_parts(shape: Shape, config: Config, target_tokens: int, checkpointing: bool) -> list[MemoryPart]:
    """Return the parts for activations and logits. Exact MAML keeps those of every inner step and its backward."""
    batch = largest_pass(config, target_tokens)
    copies = 1 + (MAML_STEP * inner_steps(config) if config.algorithm.second_order else 0)
    activations = activation_bytes(shape, config, batch, checkpointing)
    logits = logits_bytes(shape, config, batch)
    return [MemoryPart("activations", int(copies * activations)), MemoryPart("logits", int(copies * logits))]


def _adapter_states(shape: Shape, config: Config) -> list[MemoryPart]:
    """Adapters in fp32, whole on every worker; the frozen base in its dtype, whole or sharded."""
    start = FP32_BYTES * shape.adapter(config.lora.rank)
    tasks, steps = config.tasks_together, inner_steps(config)
    moments = 2 if config.outer.optimizer == "adamw" else 0
    rates = 1 if config.algorithm.learned_rates == "weight" else 0  # a rate for each weight, learned like the start
    # Fast weights and the sum of the inner gradients; exact MAML keeps those of every step.
    copies = 2 * (steps if config.algorithm.second_order else min(steps, 1))
    buffers = 2 if config.most_workers > 1 else 1  # the all-reduce needs a flat copy
    return [
        MemoryPart("parameters", _base(shape, config) + start),
        MemoryPart("gathered layers", _gathered(shape, config)),
        MemoryPart("gradients", tasks * start),
        MemoryPart("optimizer", (moments * (1 + rates) + rates) * start),
        MemoryPart("fast weights", copies * tasks * start),
        MemoryPart("meta-gradient", buffers * (1 + rates) * start),
    ]


def _local_full_states(shape: Shape, config: Config) -> list[MemoryPart]:
    """Plain torch, nothing sharded: the model in its dtype, and the learned weights in fp32."""
    element = DTYPE_BYTES[config.model.dtype]
    trained = FP32_BYTES * shape.trained
    cast = 0 if config.model.dtype == "float32" else element * shape.trained  # weights as a forward reads them
    return [
        MemoryPart("parameters", element * shape.parameters + trained + cast),
        MemoryPart("gathered layers", 0),
        MemoryPart("gradients", trained),
        MemoryPart("optimizer", (2 if config.outer.optimizer == "adamw" else 0) * trained),
        MemoryPart("fast weights", 2 * min(inner_steps(config), 1) * trained),  # and the sum of the inner gradients
        MemoryPart("meta-gradient", trained),
    ]


def _zero_full_states(shape: Shape, config: Config) -> list[MemoryPart]:
    """The phased optimizer under DeepSpeed: fp32 shards of master, moments, anchor and meta-gradient."""
    element, stage, offload = DTYPE_BYTES[config.model.dtype], config.zero.stage, config.zero.offload
    shard = FP32_BYTES * _share(shape.trained, config)
    master_and_moments = (3 if config.outer.optimizer == "adamw" else 1) * shard
    gradients = shape.trained if stage == 1 else _share(shape.trained, config)
    parameters = _base(shape, config) if stage == 3 else element * shape.parameters
    offloaded = stage == 3 and offload == "all"
    return [
        _placed("parameters", parameters, offloaded),
        MemoryPart("gathered layers", _gathered(shape, config, offloaded) if stage == 3 else 0),
        MemoryPart("gradients", element * gradients),
        MemoryPart("reduce bucket", FP32_BYTES * min(shape.trained, BUCKET)),
        _placed("optimizer", master_and_moments, offload != "none"),
        _placed("fast weights", shard, offload != "none"),  # the anchor: the start, while the master is adapted
        _placed("meta-gradient", shard, offload != "none"),
    ]


def _placed(name: str, size: int, on_host: bool) -> MemoryPart:
    return MemoryPart(name, 0, size) if on_host else MemoryPart(name, size)


def _base(shape: Shape, config: Config) -> int:
    """Return the bytes of the model's weights on a worker between its passes."""
    element = DTYPE_BYTES[config.model.dtype]
    if config.engine == "local":
        return element * shape.parameters
    return element * (_share(shape.parameters - shape.small_parameters, config) + shape.small_parameters)


def _gathered(shape: Shape, config: Config, offloaded: bool = False) -> int:
    """Return the bytes of gathered weights during a pass: as many as DeepSpeed allows, at least a layer's.

    A single worker gathers nothing, unless its weights are in CPU memory.
    """
    if config.engine == "local" or (config.fewest_workers == 1 and not offloaded):
        return 0
    least = shape.largest_layer + shape.embedding
    return DTYPE_BYTES[config.model.dtype] * min(shape.parameters, max(GATHERED, least))


def _share(elements: int, config: Config) -> int:
    """Return one worker's share of sharded elements."""
    return -(-elements // config.fewest_workers)


def activation_bytes(shape: Shape, config: Config, batch: Pass, checkpointing: bool) -> int:
    """Return the bytes of one worker's activations in its largest pass, at the peak of the backward.

    The layers below the first learned one keep nothing. The backward itself needs some more: in a layer, two gradients
    as wide as the MLP; in the last norm, five fp32 numbers per hidden unit. With checkpointing, every layer keeps its
    input, and one layer at a time all the rest.
    """
    element = DTYPE_BYTES[config.model.dtype]
    layer_count = shape.layers - shape.first_layer
    layers = [_layer_bytes(shape, config, batch, number) for number in range(shape.first_layer, shape.layers)]
    last_norm = batch.tokens * shape.hidden * FP32_BYTES
    working = 2 * shape.intermediate * element
    norm_working = 5 * shape.hidden * FP32_BYTES
    if checkpointing:
        inputs = batch.tokens * layer_count * shape.hidden * element
        in_layer = max(layers, default=0) + batch.tokens * (working + shape.hidden * element)
        return inputs + max(in_layer, last_norm + batch.tokens * norm_working)
    return sum(layers) + last_norm + batch.tokens * max(working, norm_working)


def logits_bytes(shape: Shape, config: Config, batch: Pass) -> int:
    """Return the bytes of the logits of free text: in fp32, their log-softmax and gradient, and the model's own copy.

    Labels take less, since they compete with each other alone. Only targets have logits. Adapters on a base that is not
    sharded compute them in parts.
    """
    copy = 0 if config.model.dtype == "float32" else DTYPE_BYTES[config.model.dtype]
    logits = batch.scored_tokens * shape.vocabulary
    in_parts = config.mode == "adapters" and config.engine == "local"
    return (min(logits, MOST_LOGITS) if in_parts else logits) * (3 * FP32_BYTES + copy)


def _layer_bytes(shape: Shape, config: Config, batch: Pass, number: int) -> int:
    """Return the bytes that layer `number` keeps for its backward."""
    element = DTYPE_BYTES[config.model.dtype]
    is_full, is_eager = config.mode == "full", config.model.attention == "eager"
    adapted = [linear for linear in shape.adapted if linear.layer == number]
    is_first = number == shape.first_layer and not is_full
    first_position = min((POSITIONS.get(linear.name, 0) for linear in adapted), default=-1) if is_first else -1
    norms = (2 - (first_position >= 0) - (first_position >= 2)) * shape.hidden * (FP32_BYTES + element * is_full)
    attention = _attention_bytes(shape, batch, element, is_eager) if first_position < 1 else 0
    gated = 3 * shape.intermediate * element if first_position < 3 else 0
    if is_full:
        inputs = (2 * shape.hidden + shape.intermediate + shape.query_width * is_eager) * element
    else:
        inputs = _adapter_input_bytes(adapted, config, element, shares_output=bool(attention) and not is_eager)
    return batch.tokens * (norms + attention + gated + inputs)


def _attention_bytes(shape: Shape, batch: Pass, element: int, is_eager: bool) -> int:
    """Return the bytes per token that attention keeps, with queries, keys and values."""
    if is_eager:
        copy = 0 if element == FP32_BYTES else element
        return 3 * shape.query_width * element + shape.heads * batch.row_tokens * (FP32_BYTES + copy)
    return 2 * (shape.query_width + shape.key_width) * element + shape.heads * FP32_BYTES


def _adapter_input_bytes(adapted: list[Linear], config: Config, element: int, shares_output: bool) -> int:
    """Return the bytes per token that the adapters of one layer keep: their inputs, and r numbers between A and B.

    Args:
        shares_output: o_proj's input is attention's output, which sdpa keeps anyway.
    """
    # On a base of lower precision the numbers between are recomputed (`rayml.lm.lora.MixedUpdate`).
    between = len(adapted) * config.lora.rank * element if element == FP32_BYTES else 0
    if config.regularize.lora_dropout:  # each has its own masked input, and the mask
        return between + sum(linear.inputs for linear in adapted) * (element + 1)
    inputs = {SHARED_INPUT.get(linear.name, linear.name): linear.inputs for linear in adapted}
    if shares_output:
        inputs.pop("o_proj", None)
    return between + sum(inputs.values()) * element
