"""`rayml scaling`: what an outer step would take on more GPUs, from counted bytes and FLOPs, and a machine's rates.

Assumed: a ring among all workers, of which each GPU has a network link of its own beyond its node; every worker as fast
as the others; a share of the peak that matrices get, the same for every size. Left out: attention's own products, the
head, adapters, data, checkpoints.
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
from rayml.planning.step import episode_rows, inner_steps, passes, rows_together, shown, traffic
from rayml.runs.reports import COLOURS, file_pyplot, save_figure
from rayml.runs.reports import table as empty_table

GIGA = 1e9


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

    @property
    def seconds(self) -> tuple[float, float]:
        return self.fastest, self.slowest

    @property
    def tasks_per_second(self) -> tuple[float, float]:
        return self.tasks / self.slowest, self.tasks / self.fastest


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
        rows = config.tasks_per_step * sum(ceil(some / workers) for some in rows_together(config))
    else:
        sides = zip(passes(config), episode_rows(config), strict=True)
        rows = config.tasks_per_worker * sum(times * some for times, some in sides)
    above = (shape.layers - shape.first_layer) / shape.layers
    forwards = 1 + above * config.model.activation_checkpointing
    twice = 1 + (config.algorithm.second_order and inner_steps(config) > 0)
    of_token = shape.layer_parameters * (forwards + above) + shape.trained
    return 2.0 * twice * of_token * rows * shown(config) * config.data.max_tokens


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
        networks: bytes a second that each GPU sends to other nodes.

    Raises:
        ConfigError: no such model, or nothing of it to adapt or train.
    """
    config = settled_for_plan(config, on_gpu=True)
    shape = read_shape(config)
    found = {
        network: [predict(shape, config, count, replace(machines, network_bytes=network)) for count in workers]
        for network in networks
    }
    plot(found, config, machines, picture)
    if as_json:
        rows = [{"network_bytes": network} | asdict(one) for network, ones in found.items() for one in ones]
        print(json.dumps({"machines": asdict(machines), "predictions": rows}, indent=2))
        return
    out.print(table(found, config, machines))
    out.print(f"{picture}\n{assumptions(config, machines)}", highlight=False, soft_wrap=True)


def assumptions(config: Config, machines: Machines) -> str:
    rate = machines.peak_flops * machines.utilisation / 1e12
    tasks = "the rows of each task are shared" if config.is_sharded else f"{config.tasks_per_worker} task(s) a worker"
    return (
        f"Predicted, not measured: {rate:.0f} TFLOP/s a GPU, {machines.node_gpus} to a node at "
        f"{machines.link_bytes / GIGA:g} GB/s each, {tasks}; least: all is sent while they compute, most: nothing."
    )


def table(found: dict[float, list[ScalingPoint]], config: Config, machines: Machines) -> Table:
    """Return a row for each network and number of workers, with the least and the most of a step, and of tasks."""
    heads = "GB/s", "GPUs", "tasks", "sent by each", "computing", "sending", "step", "", "tasks/s", ""
    rows = empty_table(heads, no_wrap=True, title=title(config))
    networks = list(found)
    for network, ones in found.items():
        for one in ones:
            is_beyond = one.workers > machines.node_gpus
            if not is_beyond and network != networks[0]:
                continue  # the same as on the first
            beyond, sent = f"{network / GIGA:g}" if is_beyond else "-", size(round(one.sent_bytes))
            parts = (f"{digits(part)} s" for part in (one.compute_seconds, one.communication_seconds, *one.seconds))
            rows.add_row(beyond, str(one.workers), str(one.tasks), sent, *parts, *map(digits, one.tasks_per_second))
        rows.add_section()
    return rows


def digits(number: float) -> str:
    """Return three digits or more, never an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{float(f'{number:.3g}'):f}".rstrip("0").rstrip(".")


def title(config: Config) -> str:
    return f"{config.model.name}, mode {config.mode}, engine {config.engine}"


def plot(found: dict[float, list[ScalingPoint]], config: Config, machines: Machines, picture: Path) -> None:
    """Draw the seconds of a step, and the tasks a second, over the GPUs to a PNG: a band for each network."""
    pyplot = file_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for (network, ones), colour in zip(found.items(), COLOURS * len(found), strict=False):
        counts = [one.workers for one in ones]
        bands = [one.seconds for one in ones], [one.tasks_per_second for one in ones]
        for axis, band in zip((left, right), bands, strict=True):
            lows, highs = zip(*band, strict=True)
            axis.fill_between(counts, lows, highs, color=colour, alpha=0.25)
            axis.plot(counts, highs if axis is left else lows, color=colour, marker="o", markersize=3)
            axis.plot(counts, lows if axis is left else highs, color=colour, linewidth=0.8, label=f"{network / GIGA:g}")
    first, *_ = points = next(iter(found.values()))
    ticks = [one.workers for one in points]
    ideal = [first.tasks / first.fastest * count / first.workers for count in ticks]
    right.plot(ticks, ideal, color="black", linestyle=":", label="linear")
    for axis, label in ((left, "seconds of an outer step"), (right, "tasks a second")):
        axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel=label)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    right.legend(frameon=False, title="GB/s a GPU between nodes")
    figure.suptitle(f"{title(config)}\n{assumptions(config, machines)}", fontsize=9)
    save_figure(figure, picture)
