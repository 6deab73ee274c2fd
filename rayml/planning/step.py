"""What an outer step computes and sends: plain arithmetic. The bytes equal what the collectives are seen to send.

Left out are single numbers (a loss, whether a gradient was finite), and what is not sent in every step: checkpoints,
validations, and the first pass of a sharded base, in which DeepSpeed learns the order of its layers.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from rayml.algorithms.base import batches
from rayml.config import Config
from rayml.planning.shape import Shape

FP32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
BUCKET = 50_000_000
"""Gradients in flight under mode full: DeepSpeed's reduce_bucket_size; they travel in fp32."""
REUSED = 1_000_000_000
"""Elements; DeepSpeed's stage3_max_reuse_distance: weights that are used again within so many are not let go of."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows of one worker that share a graph, and what is scored of them."""

    rows: int
    row_tokens: int
    scored_tokens: int
    """Positions with logits, over all rows."""

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


def inner_steps(config: Config) -> int:
    return config.algorithm.inner_steps(config.inner.steps)


def passes(config: Config) -> tuple[int, int]:
    """Return how often an outer step runs forward and backward over an episode's support, and over its query."""
    return config.algorithm.passes(config.inner.steps)


def episode_rows(config: Config) -> tuple[int, int]:
    """Return the support and query rows of an episode: the worst case, since a task may have fewer classes."""
    return config.data.ways * config.data.shots, config.data.ways * config.data.queries


def rows_together(config: Config) -> list[int]:
    """Return the rows of each batch of an episode in mode full, where turns at the same weights share one."""
    of_side = dict(zip(("support", "query"), episode_rows(config), strict=True))
    turns = config.algorithm.turns(config.inner.steps)
    return [sum(of_side[turn.side] for turn in together) for together in batches(turns)]


def shown(config: Config) -> int:
    """Return the examples in the prompt of a query, itself included."""
    return 1 + episode_rows(config)[0] * (config.algorithm.keeps == "prompt")


def largest_pass(config: Config, target_tokens: int) -> Pass:
    """Return one worker's largest pass, with every row as long as `data.max_tokens` allows.

    Under mode full and engine zero the workers share a task's rows. What keeps the support has it in each query's
    prompt, or puts both sides into one graph; what is learned by hidden states alone scores no logits.
    """
    sides, algorithm = episode_rows(config), config.algorithm
    rows = max(rows_together(config)) if config.mode == "full" else _largest_side(config)
    if algorithm.keeps_states:
        rows = sum(sides)
    if config.is_sharded:
        rows = ceil(rows / config.fewest_workers)
    rows *= config.tasks_together
    length = shown(config) * (config.data.max_tokens + config.soft_tokens)
    return Pass(rows, length, rows * target_tokens if algorithm.by_tokens else 0)


def _largest_side(config: Config) -> int:
    of_side = dict(zip(("support", "query"), episode_rows(config), strict=True))
    return max(of_side[turn.side] for turn in config.algorithm.turns(config.inner.steps))


def tokens_per_step(config: Config) -> int:
    """Return the tokens that go forward and backward in an outer step over all workers, padding included."""
    (support, query), (of_support, of_query) = episode_rows(config), passes(config)
    rows = of_support * support + of_query * query * shown(config)
    return config.tasks_per_step * rows * config.data.max_tokens


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
        return _of_full(shape, config)
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
    of_kind = {"none": 0, "tensor": tensors, "weight": learned}
    rates = of_kind[config.algorithm.learned_rates] if config.learns_inner_lrs else 0
    return Sent("meta-gradient", "all-reduce", FP32_BYTES * (learned + rates + 3 + workers), 1)


def _of_full(shape: Shape, config: Config) -> list[Sent]:
    """Return what mode full sends under ZeRO: every inner step is an optimizer step of sharded weights."""
    steps = config.tasks_per_step * len(rows_together(config))
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


def gathered(shape: Shape, config: Config, times: int) -> Sent:
    """Return the sharded weights that are put together for so many passes, each forward and backward.

    Between the two, what lies so near the end that its backward comes soon is kept. It does not depend on how many
    tasks go through the model side by side. Where activations are computed again, DeepSpeed may let go of any frozen
    weight in between, but for the one that the backward begins with: there it is the most that is sent.
    """
    elements = shape.parameters - shape.small_parameters
    if elements > REUSED // 2:
        again = shape.tied_forward + shape.tied_backward if shape.layer_parameters >= REUSED else 0
        elements += shape.backward_parameters + again - min(shape.backward_parameters, REUSED // 2)
    if config.mode == "adapters" and config.model.activation_checkpointing:
        elements += shape.recomputed_parameters
    size = DTYPE_BYTES[config.model.dtype] * elements * times
    return Sent("gathered weights", "all-gather", size, times * 2 * shape.layers)
