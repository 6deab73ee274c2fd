"""What we take from Ray without its promise to keep it: all of it, here alone.

pyproject.toml bounds Ray to what this was tested with; `tests/test_internals.py` says what a newer one broke.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import ray
import ray.train
from ray._private import ray_constants
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from rayml.errors import StorageError
from rayml.runs.files import AnyPath, write_whole

# It runs in the controller's process: what is imported here costs each run's start.
log = logging.getLogger(__name__)
DIED = WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
"""What a worker that died, or does not answer, fails with."""
SNAPSHOT = "checkpoint_manager_snapshot.json"


def trial_settings(results: Any) -> list[dict[str, Any]]:
    """Return the settings of a sweep's trials, in their order: a result of its own has none before it reported."""
    return [trial.config for trial in results._experiment_analysis.trials]


def forget_lost(checkpoints: AnyPath) -> None:
    """Let Ray Train remember no checkpoint, where one is gone that it remembers: it would not go on."""
    memory = checkpoints / SNAPSHOT
    if not memory.exists():
        return
    try:
        known = [result["checkpoint_dir_name"] for result in json.loads(memory.read_text())["checkpoint_results"]]
        forgets = not all((checkpoints / name).is_dir() for name in known)
    except (ValueError, KeyError):  # torn, as it is not written in one piece
        forgets = True
    if forgets:
        memory.unlink()


@contextlib.contextmanager
def listening_here() -> Iterator[None]:
    """Let a Ray that starts inside the block listen on 127.0.0.1, as it does by itself on other systems than Linux.

    All its processes take that for the address of this machine.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def without_idle_actors(trainer: Any, ray_is_ours: bool) -> Any:
    """Return a trainer that starts no process for what this run has no use for: each costs seconds of a core.

    Workers stream their own data. A Ray that ends with the run need not be cleared up behind it.
    """
    idle = (DatasetsCallback, PlacementGroupCleanerCallback) if ray_is_ours else DatasetsCallback
    usual = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [one for one in usual() if not isinstance(one, idle)]
    return trainer


# What Ray Train's controller tells of a run


class Controlled(ControllerCallback):
    """Tells the heartbeats' actor who the controller is: to end it is the only way to end a run that finds no room."""

    def __init__(self, heartbeats: Any):
        self.heartbeats = heartbeats

    def after_controller_start(self, train_run_context) -> None:
        self.heartbeats.controlled_by.remote(ray.cloudpickle.dumps(ray.get_runtime_context().current_actor))


class WorkersGone(WorkerGroupCallback):
    """Tells the heartbeats' actor that there are no workers: they are lost, preempted, or to be of another number."""

    def __init__(self, heartbeats: Any):
        self.heartbeats = heartbeats

    def before_worker_group_shutdown(self, worker_group) -> None:
        self.heartbeats.end.remote()


class NewestCheckpoint(ray.train.UserCallback):
    """Writes which checkpoint is the newest to the file `latest`."""

    def __init__(self, latest: AnyPath):
        self.latest = latest

    def after_report(self, run_context, metrics, checkpoint) -> None:
        if checkpoint is not None:
            folder, name = checkpoint.path.split("/")[-2:]
            try:
                write_whole(self.latest, f"{folder}/{name}\n")
            except StorageError as error:  # raised here, it would end the run
                log.warning("%s; the next checkpoint's name is written again", error)
