"""What every Ray Train worker runs, top to bottom."""

import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import ray.train
import ray.train.torch
import torch

from rayml.config import Config
from rayml.lm.frozen import ALONE, WorkerShare
from rayml.lm.precision import device_for, resolve_precision, with_dtype
from rayml.runs.checkpoint import (
    folder_name,
    is_best,
    is_enough,
    keep_only,
    naming_full_disk,
    newest_step,
    seal,
    val_scores,
)
from rayml.runs.files import copy_folder
from rayml.runs.folder import RunFolder
from rayml.tasks.statistics import Curve, Group, group_by_metric, overall_score
from rayml.training import collective
from rayml.training.replicated import Replicated
from rayml.training.sharded import Sharded
from rayml.training.stragglers import Heartbeat
from rayml.training.stream import DivergedError, EncodeEpisode, Job, fetch_once, prefetch, stream_steps
from rayml.training.trackers import Tracker, open_trackers

PREEMPTION_SECONDS = 2
"""Between two questions whether nodes are about to be preempted, and between two reads of object storage."""
Learning = Replicated | Sharded
logger = logging.getLogger(__name__)


def train_worker(settings: dict[str, Any]) -> str | None:
    """Meta-train; return None, or why training failed (the same on every worker)."""
    job: Job = settings["job"]
    device = ray.train.torch.get_device()
    run = RunFolder(job.config.run.dir)
    heartbeat = Heartbeat(job.heartbeats, job.config.run.longest_wait)
    job = replace(job, config=agreed_precision(job, run, device, heartbeat))
    config = job.config
    expected_step = collective.on_first_worker(lambda: newest_step(run.checkpoints))
    steps = steps_left(job, expected_step)  # the first episodes are made while the model loads
    heartbeat.doing("loading the model")
    learning: Learning = (Sharded if config.is_sharded else Replicated)(job, device, heartbeat)
    learning.begin(run)
    if learning.done != expected_step:  # the newest checkpoint was not whole
        steps = steps_left(job, learning.done)
    heartbeat.doing("first outer step")
    with StepLog(config, run, learning.done) if collective.rank() == 0 else nullcontext() as log:
        return meta_train(job, run, learning, steps, log)


def agreed_precision(job: Job, run: RunFolder, device: torch.device, heartbeat: Heartbeat) -> Config:
    """Return the config with one dtype and attention for all workers. They are kept in the run folder, and shown."""
    devices = collective.gather_from_workers(device_for(job.config, job.model, device))
    made_in = collective.on_first_worker(run.trained_dtype)
    if made_in and job.config.is_sharded:  # the shards of its checkpoints have that dtype
        job = replace(job, config=with_dtype(job.config, made_in))
    config, precision = resolve_precision(job.config, job.model, devices, made_in)
    if collective.rank() == 0:
        run.write_precision(precision.dtype, precision.attention, precision.why)
        heartbeat.note(str(precision), precision.warning)
    return config


def meta_train(
    job: Job, run: RunFolder, learning: Learning, steps: Iterator[list[dict[str, Any]]], log: "StepLog | None"
) -> str | None:
    """Take the outer steps that are left; return what `train_worker` does."""
    config, notices = job.config, Notices(run)
    scores = collective.on_first_worker(lambda: val_scores(run.records()))
    ended, checkpoint_seconds = time.perf_counter(), 0.0
    for episodes, sides in prefetch(steps, learning.prepare, learning.device):
        step, began = learning.done + 1, time.perf_counter()
        validates = bool(job.val) and is_due(step, config.validation.every, config.outer.steps)
        try:
            record = learning.step(episodes, sides, waited=began - ended)
            record |= {"data_seconds": began - ended, "step_seconds": time.perf_counter() - ended}
            record |= {"checkpoint_seconds": checkpoint_seconds} | gpu_peak()  # of the checkpoint before this step
            record |= validate(config, job, learning) if validates else {}
        except DivergedError as error:
            if log:
                log.failed = True
            return stop_reason(config, step, error.tasks)
        scores += val_scores([record])
        if log:
            log.write(record)
        told_to_stop, node_is_leaving = notices.read()
        is_last = told_to_stop or (validates and is_enough(scores, config.validation.patience))
        began_saving = time.perf_counter()
        if validates and is_best(scores):
            keep_best(run, learning)
        if is_last or node_is_leaving or is_due(step, config.run.checkpoint_every, config.outer.steps):
            if log:
                log.flush()
            report(run, learning, record)
        if is_last:
            break
        ended = time.perf_counter()
        checkpoint_seconds = ended - began_saving
    return None


