"""The rows, tokens and traffic of an outer step, by plain arithmetic. Tests compare the bytes with real collectives.

Not counted are single numbers (a loss, whether a gradient is finite), and what is not sent in every step: checkpoints,
validations, and the first pass of a sharded base, in which DeepSpeed learns the order of its layers.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from rayml.algorithms.base import group_minibatches
from rayml.config import Config
from rayml.planning.shape import Shape

FP32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
BUCKET = 50_000_000
"""DeepSpeed's reduce_bucket_size in mode full: gradients that are sent together, in fp32."""
REUSED = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance: weights that are used again within this many elements are kept."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The rows of one worker that share a graph."""

    rows: int
    row_tokens: int
    scored_tokens: int
    """Positions with logits, in all rows."""

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


def inner_steps(config: Config) -> int:
    return config.algorithm.inner_steps(config.inner.steps)


def passes(config: Config) -> tuple[int, int]:
    """Return how often an outer step goes forward and backward through an episode's support, and through its query."""
    return config.algorithm.passes(config.inner.steps)


def episode_rows(config: Config) -> tuple[int, int]:
    """Return the support and query rows of an episode. This is the worst case: a task may have fewer classes."""
    return config.data.ways * config.data.shots, config.data.ways * config.data.queries


def pass_rows(config: Config) -> list[int]:
    """Return the rows of each pass through an episode. In mode full, minibatches at the same weights share a pass."""
    side_rows = dict(zip(("support", "query"), episode_rows(config), strict=True))
    minibatches = config.algorithm.minibatches(config.inner.steps)
    groups = group_minibatches(minibatches) if config.mode == "full" else [[minibatch] for minibatch in minibatches]
    return [sum(side_rows[minibatch.side] for minibatch in group) for group in groups]


def prompt_examples(config: Config) -> int:
    """Return the number of examples in a query's prompt, the query included."""
    return 1 + episode_rows(config)[0] * config.algorithm.shows_examples(is_label=False)


def largest_pass(config: Config, target_tokens: int) -> Pass:
    """Return one worker's largest pass, with every row as long as `data.max_tokens` allows.

    In mode full under engine zero the workers share a task's rows. An algorithm that keeps the support has it in each
    query's prompt, or has both sides in one graph. One that learns by hidden states alone computes no logits.
    """
    algorithm = config.algorithm
    rows = max(pass_rows(config))
    if algorithm.keeps_states:
        rows = sum(episode_rows(config))
    if config.is_sharded:
        rows = ceil(rows / config.fewest_workers)
    rows *= config.tasks_together
    length = prompt_examples(config) * (config.data.max_tokens + config.soft_tokens)
    return Pass(rows, length, rows * target_tokens if algorithm.by_tokens else 0)


def tokens_per_step(config: Config) -> int:
    """Return the tokens that go forward and backward in an outer step on all workers, with padding."""
    support_rows, query_rows = episode_rows(config)
    support_passes, query_passes = passes(config)
    rows = support_passes * support_rows + query_passes * query_rows * prompt_examples(config)
    return config.tasks_per_step * rows * config.data.max_tokens


@dataclass(frozen=True, slots=True)
class Transfer:
    """One kind of data that the workers exchange in an outer step."""

    name: str
    collective: Literal["all-reduce", "all-gather", "reduce-scatter"]
    tensor_bytes: int
    """Of the whole tensors, over all calls."""
    calls: int
    """An estimate."""

    def by_each(self, workers: int) -> float:
        """Return the bytes that each worker sends in a ring, which is optimal (Patarasu and Yuan 2009)."""
        rounds = 2 if self.collective == "all-reduce" else 1
        return rounds * self.tensor_bytes * (workers - 1) / workers


def traffic(shape: Shape, config: Config, workers: int) -> list[Transfer]:
    """Return all that this many workers exchange in an outer step."""
    if config.is_sharded:
        return _full_traffic(shape, config)
    transfers = [meta_gradient(shape, config, workers)]
    if config.engine == "zero":
        transfers.append(gathered_weights(shape, config, sum(passes(config))))
    return transfers


def meta_gradient(shape: Shape, config: Config, workers: int) -> Transfer:
    """Return the all-reduce of the whole gradients, with two losses, the tokens, and each worker's seconds.

    With `data.weighting=dynamic` there are two more numbers for every meta-train task. With `inner.modules` there are
    fewer rates than counted here.
    """
    learned, tensors = shape.trained, shape.trained_tensors
    if config.mode == "adapters":
        learned, tensors = shape.adapter(config.lora.rank), 2 * len(shape.adapted) + bool(shape.prompt)
    rate_counts = {"none": 0, "tensor": tensors, "weight": learned}
    rates = rate_counts[config.algorithm.learned_rates] if config.learns_inner_lrs else 0
    return Transfer("meta-gradient", "all-reduce", FP32_BYTES * (learned + rates + 3 + workers), 1)


def _full_traffic(shape: Shape, config: Config) -> list[Transfer]:
    """Return the transfers of mode full under ZeRO, where every inner step is an optimizer step of sharded weights."""
    steps = config.tasks_per_step * len(pass_rows(config))
    gradients, element = FP32_BYTES * shape.trained * steps, DTYPE_BYTES[config.model.dtype]
    buckets = steps * ceil(shape.trained / BUCKET)
    if config.zero.stage < 3:
        weights = element * shape.trained * steps
        return [
            Transfer("gradients", "all-reduce", gradients, buckets),
            Transfer("new weights", "all-gather", weights, steps),
        ]
    small = element * sum(shape.small_trained) * steps
    return [
        gathered_weights(shape, config, steps),
        Transfer("gradients", "reduce-scatter", gradients, buckets),
        *([Transfer("new small weights", "all-gather", small, steps * len(shape.small_trained))] if small else []),
    ]


def gathered_weights(shape: Shape, config: Config, times: int) -> Transfer:
    """Return the all-gather of sharded weights in this many passes, each forward and backward.

    Between the two, weights near the end are kept, since their backward comes soon. The bytes do not depend on how many
    tasks go through the model side by side. If activations are recomputed, DeepSpeed may release any frozen weight in
    between, except the one that the backward begins with; then this is an upper bound.
    """
    elements = shape.parameters - shape.small_parameters
    if elements > REUSED // 2:
        again = shape.tied_forward + shape.tied_backward if shape.layer_parameters >= REUSED else 0
        elements += shape.backward_parameters + again - min(shape.backward_parameters, REUSED // 2)
    if config.mode == "adapters" and config.model.activation_checkpointing:
        elements += shape.recomputed_parameters
    size = DTYPE_BYTES[config.model.dtype] * elements * times
    return Transfer("gathered weights", "all-gather", size, times * 2 * shape.layers)
