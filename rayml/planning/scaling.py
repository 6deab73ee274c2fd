"""`rayml scaling`: predict the time of an outer step on more GPUs, from its bytes and FLOPs and a machine's rates.

Assumptions: a ring of all workers; each GPU has its own network link beyond its node; all workers are equally fast;
matrix products reach the same share of the peak at every size. Left out: attention's own products, the head, adapters,
data, checkpoints.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, log2
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rayml.config import Config
from rayml.planning.plan import settled_for_plan, size
from rayml.planning.shape import Shape, read_shape
from rayml.planning.step import episode_rows, inner_steps, pass_rows, passes, prompt_examples, traffic
from rayml.runs.reports import COLOURS, file_pyplot, save_figure
from rayml.runs.reports import table as empty_table

GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Machines:
    """The rates of one GPU and its links; the defaults are an H100's, eight to a node."""

    peak_flops: float = 989e12
    """FLOP/s in the model's dtype, dense."""
    utilisation: float = 0.4
    """The share of the peak that training reaches."""
    node_gpus: int = 8
    link_bytes: float = 450e9
    """Bytes per second that a GPU sends to others of its node."""
    network_bytes: float = 50e9
    """Bytes per second that it sends to other nodes."""
    latency: float = 20e-6
    """Seconds of each hop of a collective; it has log2(workers) hops."""


@dataclass(frozen=True, slots=True)
class ScalingPoint:
    """One outer step on this many workers."""

    workers: int
    tasks: int
    compute_seconds: float
    communication_seconds: float
    sent_bytes: float
    """By each worker."""

    @property
    def slowest(self) -> float:
        """Seconds if nothing is sent while the GPU computes."""
        return self.compute_seconds + self.communication_seconds

    @property
    def fastest(self) -> float:
        """Seconds if computing and sending overlap fully."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def seconds(self) -> tuple[float, float]:
        return self.fastest, self.slowest

    @property
    def tasks_per_second(self) -> tuple[float, float]:
        return self.tasks / self.slowest, self.tasks / self.fastest


def predict(shape: Shape, config: Config, workers: int, machines: Machines) -> ScalingPoint:
    """Return an outer step of this many workers, each with as many tasks as a worker has in the config.

    In mode full under ZeRO the workers share each task's rows instead, and the number of tasks stays as it is.
    """
    tasks = config.tasks_per_step if config.is_sharded else config.tasks_per_worker * workers
    config = config.model_copy(update={"workers": workers, "tasks_per_step": tasks})
    bandwidth = machines.link_bytes
    if workers > machines.node_gpus:
        bandwidth = min(machines.link_bytes, machines.network_bytes)
    transfers = traffic(shape, config, workers)
    hops = ceil(log2(workers)) if workers > 1 else 0
    seconds = (part.by_each(workers) / bandwidth + part.calls * hops * machines.latency for part in transfers)
    return ScalingPoint(
        workers=workers,
        tasks=tasks,
        compute_seconds=worker_flops(shape, config, workers) / (machines.peak_flops * machines.utilisation),
        communication_seconds=sum(seconds),
        sent_bytes=sum(part.by_each(workers) for part in transfers),
    )


def worker_flops(shape: Shape, config: Config, workers: int) -> float:
    """Return the FLOPs of one worker in an outer step: two per parameter and token, forward, and for each gradient.

    An algorithm of second order counts twice, since its backward goes through the inner steps again.
    """
    if config.is_sharded:
        rows = config.tasks_per_step * sum(ceil(count / workers) for count in pass_rows(config))
    else:
        sides = zip(passes(config), episode_rows(config), strict=True)
        rows = config.tasks_per_worker * sum(times * count for times, count in sides)
    reached = (shape.layers - shape.first_layer) / shape.layers
    forwards = 1 + reached * config.model.activation_checkpointing
    order = 1 + (config.algorithm.second_order and inner_steps(config) > 0)
    per_token = shape.layer_parameters * (forwards + reached) + shape.trained
    return 2.0 * order * per_token * rows * prompt_examples(config) * config.data.max_tokens


def scaling(
    config: Config,
    workers: Sequence[int],
    networks: Sequence[float],
    machines: Machines,
    picture: Path,
    as_json: bool,
    out: Console,
) -> None:
    """Predict every number of workers on every network; print the table, or JSON, and draw the plot.

    Args:
        networks: bytes per second that each GPU sends to other nodes.

    Raises:
        ConfigError: there is no such model, or nothing of it to adapt or train.
    """
    config = settled_for_plan(config, on_gpu=True)
    shape = read_shape(config)
    predictions = {
        network: [predict(shape, config, count, replace(machines, network_bytes=network)) for count in workers]
        for network in networks
    }
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot(predictions, config, machines, picture)
    if as_json:
        rows = [
            {"network_bytes": network} | asdict(point) for network, points in predictions.items() for point in points
        ]
        print(json.dumps({"machines": asdict(machines), "predictions": rows}, indent=2))
        return
    out.print(table(predictions, config, machines))
    out.print(f"{picture}\n{assumptions(config, machines)}", highlight=False, soft_wrap=True)


def assumptions(config: Config, machines: Machines) -> str:
    rate = machines.peak_flops * machines.utilisation / 1e12
    tasks = "the rows of each task are shared" if config.is_sharded else f"{config.tasks_per_worker} task(s) per worker"
    return (
        f"Predicted, not measured: {rate:.0f} TFLOP/s per GPU, {machines.node_gpus} GPUs per node at "
        f"{machines.link_bytes / GIGA:g} GB/s each, {tasks}; least: all is sent while they compute, most: nothing."
    )


def table(predictions: dict[float, list[ScalingPoint]], config: Config, machines: Machines) -> Table:
    """Return a row for each network and number of workers, with the least and most seconds of a step, and tasks/s."""
    heads = "GB/s", "GPUs", "tasks", "sent by each", "computing", "sending", "step", "", "tasks/s", ""
    rows = empty_table(heads, no_wrap=True, title=title(config))
    networks = list(predictions)
    for network, points in predictions.items():
        for point in points:
            uses_network = point.workers > machines.node_gpus
            if not uses_network and network != networks[0]:
                continue  # the same as with the first network
            bandwidth, sent = f"{network / GIGA:g}" if uses_network else "-", size(round(point.sent_bytes))
            parts = (
                f"{digits(part)} s" for part in (point.compute_seconds, point.communication_seconds, *point.seconds)
            )
            rows.add_row(
                bandwidth, str(point.workers), str(point.tasks), sent, *parts, *map(digits, point.tasks_per_second)
            )
        rows.add_section()
    return rows


def digits(number: float) -> str:
    """Return a number with three digits or more, without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{float(f'{number:.3g}'):f}".rstrip("0").rstrip(".")


