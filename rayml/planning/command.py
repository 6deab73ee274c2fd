"""What `rayml plan` does: the shape, the arithmetic, and a table or JSON of it."""

import json
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rayml.config import Config
from rayml.planning.batch import episode_rows, largest_pass, tasks_at_once, tokens_per_step
from rayml.planning.fit import alternatives, changed_value, smallest_change
from rayml.planning.memory import ALLOWANCE, Plan, memory, passing
from rayml.planning.read import read_shape
from rayml.planning.shape import Shape
from rayml.planning.traffic import traffic

GIB = 1024**3
BAR_CELLS = 28


def plan(config: Config, gpu_gib: float | None, target_tokens: int, as_json: bool, out: Console) -> bool:
    """Print one worker's memory; return False where it does not fit the GPU.

    Args:
        gpu_gib: the GPU's memory; None for that of the GPU in this machine, if there is one.
        target_tokens: tokens of a row's target.

    Raises:
        ConfigError: no such model, or nothing of it to adapt or train.
    """
    gpu_bytes = int(gpu_gib * GIB) if gpu_gib else own_gpu_bytes(config)
    config = settled_for_plan(config, bool(gpu_bytes))
    shape = read_shape(config)
    found = report(shape, config, target_tokens, gpu_bytes)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found, config, out)
    return found["fits"] is not False


def settled_for_plan(config: Config, on_gpu: bool) -> Config:
    """Return the config with the dtype and attention that it would have here, or on a GPU that may be elsewhere."""
    import torch

    from rayml.lm.load import resolve_model
    from rayml.lm.precision import RECENT_GPU, device_for, settled

    base = resolve_model(config.model.name)
    device = RECENT_GPU if on_gpu else device_for(config, base, torch.device("cpu"))
    return settled(config, base, [device])[0]


def own_gpu_bytes(config: Config) -> int | None:
    """Return the memory of this machine's first GPU; None without one, or for a config that trains on the CPU."""
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def report(shape: Shape, config: Config, target_tokens: int, gpu_bytes: int | None) -> dict[str, Any]:
    """Return everything that is printed, in bytes, tokens and counts."""
    found = memory(shape, config, target_tokens)
    whole, checkpointed = (
        sum(part.device_bytes for part in passing(shape, config, target_tokens, checkpointing))
        for checkpointing in (False, True)
    )
    fits = found.fits(gpu_bytes) if gpu_bytes else None
    support, query = episode_rows(config)
    return {
        "model": {**asdict(shape), "adapted": len(shape.adapted), "adapter": shape.adapter(config.lora.rank)},
        "parts": [asdict(part) for part in found.parts],
        "device_bytes": found.device_bytes,
        "host_bytes": found.host_bytes,
        "passing_bytes": {"without_checkpointing": whole, "with_checkpointing": checkpointed},
        "gpu_bytes": gpu_bytes,
        "fits": fits,
        "smallest_change": smallest_change(shape, config, target_tokens, gpu_bytes or 0) if fits is False else None,
        "shardings": [_row(config, *way, gpu_bytes) for way in alternatives(shape, config, target_tokens)],
        "batch": {
            "support_rows": support,
            "query_rows": query,
            "tasks_at_once": tasks_at_once(config),
            "largest_pass": asdict(largest_pass(config, target_tokens)),
        },
        "traffic": [
            asdict(sent) | {"bytes_by_each": round(sent.by_each(config.fewest_workers))}
            for sent in traffic(shape, config, config.fewest_workers)
        ],
        "episodes_per_step": config.tasks_per_step,
        "tokens_per_step": tokens_per_step(config),
    }


def _row(config: Config, overrides: tuple[str, ...], found: Plan, gpu_bytes: int | None) -> dict[str, Any]:
    return {
        "overrides": list(overrides),
        "is_config": not any(changed_value(config, override) for override in overrides),
        "device_bytes": found.device_bytes,
        "host_bytes": found.host_bytes,
        "fits": found.fits(gpu_bytes) if gpu_bytes else None,
    }


