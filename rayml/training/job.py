"""What the driver and its workers agree on."""

from dataclasses import dataclass
from typing import Any

import ray

from rayml.config import Config


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker. Tasks and tokenizer stay in Ray's object store."""

    config: Config
    model: str
    """Resolved by the driver."""
    encoder: ray.ObjectRef
    train: ray.ObjectRef
    val: ray.ObjectRef | None
    heartbeats: Any
    """The actor that knows how far every worker is."""
    replayed: frozenset[str] = frozenset()
    """Names of the old run's tasks, where this one continues another."""


class DivergedError(Exception):
    """A loss or gradient is not finite: raised on all workers together, with this one's tasks of such a loss."""

    def __init__(self, tasks: list[str]):
        super().__init__(tasks)
        self.tasks = tasks
