"""The driver: check everything, start Ray, train on N workers, show progress."""

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from rayml.config import Config
from rayml.errors import ConfigError, TrainingError
from rayml.interrupt import heed_again, kept
from rayml.lm.abilities import checked_model
from rayml.lm.encode import Encoder
from rayml.model import load
from rayml.progress import doing
from rayml.runs.checkpoint import newest_checkpoint, step_of
from rayml.runs.files import AnyPath, as_path, remove
from rayml.runs.folder import RunFolder
from rayml.runs.remote import Remote
from rayml.starts import start_named
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.splits import Splits
from rayml.training.continual import FORGETTING, old_run, report_forgetting, shown_anew, with_replay
from rayml.training.heartbeat import Heartbeats
from rayml.training.progress import Progress
from rayml.training.ray_internals import (
    DIED,
    Controlled,
    NewestCheckpoint,
    WorkersGone,
    forget_lost,
    without_idle_actors,
)
from rayml.training.stragglers import START_SECONDS, Watch, end_run
from rayml.training.stream import Job
from rayml.training.trackers import check_trackers
from rayml.training.worker import train_worker

WORKER_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # glibc gives large blocks back to the kernel at once; on a CPU a third of the time went into getting them again.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}


SECONDS_TO_STOP = 5.0
"""That an interrupted run may take to its next checkpoint."""


def train(config: Config, resume: bool = False, at_once: int = 1) -> RunFolder:
    """Meta-train as the config says; return the run folder.

    Args:
        at_once: runs like this one that share the machine, or the cluster.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: training stopped, and why.
    """
    config = with_absolute_paths(config)
    splits, replayed = prepare_splits(config.data), frozenset[str]()
    old = old_run(config)
    if old:
        splits, replayed = with_replay(splits, old, config.data.replay)
        anew = shown_anew(old.config.data, config.data)
        if anew and replayed:
            said = f"{', '.join(anew)}: not as in {old.run.path}, whose tasks are replayed as this config shows them"
            Console(stderr=True, markup=False).print(said, style="yellow", highlight=False, soft_wrap=True)
    model, encoder = checked_model(config, [task for part in splits for task in part])
    run = RunFolder(config.run.dir)
    check_trackers(config.run.trackers, run)
    if not os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        check_resources(config, cpus=processors(), cpus_each=1, gpus=torch.cuda.device_count())
    run.begin(config, splits, resume)
    if config.validation.patience and not splits.val:
        warned = "validation.patience: there is no task for meta-val, so it never stops; raise data.splits.val"
        Console(stderr=True, markup=False).print(warned, style="yellow", highlight=False, soft_wrap=True)
    trains = not run.is_over(config)
    if trains:
        with own_ray(config) as ray_is_ours:
            fit(config, run, splits, model, encoder, at_once, replayed, ray_is_ours)
        if config.mode == "full":
            remove(run.model)
            load(run).save(run.model)
    if old and not old.run.start and (trains or not (run.path / FORGETTING).exists()):  # it may have been cut off there
        report_forgetting(run, old, splits, Console(stderr=True, markup=False))
    return run


@contextmanager
def own_ray(config: Config, at_once: int = 1) -> Iterator[bool]:
    """Start Ray where none runs, for `at_once` runs beside each other, and end it; yield whether it did."""
    starts = not ray.is_initialized()
    if starts:
        with doing(Console(stderr=True, markup=False), "starting Ray"):
            start_ray(config, at_once)
    try:
        yield starts and not os.environ.get("RAY_ADDRESS")
    finally:
        if starts:
            ray.shutdown()


def with_absolute_paths(config: Config) -> Config:
    """Return the config for anywhere: workers change their directory, and so do people."""

    def absolute(path: str) -> str:
        if path.startswith("hf:") and os.path.isdir(path[3:].partition(":")[0]):
            return "hf:" + os.path.abspath(path[3:])
        return path if path.startswith("hf:") or "://" in path else os.path.abspath(path)

    data = config.data.model_copy(update={"path": tuple(map(absolute, config.data.path))})
    name = os.path.abspath(config.model.name) if os.path.isdir(config.model.name) else config.model.name
    model = config.model.model_copy(update={"name": name})
    paths = {"dir": str(as_path(config.run.dir))}
    if config.run.continues:
        paths["continues"] = start_named(config.run.continues) or str(as_path(config.run.continues))
    run = config.run.model_copy(update=paths)
    return config.model_copy(update={"data": data, "model": model, "run": run})