def show(found: dict[str, Any], config: Config, out: Console) -> None:
    """Print a report for people."""
    model, batch = found["model"], found["batch"]
    learned = model["adapter"] if config.mode == "adapters" else model["trained"]
    what = "an adapter" if config.mode == "adapters" else "trained"
    out.print(f"{config.model.name}: {model['parameters']:,} parameters, {learned:,} {what}", highlight=False)
    out.print(_parts(found, config))
    largest = batch["largest_pass"]
    tokens, episodes = found["tokens_per_step"], found["episodes_per_step"]
    lines = [
        f"an outer step: {episodes} episodes, {tokens:,} tokens forward and backward",
        f"a pass: {batch['tasks_at_once']} task(s), {largest['rows']:,} rows of {largest['row_tokens']} tokens",
        f"the worst case: every task has {config.data.ways} classes, every row data.max_tokens; data is not read",
        _checkpointing(found["passing_bytes"], config),
        *_traffic(found["traffic"]),
    ]
    if not model["is_measured"]:
        lines.append("activations are an estimate: the formula is for Llama's layers, and this model has others")
    out.print("\n".join(lines), highlight=False)
    out.print(_shardings(found))
    out.print(_verdict(found), highlight=False, soft_wrap=True)


def _parts(found: dict[str, Any], config: Config) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), title=f"one of {config.fewest_workers} worker(s), at its peak")
    table.title_justify = "left"
    table.add_column("part")
    table.add_column("GPU", justify="right")
    table.add_column("CPU", justify="right")
    table.add_column("")
    scale = max(1, *(part["device_bytes"] + part["host_bytes"] for part in found["parts"]))
    for part in found["parts"]:
        device, host = part["device_bytes"], part["host_bytes"]
        name = f"{part['name']} ({ALLOWANCE:.0%})" if part["name"] == "allowance" else part["name"]
        bar = "█" * round(BAR_CELLS * device / scale) + "░" * round(BAR_CELLS * host / scale)
        table.add_row(name, size(device), size(host), bar)
    table.add_section()
    table.add_row("all", size(found["device_bytes"]), size(found["host_bytes"]), style="bold")
    return table


def _shardings(found: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), title="what fits, per worker")
    table.title_justify = "left"
    table.add_column("")
    table.add_column("GPU", justify="right")
    table.add_column("CPU", justify="right")
    table.add_column("fits", justify="right")
    for row in found["shardings"]:
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        style = "bold" if row["is_config"] else None
        table.add_row(" ".join(row["overrides"]), size(row["device_bytes"]), size(row["host_bytes"]), fits, style=style)
    return table


def _traffic(traffic: list[dict[str, Any]]) -> list[str]:
    """Say what a worker sends to the others; nothing, if it is alone."""
    parts = [f"{one['name']} {size(one['bytes_by_each'])}" for one in traffic if one["bytes_by_each"]]
    return [f"a worker sends in an outer step: {', '.join(parts)}"] if parts else []


def _checkpointing(passing_bytes: dict[str, int], config: Config) -> str:
    """Say what activation checkpointing changes, in activations and logits together."""
    with_it, without = size(passing_bytes["with_checkpointing"]), size(passing_bytes["without_checkpointing"])
    if config.model.activation_checkpointing:
        return f"without activation checkpointing: {without} instead of {with_it}"
    return f"with activation checkpointing: {with_it} instead of {without}"


def _verdict(found: dict[str, Any]) -> str:
    if found["fits"] is None:
        return "no GPU here to compare with: give its memory as --gpu-gib"
    compared = f"{size(found['device_bytes'])} of {size(found['gpu_bytes'])}"
    if found["fits"]:
        return f"fits: {compared}"
    change = found["smallest_change"]
    advice = f"this would fit: {' '.join(change)}" if change else "no sharding or number of workers would fit"
    return f"does not fit: {compared}; {advice}"


def size(count_bytes: int) -> str:
    """Return bytes as people read them; `-` for none."""
    if not count_bytes:
        return "-"
    if count_bytes < GIB:
        return f"{count_bytes / 1024**2:,.1f} MiB"
    return f"{count_bytes / GIB:,.1f} GiB"
