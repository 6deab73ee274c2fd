"""`rayml plan`: the memory of a worker, which shardings fit a GPU, and the smallest change that would fit."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import reduce
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from rayml.config import Config, parse_config
from rayml.errors import ConfigError
from rayml.planning.memory import ALLOWANCE, MemoryPlan, activation_parts, plan_memory
from rayml.planning.shape import Shape, read_shape
from rayml.planning.step import episode_rows, largest_pass, tokens_per_step, traffic
from rayml.runs.reports import table as empty_table

GIB = 1024**3
BAR_CELLS = 28
CHECKPOINTING = ("model.activation_checkpointing=true",)
MOST_WORKERS = 1024
ENGINES: list[tuple[str, ...]] = [("engine=local",), ("engine=zero", "zero.stage=3")]
# From fast to slow: offloaded tensors have to come back in every step.
ZERO = [
    ("engine=zero", f"zero.stage={stage}", f"zero.offload={offload}")
    for offload, stages in (("none", (1, 2, 3)), ("optimizer", (1, 2, 3)), ("all", (3,)))
    for stage in stages
]


def plan(config: Config, gpu_gib: float | None, target_tokens: int, as_json: bool, out: Console) -> bool:
    """Print one worker's memory; return False if it does not fit the GPU.

    Args:
        gpu_gib: the GPU's memory; None for the GPU of this machine, if there is one.
        target_tokens: tokens of a row's target.

    Raises:
        ConfigError: there is no such model, or nothing of it to adapt or train.
    """
    gpu_bytes = int(gpu_gib * GIB) if gpu_gib else local_gpu_bytes(config)
    config = settled_for_plan(config, bool(gpu_bytes))
    report = build_report(read_shape(config), config, target_tokens, gpu_bytes)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, config, out)
    return report["fits"] is not False


def settled_for_plan(config: Config, on_gpu: bool) -> Config:
    """Return the config with the dtype and attention that it would have here, or on a recent GPU."""
    import torch

    from rayml.lm.catalog import resolve_model
    from rayml.lm.precision import RECENT_GPU, device_for, resolve_precision

    base = resolve_model(config.model.name)
    device = RECENT_GPU if on_gpu else device_for(config, base, torch.device("cpu"))
    return resolve_precision(config, base, [device])[0]


def local_gpu_bytes(config: Config) -> int | None:
    """Return the memory of this machine's first GPU; None if there is none, or the config trains on the CPU."""
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


# The search for what fits


def with_overrides(config: Config, overrides: Sequence[str]) -> Config | None:
    """Return the config with more overrides; None if they make it invalid."""
    try:
        return parse_config(config.model_dump(mode="json"), "plan", overrides)
    except ConfigError:
        return None


def shardings(config: Config) -> list[tuple[str, ...]]:
    """Return the ways to shard that the config's mode allows, as overrides."""
    return ENGINES if config.mode == "adapters" else [("engine=local", "zero.offload=none"), *ZERO]


def alternatives(shape: Shape, config: Config, target_tokens: int) -> Iterator[tuple[tuple[str, ...], MemoryPlan]]:
    """Yield each way to shard, as overrides, with its plan."""
    for overrides in shardings(config):
        candidate = with_overrides(config, overrides)
        if candidate:
            yield overrides, plan_memory(shape, candidate, target_tokens)


def smallest_change(shape: Shape, config: Config, target_tokens: int, gpu_bytes: int) -> list[str] | None:
    """Return the overrides of the first change that fits; None if none does.

    Tried are the config's number of workers, twice as many, and so on; for each, first without and then with
    checkpointing, every sharding; and for each of these, all tasks side by side, half of them, and so on. The number of
    tasks is rounded up to a multiple of the workers.
    """
    workers = config.fewest_workers
    while workers <= max(config.fewest_workers, MOST_WORKERS):
        worker_overrides = [f"workers={workers}", f"tasks_per_step={-(-config.tasks_per_step // workers) * workers}"]
        for checkpointing, sharding, fewer_tasks in product(
            ((), CHECKPOINTING), [(), *shardings(config)], halves(config)
        ):
            overrides = [*worker_overrides, *sharding, *checkpointing, *fewer_tasks]
            candidate = with_overrides(config, overrides)
            if candidate and plan_memory(shape, candidate, target_tokens).fits(gpu_bytes):
                return [override for override in overrides if differs(config, override)]
        workers *= 2
    return None


def halves(config: Config) -> list[tuple[str, ...]]:
    """Return ways to adapt fewer tasks side by side, as overrides: none, half of the tasks, and so on down to one."""
    counts = [config.tasks_together >> times for times in range(1, config.tasks_together.bit_length())]
    return [(), *((f"tasks_at_once={tasks}",) for tasks in counts)]


def differs(config: Config, override: str) -> bool:
    """Return whether an override's value differs from the config's."""
    key, _, text = override.partition("=")
    return str(reduce(getattr, key.split("."), config)).lower() != text


# The report


