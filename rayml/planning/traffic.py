"""What workers send each other in an outer step: plain arithmetic, equal to what the collectives are seen to send.

Left out are single numbers (a loss, whether a gradient was finite), and what is not sent in every step: checkpoints,
validations, and the first pass of a sharded base, in which DeepSpeed learns the order of its layers.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from rayml.algorithms.base import batches
from rayml.config import Config
from rayml.planning.activations import DTYPE_BYTES, FP32_BYTES
from rayml.planning.batch import passes
from rayml.planning.memory import BUCKET
from rayml.planning.shape import Shape

REUSED = 1_000_000_000
"""Elements; DeepSpeed's stage3_max_reuse_distance: weights that are used again within so many are not let go of."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What the workers send each other of one kind, in an outer step."""

    name: str
    collective: Literal["all-reduce", "all-gather", "reduce-scatter"]
    tensor_bytes: int
    """Of the whole tensors, of all calls together."""
    calls: int
    """About."""

    def by_each(self, workers: int) -> float:
        """Return the bytes that each worker sends, in a ring (Patarasu and Yuan 2009): as few as can be."""
        rounds = 2 if self.collective == "all-reduce" else 1
        return rounds * self.tensor_bytes * (workers - 1) / workers


def traffic(shape: Shape, config: Config, workers: int) -> list[Sent]:
    """Return all that is sent in an outer step by so many workers."""
    if config.is_sharded:
        return of_full(shape, config)
    sent = [meta_gradient(shape, config, workers)]
    return [*sent, gathered(shape, config, sum(passes(config)))] if config.engine == "zero" else sent


def meta_gradient(shape: Shape, config: Config, workers: int) -> Sent:
    """Return the one message in which whole gradients are summed, and with them two losses, tokens, workers' seconds.

    With `data.weighting=dynamic` there are two numbers more for every meta-train task; `inner.modules` leaves out some
    rates.
    """
    learned, tensors = shape.trained, shape.trained_tensors
    if config.mode == "adapters":
        learned, tensors = shape.adapter(config.lora.rank), 2 * len(shape.adapted) + bool(shape.prompt)
    rates = (
        {"none": 0, "tensor": tensors, "weight": learned}[config.algorithm.learned_rates]
        if config.learns_inner_lrs
        else 0
    )
    return Sent("meta-gradient", "all-reduce", FP32_BYTES * (learned + rates + 3 + workers), 1)


def of_full(shape: Shape, config: Config) -> list[Sent]:
    """Return what mode full sends under ZeRO: every inner step is an optimizer step of sharded weights."""
    steps = config.tasks_per_step * descents(config)
    gradients, element = FP32_BYTES * shape.trained * steps, DTYPE_BYTES[config.model.dtype]
    buckets = steps * ceil(shape.trained / BUCKET)
    if config.zero.stage < 3:
        weights = element * shape.trained * steps
        return [Sent("gradients", "all-reduce", gradients, buckets), Sent("new weights", "all-gather", weights, steps)]
    small = element * sum(shape.small_trained) * steps
    return [
        gathered(shape, config, steps),
        Sent("gradients", "reduce-scatter", gradients, buckets),
        *([Sent("new small weights", "all-gather", small, steps * len(shape.small_trained))] if small else []),
    ]


def descents(config: Config) -> int:
    """Return the steps on one task's minibatches in mode full; turns at the same weights share one."""
    return len(batches(config.algorithm.turns(config.inner.steps)))


def gathered(shape: Shape, config: Config, times: int) -> Sent:
    """Return the sharded weights that are put together for so many passes, each forward and backward.

    Between the two, what lies so near the end that its backward comes soon is kept. It does not depend on how many
    tasks go through the model side by side. Where activations are computed again, DeepSpeed may let go of any frozen
    weight in between, but for the one that the backward begins with: there it is the most that is sent.
    """
    sharded = shape.parameters - shape.small_parameters
    if sharded <= REUSED // 2:
        elements = sharded
    else:
        again = shape.tied_forward + shape.tied_backward if shape.layer_parameters >= REUSED else 0
        elements = sharded + shape.backward_parameters + again - min(shape.backward_parameters, REUSED // 2)
    if config.mode == "adapters" and config.model.activation_checkpointing:
        elements += shape.recomputed_parameters
    return Sent(
        "gathered weights", "all-gather", DTYPE_BYTES[config.model.dtype] * elements * times, times * 2 * shape.layers
    )
