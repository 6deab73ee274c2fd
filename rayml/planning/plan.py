"""`rayml plan`: what a worker's memory goes to, which ways to shard fit a GPU, and the smallest change that would."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from rayml.config import Config, parse_config
from rayml.errors import ConfigError
from rayml.planning.memory import ALLOWANCE, Plan, memory, passing
from rayml.planning.shape import Shape, read_shape
from rayml.planning.step import episode_rows, largest_pass, tokens_per_step, traffic
from rayml.runs.reports import table as empty_table

GIB = 1024**3
BAR_CELLS = 28
CHECKPOINTING = ("model.activation_checkpointing=true",)
MOST_WORKERS = 1024
ENGINES: list[tuple[str, ...]] = [("engine=local",), ("engine=zero", "zero.stage=3")]
# From fast to slow: what is offloaded has to come back in every step.
ZERO = [
    ("engine=zero", f"zero.stage={stage}", f"zero.offload={offload}")
    for offload, stages in (("none", (1, 2, 3)), ("optimizer", (1, 2, 3)), ("all", (3,)))
    for stage in stages
]


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
    found = report(read_shape(config), config, target_tokens, gpu_bytes)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found, config, out)
    return found["fits"] is not False


def settled_for_plan(config: Config, on_gpu: bool) -> Config:
    """Return the config with the dtype and attention that it would have here, or on a GPU that may be elsewhere."""
    import torch

    from rayml.lm.catalog import resolve_model
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


# What would fit


def changed(config: Config, overrides: Sequence[str]) -> Config | None:
    """Return the config with more overrides, or None where together they are no config that could be run."""
    try:
        return parse_config(config.model_dump(mode="json"), "plan", overrides)
    except ConfigError:
        return None


def shardings(config: Config) -> list[tuple[str, ...]]:
    """Return the ways that the config's mode can be held, as overrides."""
    return ENGINES if config.mode == "adapters" else [("engine=local", "zero.offload=none"), *ZERO]


def alternatives(shape: Shape, config: Config, target_tokens: int) -> Iterator[tuple[tuple[str, ...], Plan]]:
    """Yield each way to shard, as overrides, with its plan."""
    for overrides in shardings(config):
        candidate = changed(config, overrides)
        if candidate:
            yield overrides, memory(shape, candidate, target_tokens)


def smallest_change(shape: Shape, config: Config, target_tokens: int, gpu_bytes: int) -> list[str] | None:
    """Return the overrides of the first change that fits, or None.

    Tried in this order: on the same workers fewer tasks side by side, then another sharding, checkpointing, or both,
    with as many or fewer; then the same on twice as many, and so on. With more workers than tasks, there are as many
    tasks as workers.
    """
    workers = config.fewest_workers
    while workers <= max(config.fewest_workers, MOST_WORKERS):
        on_these = [f"workers={workers}", f"tasks_per_step={-(-config.tasks_per_step // workers) * workers}"]
        for checkpointing, sharding, fewer in product(((), CHECKPOINTING), [(), *shardings(config)], halves(config)):
            overrides = [*on_these, *sharding, *checkpointing, *fewer]
            candidate = changed(config, overrides)
            if candidate and memory(shape, candidate, target_tokens).fits(gpu_bytes):
                return [override for override in overrides if changes(config, override)]
        workers *= 2
    return None


def halves(config: Config) -> list[tuple[str, ...]]:
    """Return ways to adapt fewer tasks side by side, as overrides: as it is, half of them, and so on to one."""
    some = [config.tasks_together >> times for times in range(1, config.tasks_together.bit_length())]
    return [(), *((f"tasks_at_once={tasks}",) for tasks in some)]


def changes(config: Config, override: str) -> bool:
    """Say whether an override's value differs from the config's."""
    key, _, text = override.partition("=")
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return str(value).lower() != text


# The report


