"""What Ray Train's controller tells of a run."""

import logging
from typing import Any

import ray
import ray.train

from rayml.distributed.ray_internals import ControllerCallback, WorkerGroupCallback
from rayml.errors import StorageError
from rayml.runs.files import Place, write_whole

# It runs in the controller's process: what is imported here costs each run's start.
log = logging.getLogger(__name__)


class Controlled(ControllerCallback):
    """Tells the roll who the controller is: to end it is the only way to end a run that finds no room."""

    def __init__(self, roll: Any):
        self.roll = roll

    def after_controller_start(self, train_run_context) -> None:
        self.roll.controlled_by.remote(ray.get_runtime_context().current_actor)


class WorkersGone(WorkerGroupCallback):
    """Tells the roll that there are no workers: they are lost, preempted, or to be of another number."""

    def __init__(self, roll: Any):
        self.roll = roll

    def before_worker_group_shutdown(self, worker_group) -> None:
        self.roll.end.remote()


class NewestCheckpoint(ray.train.UserCallback):
    """Writes which checkpoint is the newest to the file `latest`."""

    def __init__(self, latest: Place):
        self.latest = latest

    def after_report(self, run_context, metrics, checkpoint) -> None:
        if checkpoint is not None:
            folder, name = checkpoint.path.split("/")[-2:]
            try:
                write_whole(self.latest, f"{folder}/{name}\n")
            except StorageError as error:  # raised here, it would end the run
                log.warning("%s; the next checkpoint's name is written again", error)
