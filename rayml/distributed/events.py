"""What Ray Train's controller tells of a run."""

from typing import Any

import ray.train

from rayml.runs.files import Place, write_whole

# It runs in the controller's process: what is imported here costs each run's start.


class RunEvents(ray.train.UserCallback):
    """Which checkpoint is the newest, to the file `latest`; and that workers are lost, to the roll."""

    def __init__(self, latest: Place, roll: Any):
        self.latest, self.roll = latest, roll

    def after_exception(self, run_context, worker_exceptions) -> None:
        self.roll.end.remote()

    def after_report(self, run_context, metrics, checkpoint) -> None:
        if checkpoint is not None:
            folder, name = checkpoint.path.split("/")[-2:]
            write_whole(self.latest, f"{folder}/{name}\n")
