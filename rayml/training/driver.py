"""The driver: check everything, start Ray, train on N workers, show progress."""

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from rayml.config import Config
from rayml.errors import TrainingError
from rayml.interrupt import with_message
from rayml.lm.abilities import checked_model
from rayml.lm.encode import Encoder
from rayml.model import load
from rayml.progress import warn
from rayml.ray_start import check_resources, own_ray, processors
from rayml.runs.checkpoint import newest_checkpoint, step_of
from rayml.runs.files import AnyPath, parse_path, remove
from rayml.runs.folder import RunFolder
from rayml.runs.remote import Remote
from rayml.starts import start_named
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.splits import Splits
from rayml.training.continual import FORGETTING, changed_display_keys, old_run, report_forgetting, with_replay
from rayml.training.heartbeat import Heartbeats
from rayml.training.progress import Progress
from rayml.training.ray_internals import (
    DIED,
    ReportController,
    ReportWorkersGone,
    WriteLatest,
    forget_lost_checkpoints,
    without_idle_actors,
)
from rayml.training.stragglers import START_SECONDS, Watch, end_run
from rayml.training.stream import Job
from rayml.training.trackers import check_trackers
from rayml.training.worker import train_worker

SECONDS_TO_STOP = 5.0
"""How long an interrupted run may take to reach its next checkpoint."""


def train(config: Config, resume: bool = False, at_once: int = 1) -> RunFolder:
    """Meta-train as the config says; return the run folder.

    Args:
        at_once: number of runs like this one that share the machine or the cluster.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: training stopped; the message says why.
    """
    config = with_absolute_paths(config)
    splits, replayed = prepare_splits(config.data), frozenset[str]()
    old = old_run(config)
    if old:
        splits, replayed = with_replay(splits, old, config.data)
        changed_keys = ", ".join(changed_display_keys(old.config.data, config.data))
        if changed_keys and replayed:
            warn(f"{changed_keys}: not as in {old.run.path}; its tasks are replayed as this config shows them")
    model, encoder = checked_model(config, [task for part in splits for task in part])
    run = RunFolder(config.run.dir)
    check_trackers(config.run.trackers, run)
    if not os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        check_resources(config, cpus=processors(), cpus_each=1, gpus=torch.cuda.device_count())
    with run.held():
        run.begin(config, splits, resume)
        if config.validation.patience and not splits.val:
            warn("validation.patience: there is no task for meta-val, so it never stops; raise data.splits.val")
        must_train = not run.is_over(config)
        if must_train:
            remove(run.model)
            with own_ray(config) as ray_is_ours:
                fit(config, run, splits, model, encoder, at_once, replayed, ray_is_ours)
        # An earlier command may have been cut off between training and what follows it.
        if config.mode == "full" and not run.model.exists():
            load(run).save(run.model)
        if old and not old.run.start and (must_train or not (run.path / FORGETTING).exists()):
            report_forgetting(run, old, splits, Console(stderr=True, markup=False))
    return run


def with_absolute_paths(config: Config) -> Config:
    """Return the config with absolute paths: workers run in other directories."""

    def absolute(path: str) -> str:
        if path.startswith("hf:") and os.path.isdir(path[3:].partition(":")[0]):
            return "hf:" + os.path.abspath(path[3:])
        return path if path.startswith("hf:") or "://" in path else os.path.abspath(path)

    data = config.data.model_copy(update={"path": tuple(map(absolute, config.data.path))})
    name = os.path.abspath(config.model.name) if os.path.isdir(config.model.name) else config.model.name
    model = config.model.model_copy(update={"name": name})
    paths = {"dir": str(parse_path(config.run.dir))}
    if config.run.continues:
        paths["continues"] = start_named(config.run.continues) or str(parse_path(config.run.continues))
    run = config.run.model_copy(update=paths)
    return config.model_copy(update={"data": data, "model": model, "run": run})


def scaling(config: Config, at_once: int) -> ray.train.ScalingConfig:
    """Return each worker's resources: a GPU, or an equal share of the CPUs, which also sets its number of threads."""
    fewest, most = config.fewest_workers, config.most_workers
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = config.device == "cuda" or (config.device == "auto" and gpus >= fewest * at_once)
    node_cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cpus = 1 if use_gpu else cpus_each(node_cpus, most * at_once)
    return ray.train.ScalingConfig(
        num_workers=most if fewest == most else (fewest, most),  # type: ignore[arg-type]
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cpus, "GPU": int(use_gpu)},
    )


