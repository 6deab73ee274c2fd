"""What an outer step would take on more GPUs: arithmetic on counted bytes and FLOPs, and a machine's rates.

Assumed: a ring among all workers, of which each GPU has a network link of its own beyond its node; every worker as fast
as the others; a share of the peak that matrices get, the same for every size. Left out: attention's own products, the
head, adapters, data, checkpoints.
"""

from dataclasses import dataclass
from math import ceil, log2

from rayml.algorithms.base import batches
from rayml.config import Config
from rayml.planning.batch import episode_rows, inner_steps, passes
from rayml.planning.shape import Shape
from rayml.planning.traffic import traffic


@dataclass(frozen=True, slots=True)
class Machines:
    """The rates of one GPU and its links; the defaults are an H100's, eight to a node."""

    peak_flops: float = 989e12
    """FLOP/s in the model's dtype, dense."""
    utilisation: float = 0.4
    """The share of it that training gets."""
    node_gpus: int = 8
    link_bytes: float = 450e9
    """Bytes a second that a GPU sends to others of its node."""
    network_bytes: float = 50e9
    """Bytes a second that it sends to other nodes."""
    latency: float = 20e-6
    """Seconds of each hop of a collective, of which there are log2 of the workers."""


@dataclass(frozen=True, slots=True)
class ScalingPoint:
    """One outer step on so many workers."""

    workers: int
    tasks: int
    compute_seconds: float
    communication_seconds: float
    sent_bytes: float
    """By each worker."""

    @property
    def slowest(self) -> float:
        """Return the seconds if nothing is sent while the GPU computes."""
        return self.compute_seconds + self.communication_seconds

    @property
    def fastest(self) -> float:
        """Return the seconds if all of the shorter hides behind the longer."""
        return max(self.compute_seconds, self.communication_seconds)


def predict(shape: Shape, config: Config, workers: int, machines: Machines) -> ScalingPoint:
    """Return an outer step of so many workers, each with as many tasks as the config gives one.

    In mode full under ZeRO the workers share each task's rows instead: the tasks of a step stay as many as they are.
    """
    tasks = config.tasks_per_step if config.is_sharded else config.tasks_per_worker * workers
    config = config.model_copy(update={"workers": workers, "tasks_per_step": tasks})
    bandwidth = machines.link_bytes
    if workers > machines.node_gpus:
        bandwidth = min(machines.link_bytes, machines.network_bytes)
    sent = traffic(shape, config, workers)
    hops = ceil(log2(workers)) if workers > 1 else 0
    seconds = (one.by_each(workers) / bandwidth + one.calls * hops * machines.latency for one in sent)
    return ScalingPoint(
        workers=workers,
        tasks=tasks,
        compute_seconds=worker_flops(shape, config, workers) / (machines.peak_flops * machines.utilisation),
        communication_seconds=sum(seconds),
        sent_bytes=sum(one.by_each(workers) for one in sent),
    )


def worker_flops(shape: Shape, config: Config, workers: int) -> float:
    """Return the FLOPs of one worker in an outer step: two a parameter and token, forward; as many for each gradient.

    What is of second order is counted twice, as its backward goes through the inner steps again.
    """
    if config.is_sharded:
        of_side = dict(zip(("support", "query"), episode_rows(config), strict=True))
        together = batches(config.algorithm.turns(config.inner.steps))
        each = [sum(of_side[turn.side] for turn in turns) for turns in together]
        tokens = config.tasks_per_step * sum(ceil(rows / workers) for rows in each)
    else:
        rows = zip(passes(config), episode_rows(config), strict=True)
        tokens = config.tasks_per_worker * sum(times * some for times, some in rows)
    shown = 1 + episode_rows(config)[0] * (config.algorithm.keeps == "prompt")
    above = (shape.layers - shape.first_layer) / shape.layers
    forwards = 1 + above * config.model.activation_checkpointing
    twice = 1 + (config.algorithm.second_order and inner_steps(config) > 0)
    of_token = shape.layer_parameters * (forwards + above) + shape.trained
    return 2.0 * twice * of_token * tokens * shown * config.data.max_tokens
