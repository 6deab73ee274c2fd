"""Everything of Ray that we use although it is private.

pyproject.toml bounds Ray to tested versions; `tests/test_internals.py` shows what a newer one breaks.
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
from rayml.runs.files import AnyPath, write_atomically

# This is imported in the controller's process, too: every import here makes every run start later.
log = logging.getLogger(__name__)
DIED = WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
"""The errors of a worker that died, or does not answer."""
SNAPSHOT = "checkpoint_manager_snapshot.json"


def trial_settings(results: Any) -> list[dict[str, Any]]:
    """Return the settings of a sweep's trials, in order. The public results lack them for trials without a report."""
    return [trial.config for trial in results._experiment_analysis.trials]


def forget_lost_checkpoints(checkpoints: AnyPath) -> None:
    """Remove Ray Train's list of checkpoints if one in it is gone, because it would then refuse to go on."""
    snapshot = checkpoints / SNAPSHOT
    if not snapshot.exists():
        return
    try:
        names = [result["checkpoint_dir_name"] for result in json.loads(snapshot.read_text())["checkpoint_results"]]
        is_valid = all((checkpoints / name).is_dir() for name in names)
    except (ValueError, KeyError):  # torn: Ray does not write it atomically
        is_valid = False
    if not is_valid:
        snapshot.unlink()


@contextlib.contextmanager
def listen_on_localhost() -> Iterator[None]:
    """Let a Ray that starts inside the block listen on 127.0.0.1 only, as it does by default on macOS and Windows.

    All its processes take that for the address of this machine.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def without_idle_actors(trainer: Any, ray_is_ours: bool) -> Any:
    """Keep a trainer from starting processes that this run does not need: each costs seconds of a core.

    Workers stream their own data. And nothing has to be cleaned up after a run whose Ray ends with it.
    """
    idle = (DatasetsCallback, PlacementGroupCleanerCallback) if ray_is_ours else DatasetsCallback
    create_callbacks = trainer._create_default_callbacks

    def create_needed() -> list[Any]:
        return [callback for callback in create_callbacks() if not isinstance(callback, idle)]

    trainer._create_default_callbacks = create_needed
    return trainer


# Callbacks that run in Ray Train's controller


class ReportController(ControllerCallback):
    """Sends the heartbeats' actor the controller's handle: only killing it ends a run that finds no room."""

    def __init__(self, heartbeats: Any):
        self.heartbeats = heartbeats

    def after_controller_start(self, train_run_context) -> None:
        self.heartbeats.set_controller.remote(ray.cloudpickle.dumps(ray.get_runtime_context().current_actor))


class ReportWorkersGone(WorkerGroupCallback):
    """Tells the heartbeats' actor that there are no workers: they are lost, preempted, or their number changes."""

    def __init__(self, heartbeats: Any):
        self.heartbeats = heartbeats

    def before_worker_group_shutdown(self, worker_group) -> None:
        self.heartbeats.end.remote()


class WriteLatest(ray.train.UserCallback):
    """Writes the name of the newest checkpoint to the file `latest`."""

    def __init__(self, latest: AnyPath):
        self.latest = latest

    def after_report(self, run_context, metrics, checkpoint) -> None:
        if checkpoint is not None:
            folder, name = checkpoint.path.split("/")[-2:]
            try:
                write_atomically(self.latest, f"{folder}/{name}\n")
            except StorageError as error:  # if raised, it would end the run
                log.warning("%s; the next checkpoint's name is written again", error)