def build_report(shape: Shape, config: Config, target_tokens: int, gpu_bytes: int | None) -> dict[str, Any]:
    """Return all that is printed, in bytes, tokens and counts."""
    plan = plan_memory(shape, config, target_tokens)
    without_checkpointing, with_checkpointing = (
        sum(part.device_bytes for part in activation_parts(shape, config, target_tokens, checkpointing))
        for checkpointing in (False, True)
    )
    support, query = episode_rows(config)
    is_too_large = gpu_bytes is not None and not plan.fits(gpu_bytes)
    return {
        "model": {**asdict(shape), "adapted": len(shape.adapted), "adapter": shape.adapter(config.lora.rank)},
        "parts": [asdict(part) for part in plan.parts],
        **_sizes(plan, gpu_bytes),
        "passing_bytes": {
            "without_checkpointing": without_checkpointing,
            "with_checkpointing": with_checkpointing,
        },
        "gpu_bytes": gpu_bytes,
        "smallest_change": smallest_change(shape, config, target_tokens, gpu_bytes or 0) if is_too_large else None,
        "shardings": [
            {
                "overrides": list(overrides),
                "is_config": not any(differs(config, override) for override in overrides),
                **_sizes(sharding, gpu_bytes),
            }
            for overrides, sharding in alternatives(shape, config, target_tokens)
        ],
        "batch": {
            "support_rows": support,
            "query_rows": query,
            "tasks_at_once": config.tasks_together,
            "largest_pass": asdict(largest_pass(config, target_tokens)),
        },
        "traffic": [
            asdict(transfer) | {"bytes_by_each": round(transfer.by_each(config.fewest_workers))}
            for transfer in traffic(shape, config, config.fewest_workers)
        ],
        "episodes_per_step": config.tasks_per_step,
        "tokens_per_step": tokens_per_step(config),
    }


def _sizes(plan: MemoryPlan, gpu_bytes: int | None) -> dict[str, Any]:
    fits = plan.fits(gpu_bytes) if gpu_bytes else None
    return {"device_bytes": plan.device_bytes, "host_bytes": plan.host_bytes, "fits": fits}


def print_report(report: dict[str, Any], config: Config, out: Console) -> None:
    """Print a report for people."""
    model, batch = report["model"], report["batch"]
    learned, unit = (model["adapter"], "an adapter") if config.mode == "adapters" else (model["trained"], "trained")
    out.print(f"{config.model.name}: {model['parameters']:,} parameters, {learned:,} {unit}", highlight=False)
    out.print(_parts_table(report, config))
    largest = batch["largest_pass"]
    tokens, episodes = report["tokens_per_step"], report["episodes_per_step"]
    lines = [
        f"an outer step: {episodes} episodes, {tokens:,} tokens forward and backward",
        f"a pass: {batch['tasks_at_once']} task(s), {largest['rows']:,} rows of {largest['row_tokens']} tokens",
        f"the worst case: every task has {config.data.ways} classes, every row data.max_tokens; data is not read",
        _checkpointing_note(report["passing_bytes"], config),
    ]
    sent = [f"{part['name']} {size(part['bytes_by_each'])}" for part in report["traffic"] if part["bytes_by_each"]]
    if sent:
        lines.append(f"a worker sends in an outer step: {', '.join(sent)}")
    if not model["is_measured"]:
        lines.append("activations are an estimate: the formula is for Llama's layers, and this model has others")
    out.print("\n".join(lines), highlight=False)
    out.print(_shardings_table(report))
    out.print(_verdict(report), highlight=False, soft_wrap=True)


def _parts_table(report: dict[str, Any], config: Config) -> Table:
    title = f"one of {config.fewest_workers} worker(s), at its peak"
    table = empty_table(("part", "GPU", "CPU", ""), left=["part", ""], padding=(0, 0, 0, 1), title=title)
    scale = max(1, *(part["device_bytes"] + part["host_bytes"] for part in report["parts"]))
    for part in report["parts"]:
        device, host = part["device_bytes"], part["host_bytes"]
        name = f"{part['name']} ({ALLOWANCE:.0%})" if part["name"] == "allowance" else part["name"]
        bar = "█" * round(BAR_CELLS * device / scale) + "░" * round(BAR_CELLS * host / scale)
        table.add_row(name, size(device), size(host), bar)
    table.add_section()
    table.add_row("all", size(report["device_bytes"]), size(report["host_bytes"]), style="bold")
    return table


def _shardings_table(report: dict[str, Any]) -> Table:
    heads = "", "GPU", "CPU", "fits"
    table = empty_table(heads, left=[""], padding=(0, 0, 0, 1), title="what fits, per worker")
    for row in report["shardings"]:
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        style = "bold" if row["is_config"] else None
        table.add_row(" ".join(row["overrides"]), size(row["device_bytes"]), size(row["host_bytes"]), fits, style=style)
    return table


def _checkpointing_note(passing_bytes: dict[str, int], config: Config) -> str:
    """Return what activation checkpointing changes, in activations and logits together."""
    with_checkpointing, without = (
        size(passing_bytes["with_checkpointing"]),
        size(passing_bytes["without_checkpointing"]),
    )
    if config.model.activation_checkpointing:
        return f"without activation checkpointing: {without} instead of {with_checkpointing}"
    return f"with activation checkpointing: {with_checkpointing} instead of {without}"


def _verdict(report: dict[str, Any]) -> str:
    if report["fits"] is None:
        return "no GPU here to compare with: give its memory as --gpu-gib"
    comparison = f"{size(report['device_bytes'])} of {size(report['gpu_bytes'])}"
    if report["fits"]:
        return f"fits: {comparison}"
    change = report["smallest_change"]
    advice = f"this would fit: {' '.join(change)}" if change else "no sharding or number of workers would fit"
    return f"does not fit: {comparison}; {advice}"


def size(count_bytes: int) -> str:
    """Return bytes in MiB or GiB; `-` for none."""
    if not count_bytes:
        return "-"
    if count_bytes < GIB:
        return f"{count_bytes / 1024**2:,.1f} MiB"
    return f"{count_bytes / GIB:,.1f} GiB"
