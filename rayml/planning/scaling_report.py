"""`rayml scaling`: a table and a plot of predicted outer steps over the number of GPUs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rayml.config import Config
from rayml.planning.command import settled_for_plan, size
from rayml.planning.read import read_shape
from rayml.planning.scaling import Machines, ScalingPoint, predict
from rayml.runs.plots import file_pyplot, save_figure

COLOURS = "#1f6f54", "#b0552f", "#3b6ea5", "#8a5a9e"
GIGA = 1e9


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
    rows = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title(config), title_justify="left")
    for name in ("GB/s", "GPUs", "tasks", "sent by each", "computing", "sending", "step", "", "tasks/s", ""):
        rows.add_column(name, justify="right", no_wrap=True)
    networks = list(found)
    for network, ones in found.items():
        for one in ones:
            is_beyond = one.workers > machines.node_gpus
            if not is_beyond and network != networks[0]:
                continue  # the same as on the first
            beyond, sent = f"{network / GIGA:g}" if is_beyond else "-", size(round(one.sent_bytes))
            parts = (f"{digits(part)} s" for part in (one.compute_seconds, one.communication_seconds, *seconds(one)))
            rows.add_row(beyond, str(one.workers), str(one.tasks), sent, *parts, *map(digits, per_second(one)))
        rows.add_section()
    return rows


def digits(number: float) -> str:
    """Return three digits or more, never an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{float(f'{number:.3g}'):f}".rstrip("0").rstrip(".")


def seconds(one: ScalingPoint) -> tuple[float, float]:
    return one.fastest, one.slowest


def per_second(one: ScalingPoint) -> tuple[float, float]:
    return one.tasks / one.slowest, one.tasks / one.fastest


def title(config: Config) -> str:
    return f"{config.model.name}, mode {config.mode}, engine {config.engine}"


def plot(found: dict[float, list[ScalingPoint]], config: Config, machines: Machines, picture: Path) -> None:
    """Draw the seconds of a step, and the tasks a second, over the GPUs to a PNG: a band for each network."""
    pyplot = file_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for (network, ones), colour in zip(found.items(), COLOURS * len(found), strict=False):
        counts = [one.workers for one in ones]
        for axis, of in ((left, seconds), (right, per_second)):
            lows, highs = zip(*map(of, ones), strict=True)
            axis.fill_between(counts, lows, highs, color=colour, alpha=0.25)
            axis.plot(counts, highs if axis is left else lows, color=colour, marker="o", markersize=3)
            axis.plot(counts, lows if axis is left else highs, color=colour, linewidth=0.8, label=f"{network / GIGA:g}")
    first = next(iter(found.values()))[0]
    ideal = [first.tasks / first.fastest * one.workers / first.workers for one in next(iter(found.values()))]
    right.plot([one.workers for one in next(iter(found.values()))], ideal, color="black", linestyle=":", label="linear")
    for axis, label in ((left, "seconds of an outer step"), (right, "tasks a second")):
        axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel=label)
        ticks = [one.workers for one in next(iter(found.values()))]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    right.legend(frameon=False, title="GB/s a GPU between nodes")
    figure.suptitle(f"{title(config)}\n{assumptions(config, machines)}", fontsize=9)
    save_figure(figure, picture)