def processors() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def start_ray(config: Config, at_once: int = 1) -> None:
    """Start Ray here, with room for the workers of `at_once` runs; or join the cluster that RAY_ADDRESS or a job names.

    A cluster that has too little room is said so, and may grow: Ray asks its autoscaler.
    """
    own: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        # Logical CPUs: every core trains, and Ray Data's light tasks share them.
        workers = config.most_workers * at_once
        threads = max(1, processors() // workers)
        own = {"address": "local", "num_cpus": workers * (threads + 1), "include_dashboard": False}
        seldom_look_for_logs()
        # Nobody takes this machine away; and a run's end is seen at once.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
        # Ray's first processes would know nothing of the environment below, and so never get any work.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    ray.init(logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": WORKER_ENV}, **own)
    heed_again()
    if not own:
        there = ray.cluster_resources()
        try:
            check_resources(config, cpus=int(there.get("CPU", 0)), cpus_each=2, gpus=int(there.get("GPU", 0)))
        except ConfigError as error:  # it may grow
            wait = f"{config.run.longest_wait:g} s"
            Console(stderr=True, markup=False).print(
                f"{error}. Waiting up to {wait} for more nodes", style="yellow", highlight=False
            )


def seldom_look_for_logs() -> None:
    """Have a Ray that starts here look for new logs once a minute, not ten times a second: nobody is shown them."""
    os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
    os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "60")


def check_resources(config: Config, cpus: int, cpus_each: int, gpus: int) -> None:
    """Raise ConfigError if the workers do not fit. On a cluster each needs a second CPU for its stream of episodes."""
    workers = config.fewest_workers
    if config.device == "cuda" and gpus < workers:
        raise ConfigError(f"workers: {workers} need a GPU each, there are {gpus}; lower it, or device=cpu")
    if workers * cpus_each > cpus:
        raise ConfigError(
            f"workers: {workers} need {workers * cpus_each} CPUs, there are {cpus}; "
            f"use workers={max(1, cpus // cpus_each)}"
        )


def scaling(config: Config, at_once: int) -> ray.train.ScalingConfig:
    """Return the workers' resources: a GPU each, or else an equal share of the CPUs, which sets their threads, too."""
    fewest, most = config.fewest_workers, config.most_workers
    there = ray.cluster_resources()
    use_gpu = config.device == "cuda" or (config.device == "auto" and there.get("GPU", 0) >= fewest * at_once)
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cpus = 1 if use_gpu else cpus_each(nodes, most * at_once)
    return ray.train.ScalingConfig(
        num_workers=most if fewest == most else (fewest, most),  # type: ignore[arg-type]
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cpus, "GPU": int(use_gpu)},
    )