def report(shape: Shape, config: Config, target_tokens: int, gpu_bytes: int | None) -> dict[str, Any]:
    """Return everything that is printed, in bytes, tokens and counts."""
    found = memory(shape, config, target_tokens)
    whole, checkpointed = (
        sum(part.device_bytes for part in passing(shape, config, target_tokens, checkpointing))
        for checkpointing in (False, True)
    )
    support, query = episode_rows(config)
    is_beyond = gpu_bytes is not None and not found.fits(gpu_bytes)
    return {
        "model": {**asdict(shape), "adapted": len(shape.adapted), "adapter": shape.adapter(config.lora.rank)},
        "parts": [asdict(part) for part in found.parts],
        **_sizes(found, gpu_bytes),
        "passing_bytes": {"without_checkpointing": whole, "with_checkpointing": checkpointed},
        "gpu_bytes": gpu_bytes,
        "smallest_change": smallest_change(shape, config, target_tokens, gpu_bytes or 0) if is_beyond else None,
        "shardings": [
            {
                "overrides": list(overrides),
                "is_config": not any(changes(config, override) for override in overrides),
                **_sizes(way, gpu_bytes),
            }
            for overrides, way in alternatives(shape, config, target_tokens)
        ],
        "batch": {
            "support_rows": support,
            "query_rows": query,
            "tasks_at_once": config.tasks_together,
            "largest_pass": asdict(largest_pass(config, target_tokens)),
        },
        "traffic": [
            asdict(sent) | {"bytes_by_each": round(sent.by_each(config.fewest_workers))}
            for sent in traffic(shape, config, config.fewest_workers)
        ],
        "episodes_per_step": config.tasks_per_step,
        "tokens_per_step": tokens_per_step(config),
    }


def _sizes(found: Plan, gpu_bytes: int | None) -> dict[str, Any]:
    fits = found.fits(gpu_bytes) if gpu_bytes else None
    return {"device_bytes": found.device_bytes, "host_bytes": found.host_bytes, "fits": fits}


def show(found: dict[str, Any], config: Config, out: Console) -> None:
    """Print a report for people."""
    model, batch = found["model"], found["batch"]
    learned, what = (model["adapter"], "an adapter") if config.mode == "adapters" else (model["trained"], "trained")
    out.print(f"{config.model.name}: {model['parameters']:,} parameters, {learned:,} {what}", highlight=False)
    out.print(_parts(found, config))
    largest = batch["largest_pass"]
    tokens, episodes = found["tokens_per_step"], found["episodes_per_step"]
    lines = [
        f"an outer step: {episodes} episodes, {tokens:,} tokens forward and backward",
        f"a pass: {batch['tasks_at_once']} task(s), {largest['rows']:,} rows of {largest['row_tokens']} tokens",
        f"the worst case: every task has {config.data.ways} classes, every row data.max_tokens; data is not read",
        _checkpointing(found["passing_bytes"], config),
    ]
    parts = [f"{one['name']} {size(one['bytes_by_each'])}" for one in found["traffic"] if one["bytes_by_each"]]
    if parts:
        lines.append(f"a worker sends in an outer step: {', '.join(parts)}")
    if not model["is_measured"]:
        lines.append("activations are an estimate: the formula is for Llama's layers, and this model has others")
    out.print("\n".join(lines), highlight=False)
    out.print(_shardings(found))
    out.print(_verdict(found), highlight=False, soft_wrap=True)


def _parts(found: dict[str, Any], config: Config) -> Table:
    title = f"one of {config.fewest_workers} worker(s), at its peak"
    table = empty_table(("part", "GPU", "CPU", ""), left=["part", ""], padding=(0, 0, 0, 1), title=title)
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
    heads = "", "GPU", "CPU", "fits"
    table = empty_table(heads, left=[""], padding=(0, 0, 0, 1), title="what fits, per worker")
    for row in found["shardings"]:
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        style = "bold" if row["is_config"] else None
        table.add_row(" ".join(row["overrides"]), size(row["device_bytes"]), size(row["host_bytes"]), fits, style=style)
    return table


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
