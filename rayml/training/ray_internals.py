"""What we take from Ray without its promise to keep it: all of it, here alone.

pyproject.toml bounds Ray to what this was tested with; `tests/test_internals.py` says what a newer one broke.
"""

import json
from typing import Any

from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from rayml.runs.files import AnyPath

__all__ = ["DIED", "ControllerCallback", "WorkerGroupCallback", "forget_lost", "trial_settings"]

# It runs in the controller's process: what is imported here costs each run's start.
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