def cpus_each(nodes: Sequence[int], workers: int) -> int:
    """Return the most CPUs that so many workers can have each on nodes of these, with one more for its episodes.

    Where that is less than one, it is one: workers wait for nodes, or take what was meant for episodes.
    """
    fitting = [each for each in range(1, max(nodes, default=1)) if sum(n // (each + 1) for n in nodes) >= workers]
    return max(fitting, default=1)


def fit(
    config: Config,
    run: RunFolder,
    splits: Splits,
    model: str,
    encoder: Encoder,
    at_once: int,
    replayed: frozenset[str] = frozenset(),
    ray_is_ours: bool = False,
) -> None:
    """Run Ray Train to its end.

    Args:
        ray_is_ours: Ray ends with this run.

    Raises:
        TrainingError: training stopped by itself, or its workers failed more than `run.max_failures` times.
        KeyboardInterrupt: Ctrl-C ended it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    longest_wait = config.run.longest_wait
    keep_data_here(here, run, longest_wait)
    forget_lost(run.checkpoints)
    validates = splits.val and config.validation.every
    heartbeats: Any = ray.remote(num_cpus=0, max_restarts=-1)(Heartbeats).options(scheduling_strategy=here).remote()
    val = ray.put(splits.val) if validates else None
    job = Job(config, model, ray.put(encoder), ray.put(splits.train), val, heartbeats, replayed)
    trainer = without_idle_actors(build_trainer(job, run, at_once), ray_is_ours)
    console = Console(stderr=True, markup=False)
    with Progress(run, config.outer.steps, console, heartbeats), Watch(heartbeats, longest_wait, console) as watch:
        try:
            stopped = finished(trainer, run, heartbeats, console)
        except ray.exceptions.RayActorError as end:
            if not watch.found_no_room:
                raise
            raise no_room(run, longest_wait) from end
        except ray.train.TrainingFailedError as error:
            named = f"; {watch.named}" if watch.named else ""
            raise TrainingError(f"{run.path}: {root_cause(error)}{named}") from error
    if stopped:
        raise TrainingError(f"{run.path}: {stopped}")


def keep_data_here(here: NodeAffinitySchedulingStrategy, run: RunFolder, longest_wait: float) -> None:
    """Have Ray Data's actors for the whole cluster on this node: they stay where it runs first, and with a worker's
    node they would be lost."""
    if sum(node["Alive"] for node in ray.nodes()) > 1:
        began = ray.remote(num_cpus=0)(run_data).options(scheduling_strategy=here).remote()
        try:
            ray.get(began, timeout=START_SECONDS + longest_wait)
        except ray.exceptions.GetTimeoutError as error:
            raise no_room(run, longest_wait) from error


def build_trainer(job: Job, run: RunFolder, at_once: int) -> TorchTrainer:
    """Return Ray Train's trainer of a job, whose checkpoints lie in the run's folder."""
    config, heartbeats = job.config, job.heartbeats
    longest_wait = config.run.longest_wait
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(longest_wait)  # for a process that does not answer
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(longest_wait)  # for Ray Train's own barriers
    return TorchTrainer(  # mypy sees the signatures of Train v1, which v2 stands in for
        train_worker,  # type: ignore[arg-type]
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=math.ceil(longest_wait)),
        scaling_config=scaling(config, at_once),
        run_config=ray.train.RunConfig(
            **storage(run.path),
            name=run.checkpoints.name,
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.run.keep_checkpoints),
            callbacks=[NewestCheckpoint(run.latest), Controlled(heartbeats), WorkersGone(heartbeats)],  # type: ignore[list-item]
        ),
    )


def finished(trainer: TorchTrainer, run: RunFolder, heartbeats: Any, console: Console) -> str | None:
    """Return what the workers return, once they have. With Ctrl-C there is a checkpoint first, if the step ends soon.

    In a thread of its own, where Ray Train lets Ctrl-C be: its handler would stay after its end.
    """
    training: Future[Any] = Future()
    threading.Thread(target=lambda: settle(training, trainer.fit), daemon=True).start()
    try:
        return training.result().return_value
    except KeyboardInterrupt as end:
        stopped = end
    console.print("stopping after this outer step, with a checkpoint, or in a few seconds without")
    run.tell_to_stop()
    with suppress(KeyboardInterrupt, Exception):  # what came of it, its checkpoints tell
        training.result(timeout=SECONDS_TO_STOP)
    folder = newest_checkpoint(run.checkpoints)
    learned = f"{step_of(folder)} outer steps are kept in {run.path}" if folder else "no outer step is kept"
    message = f"{learned}; the same command with --resume goes on"
    stopped = kept(stopped, message)
    if not training.done():
        with suppress(ray.exceptions.RayError):
            end_run(heartbeats)
    raise stopped from None


def settle(future: Future[Any], work: Callable[[], Any]) -> None:
    """Give a future what comes of some work."""
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def no_room(run: RunFolder, longest_wait: float) -> TrainingError:
    return TrainingError(
        f"{run.path}: no room for the workers within run.longest_wait={longest_wait:g} seconds; what was learned is "
        "kept: --resume it when there is"
    )


def storage(folder: AnyPath) -> dict[str, Any]:
    """Return where Ray Train keeps checkpoints."""
    if isinstance(folder, Remote):
        return {"storage_path": folder.path, "storage_filesystem": folder.fs}
    return {"storage_path": str(folder)}


def run_data() -> None:
    import ray.data

    ray.data.range(1).materialize()


def root_cause(error: ray.train.TrainingFailedError) -> str:
    """Return the first worker's own error, of one that died if any did: the others then fail in waiting for it.

    The rest is Ray's account of how it travelled.
    """
    failures = list(getattr(error, "worker_failures", {}).values())
    cause = next((failure for failure in failures if isinstance(failure, DIED)), None) or next(iter(failures), error)
    cause = getattr(cause, "cause", None) or cause
    return f"workers failed: {type(cause).__name__}: {cause}"
