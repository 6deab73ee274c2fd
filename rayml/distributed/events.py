"""What Ray Train's controller tells of a run."""

import logging
from typing import Any

import ray.train

from rayml.errors import StorageError
from rayml.runs.files import Place, write_whole

# It runs in the controller's process: what is imported here costs each run's start.
log = logging.getLogger(__name__)


class RunEvents(ray.train.UserCallback):
    """Which checkpoint is the newest, to the file `latest`; and that workers are lost, to the roll."""

    def __init__(self, latest: Place, roll: Any):
        self.latest, self.roll = latest, roll

    def after_exception(self, run_context, worker_exceptions) -> None:
        self.roll.end.remote()

    def after_report(self, run_context, metrics, checkpoint) -> None:
        if checkpoint is not None:
            folder, name = checkpoint.path.split("/")[-2:]
            try:
                write_whole(self.latest, f"{folder}/{name}\n")
            except StorageError as error:  # raised here, it would end the run
                log.warning("%s; the next checkpoint's name is written again", error)
