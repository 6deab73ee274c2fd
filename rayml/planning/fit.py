"""Which settings fit a GPU: the ways to shard, and the smallest change to a config that makes it fit."""

from collections.abc import Iterator, Sequence
from itertools import product

from rayml.config import Config, parse_config
from rayml.errors import ConfigError
from rayml.planning.memory import Plan, memory
from rayml.planning.shape import Shape

CHECKPOINTING = ("model.activation_checkpointing=true",)
MOST_WORKERS = 1024
ENGINES: list[tuple[str, ...]] = [("engine=local",), ("engine=zero", "zero.stage=3")]
# From fast to slow: what is offloaded has to come back in every step.
ZERO = [
    ("engine=zero", f"zero.stage={stage}", f"zero.offload={offload}")
    for offload, stages in (("none", (1, 2, 3)), ("optimizer", (1, 2, 3)), ("all", (3,)))
    for stage in stages
]


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

    Tried in this order: on the same workers another sharding, checkpointing, or both; then the same on twice as many,
    and so on. With more workers than tasks, there are as many tasks as workers.
    """
    workers = config.fewest_workers
    while workers <= max(config.fewest_workers, MOST_WORKERS):
        for checkpointing, sharding in product(((), CHECKPOINTING), [(), *shardings(config)]):
            overrides = [*_on(workers, config), *sharding, *checkpointing]
            candidate = changed(config, overrides)
            if candidate and memory(shape, candidate, target_tokens).fits(gpu_bytes):
                return [override for override in overrides if changed_value(config, override)]
        workers *= 2
    return None


def _on(workers: int, config: Config) -> list[str]:
    """Return the overrides for that many workers, which must divide the tasks."""
    return [f"workers={workers}", f"tasks_per_step={-(-config.tasks_per_step // workers) * workers}"]


def changed_value(config: Config, override: str) -> bool:
    """Say whether an override's value differs from the config's."""
    key, _, text = override.partition("=")
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return str(value).lower() != text
