"""Trackers that show a run's numbers while it trains: Prometheus, TensorBoard, Weights & Biases, MLflow.

Rank 0 writes the records of `metrics.jsonl` to all of them, too. A resumed run goes on in the same place.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from ray.util.metrics import Gauge
from tensorboardX import SummaryWriter

from rayml.config import Config, flatten
from rayml.errors import ConfigError, TrainingError
from rayml.runs.files import write_atomically
from rayml.runs.folder import RunFolder

Record = dict[str, Any]
logger = logging.getLogger(__name__)
FLUSH_SECONDS = 2
"""Between two writes to TensorBoard's file."""
MLFLOW_SERVER = "MLFLOW_TRACKING_URI"
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}


class Tracker(Protocol):
    def write(self, record: Record) -> None:
        """Show the record of one outer step."""

    def close(self, failed: bool) -> None:
        """Send what has not been sent yet, and whether training failed."""


def check_trackers(names: Sequence[str], run: RunFolder) -> None:
    """Raise ConfigError if a tracker's package is missing, or the run folder cannot hold its file."""
    missing = [PACKAGES[name] for name in names if name in PACKAGES and not find_spec(name)]
    if missing:
        raise ConfigError(f"run.trackers: not installed here; pip install {' '.join(missing)}")
    if "mlflow" in names and not run.is_local and not os.environ.get(MLFLOW_SERVER):
        raise ConfigError(f"run.trackers: MLflow keeps no file on object storage; set {MLFLOW_SERVER} to a server's")


def open_trackers(config: Config, run: RunFolder, folder: Path, step: int) -> list[Tracker]:
    """Return the config's trackers, ready for the records after `step`. Prometheus is always among them.

    If one cannot be opened, a new run stops, since somebody is there to correct it. A resumed run goes on without it.

    Args:
        folder: a local folder for their files.

    Raises:
        TrainingError: a tracker of a new run cannot be opened.
    """
    classes: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
    trackers: list[Tracker] = [Prometheus(run)]
    for name in config.run.trackers:
        try:
            trackers.append(classes[name](config, run, folder, step))
        except Exception as error:
            if step == 0:
                raise TrainingError(f"run.trackers: {name} cannot be opened: {error}") from error
            logger.warning("%s cannot be opened; training goes on without it", name, exc_info=True)
    return trackers


def numbers(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step"}


class Prometheus:
    """Ray's own metrics, which every node exports: `ray_rayml_query_loss{run="..."}` and the like."""

    def __init__(self, run: RunFolder):
        self.tags = {"run": run.path.name}
        self.gauges: dict[str, Gauge] = {}

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name not in self.gauges:
                description = f"{name.replace('_', ' ')} of the newest outer step"
                self.gauges[name] = Gauge(f"rayml_{name}", description=description, tag_keys=("run",))
            self.gauges[name].set(value, tags=self.tags)

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    def __init__(self, config: Config, run: RunFolder, folder: Path, step: int):
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=FLUSH_SECONDS)

    def write(self, record: Record) -> None:
        for name, value in numbers(record).items():
            self.board.add_scalar(name, value, record["step"])

    def close(self, failed: bool) -> None:
        self.board.close()


class WeightsAndBiases:
    """A W&B run, in the project WANDB_PROJECT or `rayml`. WANDB_MODE=offline keeps it in the run folder."""

    def __init__(self, config: Config, run: RunFolder, folder: Path, step: int):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rayml"),
            id=saved_id(run, "wandb", lambda: token_hex(4)),
            resume="allow",
            name=run.path.name,
            dir=folder,
            config=config.model_dump(mode="json"),
        )

    def write(self, record: Record) -> None:
        self.run.log(numbers(record), step=record["step"])

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run at MLFLOW_TRACKING_URI, or in the run folder; its experiment is MLFLOW_EXPERIMENT_NAME, or `rayml`."""

    def __init__(self, config: Config, run: RunFolder, folder: Path, step: int):
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        # By default it would try for twenty minutes, longer than the other workers wait for this one.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        self.client = MlflowClient(os.environ.get(MLFLOW_SERVER, f"sqlite:///{folder / 'mlflow.db'}"))
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rayml")
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)

        def create_run() -> str:
            run_id = self.client.create_run(experiment_id, run_name=run.path.name).info.run_id
            settings = flatten(config.model_dump(mode="json"))
            self.client.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in settings.items()])
            return run_id

        self.id = saved_id(run, "mlflow", create_run)
        history = self.client.get_metric_history(self.id, "query_loss")
        self.last_step = max((metric.step for metric in history), default=0)

    def write(self, record: Record) -> None:
        if record["step"] <= self.last_step:  # taken again after a crash, with the same result
            return
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, record["step"]) for name, value in numbers(record).items()]
        self.client.log_batch(self.id, metrics)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def saved_id(run: RunFolder, tracker: str, create: Callable[[], str]) -> str:
    """Return the tracker's own id for this run, which is created once and saved in the run folder."""
    ids = json.loads(run.trackers.read_text()) if run.trackers.exists() else {}
    if tracker not in ids:
        ids[tracker] = create()
        write_atomically(run.trackers, json.dumps(ids))
    return ids[tracker]
