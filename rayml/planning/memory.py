"""What a worker's memory is spent on: plain arithmetic on a model's shape and a config."""

from dataclasses import dataclass

from rayml.config import Config
from rayml.planning.activations import DTYPE_BYTES, FP32_BYTES, activation_bytes, logits_bytes
from rayml.planning.batch import inner_steps, largest_pass, tasks_at_once
from rayml.planning.shape import Shape

GATHERED = 1_000_000_000
"""Parameters that ZeRO-3 has gathered at a time, at most: DeepSpeed's stage3_max_live_parameters, which it uses up."""
BUCKET = 50_000_000
"""Gradients in flight under mode full: DeepSpeed's reduce_bucket_size; they travel in fp32."""
MAML_STEP = 2.5
"""An inner step of exact MAML in units of its forward's activations: the graph of the forward and of the backward."""
ALLOWANCE = 0.10
"""For the CUDA context, and for what the allocator rounds up and cannot reuse."""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One kind of tensors, on the GPU (`device_bytes`) and in CPU memory (`host_bytes`) of one worker."""

    name: str
    device_bytes: int
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One worker's memory at its peak. The parts are counted as if all were there at once."""

    parts: tuple[MemoryPart, ...]

    @property
    def device_bytes(self) -> int:
        return sum(part.device_bytes for part in self.parts)

    @property
    def host_bytes(self) -> int:
        return sum(part.host_bytes for part in self.parts)

    def fits(self, gpu_bytes: int) -> bool:
        return self.device_bytes <= gpu_bytes


def memory(shape: Shape, config: Config, target_tokens: int = 1) -> Plan:
    """Return one worker's memory, part by part.

    Args:
        target_tokens: tokens of a row's target: 1 for labels of one token, more for free text.
    """
    if config.mode == "adapters":
        states = _adapters(shape, config)
    elif config.engine == "local":
        states = _full_local(shape, config)
    else:
        states = _full_zero(shape, config)
    checkpointing = config.model.activation_checkpointing
    parts = [*states, *passing(shape, config, target_tokens, checkpointing)]
    return Plan((*parts, MemoryPart("allowance", int(ALLOWANCE * sum(part.device_bytes for part in parts)))))


def passing(shape: Shape, config: Config, target_tokens: int, checkpointing: bool) -> list[MemoryPart]:
    """Return the activations and logits. Exact MAML keeps those of every inner step, and of its backward."""
    batch = largest_pass(config, target_tokens)
    times = 1 + (MAML_STEP * inner_steps(config) if config.algorithm.second_order else 0)
    activations = activation_bytes(shape, config, batch, checkpointing)
    logits = logits_bytes(shape, config, batch)
    return [MemoryPart("activations", int(times * activations)), MemoryPart("logits", int(times * logits))]


def _adapters(shape: Shape, config: Config) -> list[MemoryPart]:
    """Adapters in fp32, whole on every worker; the frozen base in its dtype, whole or sharded."""
    start = FP32_BYTES * shape.adapter(config.lora.rank)
    tasks, steps = tasks_at_once(config), inner_steps(config)
    moments = 2 if config.outer.optimizer == "adamw" else 0
    rates = 1 if config.algorithm.learned_rates == "weight" else 0  # one rate a weight, learned as the start is
    # Fast weights and the sum of the inner gradients; exact MAML keeps those of every step.
    copies = 2 * (steps if config.algorithm.second_order else min(steps, 1))
    sent = 2 if config.most_workers > 1 else 1  # the all-reduce is of one flat copy
    return [
        MemoryPart("parameters", _base(shape, config) + start),
        MemoryPart("gathered layers", _gathered(shape, config)),
        MemoryPart("gradients", tasks * start),
        MemoryPart("optimizer", (moments * (1 + rates) + rates) * start),
        MemoryPart("fast weights", copies * tasks * start),
        MemoryPart("meta-gradient", sent * (1 + rates) * start),
    ]


def _full_local(shape: Shape, config: Config) -> list[MemoryPart]:
    """Plain torch, everything whole: the model in its dtype, and what is learned in fp32."""
    element = DTYPE_BYTES[config.model.dtype]
    trained = FP32_BYTES * shape.trained
    cast = 0 if config.model.dtype == "float32" else element * shape.trained  # of the weights that a forward reads
    return [
        MemoryPart("parameters", element * shape.parameters + trained + cast),
        MemoryPart("gathered layers", 0),
        MemoryPart("gradients", trained),
        MemoryPart("optimizer", (2 if config.outer.optimizer == "adamw" else 0) * trained),
        MemoryPart("fast weights", 2 * min(inner_steps(config), 1) * trained),  # and the sum of the inner gradients
        MemoryPart("meta-gradient", trained),
    ]


def _full_zero(shape: Shape, config: Config) -> list[MemoryPart]:
    """The phased optimizer under DeepSpeed: fp32 shards of master, moments, anchor and meta-gradient."""
    element, stage, offload = DTYPE_BYTES[config.model.dtype], config.zero.stage, config.zero.offload
    shard = FP32_BYTES * _share(shape.trained, config)
    master_and_moments = (3 if config.outer.optimizer == "adamw" else 1) * shard
    gradients = shape.trained if stage == 1 else _share(shape.trained, config)
    parameters = _base(shape, config) if stage == 3 else element * shape.parameters
    away = stage == 3 and offload == "all"
    return [
        MemoryPart("parameters", 0, parameters) if away else MemoryPart("parameters", parameters),
        MemoryPart("gathered layers", _gathered(shape, config, away) if stage == 3 else 0),
        MemoryPart("gradients", element * gradients),
        MemoryPart("reduce bucket", FP32_BYTES * min(shape.trained, BUCKET)),
        _placed("optimizer", master_and_moments, offload != "none"),
        _placed("fast weights", shard, offload != "none"),  # the anchor: the start, while the master is adapted
        _placed("meta-gradient", shard, offload != "none"),
    ]


def _placed(name: str, size: int, on_host: bool) -> MemoryPart:
    return MemoryPart(name, 0, size) if on_host else MemoryPart(name, size)


def _base(shape: Shape, config: Config) -> int:
    """Return the bytes of the model's weights that lie on a worker between its passes."""
    element = DTYPE_BYTES[config.model.dtype]
    if config.engine == "local":
        return element * shape.parameters
    return element * (_share(shape.parameters - shape.small_parameters, config) + shape.small_parameters)


def _gathered(shape: Shape, config: Config, offloaded: bool = False) -> int:
    """Return the bytes of other workers' weights during a pass: as many as DeepSpeed allows, at least a layer.

    A worker on its own has nothing to gather, unless its weights lie in CPU memory.
    """
    if config.engine == "local" or (config.fewest_workers == 1 and not offloaded):
        return 0
    at_least = shape.largest_layer + shape.embedding
    return DTYPE_BYTES[config.model.dtype] * min(shape.parameters, max(GATHERED, at_least))


def _share(elements: int, config: Config) -> int:
    """Return one worker's elements of what is sharded over all."""
    return -(-elements // config.fewest_workers)
