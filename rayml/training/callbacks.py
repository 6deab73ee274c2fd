"""What Ray Train's controller tells of a run."""

import logging
from typing import Any

import ray
import ray.train

from rayml.errors import StorageError
from rayml.runs.files import AnyPath, write_whole
from rayml.training.ray_internals import ControllerCallback, WorkerGroupCallback

# It runs in the controller's process: what is imported here costs each run's start.
log = logging.getLogger(__name__)


class Controlled(ControllerCallback):
    """Tells the heartbeats' actor who the controller is: to end it is the only way to end a run that finds no room."""

    def __init__(self, heartbeats: Any):
        self.heartbeats = heartbeats

    def after_controller_start(self, train_run_context) -> None:
        self.heartbeats.controlled_by.remote(ray.get_runtime_context().current_actor)


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