def cpus_each(nodes: Sequence[int], workers: int) -> int:
    """Return the most CPUs that each worker can have on nodes of these CPUs, with one more for its stream of episodes.

    The result is at least 1: if nothing fits, workers wait for nodes, or use the CPU that was meant for episodes.
    """
    counts = [count for count in range(1, max(nodes, default=1)) if sum(n // (count + 1) for n in nodes) >= workers]
    return max(counts, default=1)


def fit(
    config: Config,
    run: RunFolder,
    splits: Splits,
    model: str,
    encoder: Encoder,
    at_once: int,
    replayed: frozenset[str],
    ray_is_ours: bool,
) -> None:
    """Run Ray Train to its end.

    Args:
        ray_is_ours: whether the Ray cluster ends with this run.

    Raises:
        TrainingError: training stopped by itself, or its workers failed more than `run.max_failures` times.
        KeyboardInterrupt: Ctrl-C ended it.
    """
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    longest_wait = config.run.longest_wait
    keep_data_actors(on_this_node, run, longest_wait)
    forget_lost_checkpoints(run.checkpoints)
    actor_class = ray.remote(num_cpus=0, max_restarts=-1)(Heartbeats)
    heartbeats: Any = actor_class.options(scheduling_strategy=on_this_node).remote()
    val = ray.put(splits.val) if splits.val and config.validation.every else None
    job = Job(config, model, ray.put(encoder), ray.put(splits.train), val, heartbeats, replayed)
    trainer = without_idle_actors(build_trainer(job, run, at_once), ray_is_ours)
    console = Console(stderr=True, markup=False)
    with Progress(run, config.outer.steps, console, heartbeats), Watch(heartbeats, longest_wait, console) as watch:
        try:
            stop_reason = run_trainer(trainer, run, heartbeats, console)
        except ray.exceptions.RayActorError as error:
            if not watch.found_no_room:
                raise
            raise no_room_error(run, longest_wait) from error
        except ray.train.TrainingFailedError as error:
            straggler = f"; {watch.named}" if watch.named else ""
            raise TrainingError(f"{run.path}: {root_cause(error)}{straggler}") from error
    if stop_reason:
        raise TrainingError(f"{run.path}: {stop_reason}")


def keep_data_actors(on_this_node: NodeAffinitySchedulingStrategy, run: RunFolder, longest_wait: float) -> None:
    """Have Ray Data start its cluster-wide actors on this node, by running it here first.

    They stay on the node that first uses Ray Data. If that was a worker's node, they would be lost with it.
    """

    def use_ray_data() -> None:
        import ray.data

        ray.data.range(1).materialize()

    if sum(node["Alive"] for node in ray.nodes()) > 1:
        task = ray.remote(num_cpus=0)(use_ray_data).options(scheduling_strategy=on_this_node).remote()
        try:
            ray.get(task, timeout=START_SECONDS + longest_wait)
        except ray.exceptions.GetTimeoutError as error:
            raise no_room_error(run, longest_wait) from error


def build_trainer(job: Job, run: RunFolder, at_once: int) -> TorchTrainer:
    """Return the Ray Train trainer of a job; its checkpoints go to the run's folder."""
    config, heartbeats = job.config, job.heartbeats
    longest_wait = config.run.longest_wait
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(longest_wait)  # for a process that does not answer
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(longest_wait)  # for Ray Train's own barriers
    return TorchTrainer(  # mypy sees the signatures of Train v1, which v2 replaces at run time
        train_worker,  # type: ignore[arg-type]
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=math.ceil(longest_wait)),
        scaling_config=scaling(config, at_once),
        run_config=ray.train.RunConfig(
            **storage(run.path),
            name=run.checkpoints.name,
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.run.keep_checkpoints),
            callbacks=[WriteLatest(run.latest), ReportController(heartbeats), ReportWorkersGone(heartbeats)],  # type: ignore[list-item]
        ),
    )


def run_trainer(trainer: TorchTrainer, run: RunFolder, heartbeats: Any, console: Console) -> str | None:
    """Train, and return what the workers return. After Ctrl-C there is a checkpoint first, if the step ends soon.

    Training runs in a thread of its own. In the main thread, Ray Train would install its own handler of Ctrl-C, and
    leave it there.
    """
    training: Future[Any] = Future()

    def fit_trainer() -> None:
        try:
            training.set_result(trainer.fit())
        except BaseException as error:
            training.set_exception(error)

    threading.Thread(target=fit_trainer, daemon=True).start()
    try:
        return training.result().return_value
    except KeyboardInterrupt as error:
        interrupt = error
    console.print("stopping after this outer step, with a checkpoint, or in a few seconds without")
    run.request_stop()
    with suppress(KeyboardInterrupt, Exception):  # the checkpoints show how it ended
        training.result(timeout=SECONDS_TO_STOP)
    folder = newest_checkpoint(run.checkpoints)
    progress = f"{step_of(folder)} outer steps are kept in {run.path}" if folder else "no outer step is kept"
    interrupt = with_message(interrupt, f"{progress}; the same command with --resume goes on")
    if not training.done():
        with suppress(ray.exceptions.RayError):
            end_run(heartbeats)
    raise interrupt from None


def no_room_error(run: RunFolder, longest_wait: float) -> TrainingError:
    return TrainingError(
        f"{run.path}: no room for the workers within run.longest_wait={longest_wait:g} seconds; what was learned is "
        "kept: --resume when there is room"
    )


def storage(folder: AnyPath) -> dict[str, Any]:
    """Return the settings of Ray Train that say where checkpoints are kept."""
    if isinstance(folder, Remote):
        return {"storage_path": folder.path, "storage_filesystem": folder.fs}
    return {"storage_path": str(folder)}


def root_cause(error: ray.train.TrainingFailedError) -> str:
    """Return the first worker's own error, preferably of one that died: the others then failed waiting for it.

    The rest of Ray's message is its own stack of wrappers.
    """
    failures = list(getattr(error, "worker_failures", {}).values())
    cause = next((failure for failure in failures if isinstance(failure, DIED)), None) or next(iter(failures), error)
    cause = getattr(cause, "cause", None) or cause
    return f"workers failed: {type(cause).__name__}: {cause}"