def steps_left(job: Job, done: int) -> Iterator[list[dict[str, Any]]]:
    """Return the stream of this worker's episodes, step by step, after the first `done` outer steps."""
    config = job.config
    share = share_of_tasks(config)
    sampler = replace(config.data.training_sampler(config.seed), replayed=job.replayed, replay=config.data.replay)
    return stream_steps(
        EncodeEpisode(job.train, job.encoder, sampler),
        first=done * config.tasks_per_step,
        steps=config.outer.steps - done,
        per_step=config.tasks_per_step,
        rank=share.rank,
        workers=share.workers,
    )


def share_of_tasks(config: Config) -> WorkerShare:
    """Return this worker's share of a step's tasks. Where the model is sharded, each worker takes part in all."""
    return ALONE if config.is_sharded else collective.share()


def gpu_peak() -> dict[str, float]:
    """Return this worker's peak of GPU memory so far."""
    return {"gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_initialized() else {}


def stop_reason(config: Config, step: int, tasks: list[str]) -> str:
    """Name the step and the tasks whose loss or gradient was not finite; all workers call this together."""
    is_full = config.mode == "full"
    keep = "`rayml export` this run, and name that folder as model.name" if is_full else "--continue this run"
    all_tasks = sorted({task for names in collective.gather_from_workers(tasks) for task in names})
    return (
        f"outer step {step}: a loss or gradient is not finite; tasks: {', '.join(all_tasks) or 'gradient only'}. "
        "A run resumes with its own settings: use another run.dir with a lower inner.lr or outer.lr, or with "
        f"model.dtype=float32. To begin there at this run's last checkpoint, {keep}"
    )


def is_due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def validate(config: Config, job: Job, learning: Learning) -> dict[str, float]:
    """Return the scores before and after adapting, over the same meta-val episodes every time.

    They are the accuracy over label tasks, the loss over free text, and the overall score (`rayml.tasks.statistics`).
    Each worker scores its share. A sharded model needs the same calls from all workers, so label tasks come first on
    each of them, and free text afterwards.
    """
    tasks, began = fetch_once(job.val), time.perf_counter()
    means: dict[str, dict[str, float]] = {"before": {}, "after": {}}
    for group in group_by_metric(tasks, config.validation.episodes):
        curves = validation_curves(config, group, learning)
        for index, when in ((0, "before"), (-1, "after")):
            means[when][group.metric] = mean(curve.scores[index] for curve in curves)
    record = {f"val_{metric}_{when}": score for when, by_metric in means.items() for metric, score in by_metric.items()}
    record |= {f"val_score_{when}": overall_score(by_metric, tasks) for when, by_metric in means.items()}
    return record | {"validation_seconds": time.perf_counter() - began}


def validation_curves(config: Config, group: Group, learning: Learning) -> list[Curve]:
    """Return the scores before and after adapting to a group's episodes, rounded up to whole outer steps' worth."""
    rank, workers, _ = share_of_tasks(config)
    batch_size = math.ceil(config.tasks_per_step / workers)
    episodes = math.ceil(group.episodes / config.tasks_per_step) * config.tasks_per_step
    sampler = config.data.validation_sampler()
    curves: list[Curve] = []
    for batch in range(math.ceil(episodes / (batch_size * workers))):
        first = (batch * workers + rank) * batch_size
        curves += learning.score([sampler.episode(group.tasks, first + i) for i in range(batch_size)])
    if workers > 1:
        curves = [curve for part in collective.gather_from_workers(curves) for curve in part]
    # The last round may score more. They are left out, so that any number of workers gives the same scores.
    return [curve for curve in curves if curve.index < episodes]


class Notices:
    """What the workers learn from outside between two steps: to stop, or that a node is leaving."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.last_check, self.storage_seconds = time.monotonic(), 0.0
        self.leaving_nodes: set[str] = set()

    def read(self) -> tuple[bool, bool]:
        """Return whether to stop here, and whether the preemption of one of our nodes was just announced.

        All workers call this together. Ray is asked only now and then: it takes longer than a small model's step.
        """
        must_stop = must_ask = False
        if collective.rank() == 0:
            began = time.monotonic()
            # Slow storage takes up at most a twentieth of the time.
            must_ask = began - self.last_check > PREEMPTION_SECONDS + 20 * self.storage_seconds
            must_stop = (must_ask or self.run.is_local) and self.run.is_stop_requested()
            self.storage_seconds = 0.0 if self.run.is_local else time.monotonic() - began
        must_stop, must_ask = collective.from_first_worker((must_stop, must_ask))
        if not must_ask:
            return must_stop, False
        self.last_check = time.monotonic()
        info = ray.train.get_preemption_info()
        known, self.leaving_nodes = self.leaving_nodes, set(info.preempted_node_ids if info else ())
        return must_stop, bool(self.leaving_nodes - known)


class StepLog:
    """Rank 0's records: for every outer step a line in `metrics.jsonl`, and a point in each tracker."""

    def __init__(self, config: Config, run: RunFolder, step: int):
        run.truncate_metrics(step)
        self.run, self.file = run, run.metrics.open("a", buffering=1)
        self.scratch = run.path if isinstance(run.path, Path) else Path(tempfile.mkdtemp(prefix="rayml-"))
        self.trackers = open_trackers(config, run, self.scratch, step)
        self.failed = False
        """Whether training ended without an exception, and yet failed."""

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(self.failed or kind is not None)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self._for_each_tracker(lambda tracker: tracker.write(record))

    def _for_each_tracker(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                action(tracker)
            except Exception:  # an unreachable server is no reason to stop training
                logger.warning("%s is left out from here on", type(tracker).__name__, exc_info=True)
                self.trackers.remove(tracker)

    def flush(self) -> None:
        """Copy what was written so far to the run's storage. What cannot be copied now will be, at the next flush."""
        self.file.flush()
        if self.run.is_local:
            return
        try:
            copy_folder(self.scratch, self.run.path)
        except OSError as error:
            logger.warning("%s; tried again later", error)

    def close(self, failed: bool) -> None:
        self._for_each_tracker(lambda tracker: tracker.close(failed))
        try:
            self.flush()
            self.file.close()
        finally:
            if not self.run.is_local:
                shutil.rmtree(self.scratch)


def report(run: RunFolder, learning: Learning, record: dict[str, Any]) -> None:
    """Hand this worker's part of a checkpoint to Ray Train; a barrier for all workers.

    Ray Train uploads it during the steps that follow, and then removes it here.
    """
    part = write_part(learning)
    ray.train.report(
        record,
        ray.train.Checkpoint.from_directory(part) if part else None,
        checkpoint_dir_name=folder_name(learning.done),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
    )


def keep_best(run: RunFolder, learning: Learning) -> None:
    """Keep the checkpoint of the best validation so far, and remove the previous one; a barrier for all workers."""
    folder = run.best / folder_name(learning.done)
    part = write_part(learning)
    if part:
        try:
            with naming_full_disk(folder, learning.done):
                copy_folder(part, folder)
        finally:
            shutil.rmtree(part)
    collective.barrier()
    if collective.rank() == 0:
        keep_only(folder)


def write_part(learning: Learning) -> Path | None:
    """Write this worker's part of a checkpoint, with its manifest, to a folder of its own; None if it has no part.

    All workers call this together: a sharded model gathers its parts.
    """
    rank, folder = collective.rank(), Path(tempfile.mkdtemp(prefix="rayml-"))
    try:
        with naming_full_disk(folder, learning.done):
            learning.write(folder)
            if rank < learning.parts:
                seal(folder, learning.done, rank, learning.parts)
                return folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint would only fill up the disk
        raise
    shutil.rmtree(folder)
    return None