def title(config: Config) -> str:
    return f"{config.model.name}, mode {config.mode}, engine {config.engine}"


def plot(predictions: dict[float, list[ScalingPoint]], config: Config, machines: Machines, picture: Path) -> None:
    """Draw the seconds of a step, and the tasks per second, over the number of GPUs: a band for each network."""
    pyplot = file_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for (network, points), colour in zip(predictions.items(), COLOURS * len(predictions), strict=False):
        counts = [point.workers for point in points]
        bands = [point.seconds for point in points], [point.tasks_per_second for point in points]
        for axis, band in zip((left, right), bands, strict=True):
            lows, highs = zip(*band, strict=True)
            axis.fill_between(counts, lows, highs, color=colour, alpha=0.25)
            axis.plot(counts, highs if axis is left else lows, color=colour, marker="o", markersize=3)
            axis.plot(counts, lows if axis is left else highs, color=colour, linewidth=0.8, label=f"{network / GIGA:g}")
    first, *_ = points = next(iter(predictions.values()))
    ticks = [point.workers for point in points]
    ideal = [first.tasks / first.fastest * count / first.workers for count in ticks]
    right.plot(ticks, ideal, color="black", linestyle=":", label="linear")
    seconds = [bound for points in predictions.values() for point in points for bound in point.seconds]
    if max(seconds) > 10 * min(seconds):
        left.set_yscale("log")
    else:  # a logarithmic axis of less than a decade has hardly a number on it
        left.set_ylim(0, 1.1 * max(seconds))
    right.set_yscale("log")
    for axis, label in ((left, "seconds per outer step"), (right, "tasks per second")):
        axis.set(xscale="log", xlabel="GPUs", ylabel=label)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.25)
    right.legend(frameon=False, title="GB/s per GPU between nodes")
    figure.suptitle(f"{title(config)}\n{assumptions(config, machines)}", fontsize=9)
    save_figure(figure, picture)
