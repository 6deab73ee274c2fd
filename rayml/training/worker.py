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
import torch.distributed

from rayml.config import Config
from rayml.lm.frozen import ALONE, Share
from rayml.lm.precision import device_for, settled, with_dtype
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
from rayml.runs.files import AnyPath, deliver
from rayml.runs.folder import RunFolder
from rayml.tasks.episodes import VALIDATION_SEED
from rayml.tasks.statistics import Curve, Group, groups, overall
from rayml.training import collective
from rayml.training.replicated import Replicated
from rayml.training.sharded import Sharded
from rayml.training.stragglers import Heartbeat
from rayml.training.stream import DivergedError, EncodeEpisode, Job, get, one_ahead, stream_steps
from rayml.training.trackers import Tracker, open_trackers

PREEMPTION_SECONDS = 2
"""Between questions whether nodes are about to be taken away, and to object storage."""
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
    likely = collective.from_first_worker(newest_step(run.checkpoints) if collective.rank() == 0 else None)
    steps = steps_left(job, likely)  # its first episodes are made while the model loads
    heartbeat.doing("loading the model")
    learning: Learning = (Sharded if config.is_sharded else Replicated)(job, device, heartbeat)
    learning.begin(run)
    if learning.done != likely:
        steps = steps_left(job, learning.done)
    heartbeat.doing("first outer step")
    with StepLog(config, run, learning.done) if collective.rank() == 0 else nullcontext() as log:
        return meta_train(job, run, learning, steps, log)


def agreed_precision(job: Job, run: RunFolder, device: torch.device, heartbeat: Heartbeat) -> Config:
    """Return the config with one dtype and attention for all workers; the run folder keeps them, the driver tells."""
    devices = collective.gather_from_workers(device_for(job.config, job.model, device))
    made_in = collective.from_first_worker(run.made_in() if collective.rank() == 0 else None)
    if made_in and job.config.is_sharded:  # its shards are of that dtype
        job = replace(job, config=with_dtype(job.config, made_in))
    config, precision = settled(job.config, job.model, devices, made_in)
    if collective.rank() == 0:
        run.write_precision(precision.dtype, precision.attention, precision.why)
        heartbeat.note(str(precision), precision.warning)
    return config


def meta_train(
    job: Job, run: RunFolder, learning: Learning, steps: Iterator[list[dict[str, Any]]], log: "StepLog | None"
) -> str | None:
    """Take the outer steps that are left; returns as `train_worker` does."""
    config, notices = job.config, Notices(run)
    scores: list[float] = collective.from_first_worker(val_scores(run.records()) if log else None)
    ended, checkpoint_seconds = time.perf_counter(), 0.0
    for episodes, sides in one_ahead(steps, learning.lay_out, learning.device):
        step, began = learning.done + 1, time.perf_counter()
        validates = bool(job.val) and due(step, config.validation.every, config.outer.steps)
        try:
            record = learning.step(episodes, sides, waited=began - ended)
            record |= {"data_seconds": began - ended, "step_seconds": time.perf_counter() - ended}
            record |= {"checkpoint_seconds": checkpoint_seconds} | gpu_peak()  # waited for, before this step
            record |= validate(config, job, learning) if validates else {}
        except DivergedError as error:
            return stop_reason(step, error.tasks)
        scores += val_scores([record])
        if log:
            log.write(record)
        stop, leaving = notices.read()
        is_last = stop or (validates and is_enough(scores, config.validation.patience))
        saving = time.perf_counter()
        if validates and is_best(scores):
            keep_best(run, learning)
        if is_last or leaving or due(step, config.run.checkpoint_every, config.outer.steps):
            if log:
                log.flush()
            report(run, learning, record)
        if is_last:
            break
        ended = time.perf_counter()
        checkpoint_seconds = ended - saving
    return None


def steps_left(job: Job, done: int) -> Iterator[list[dict[str, Any]]]:
    """Return the stream of this worker's episodes, step by step, behind the `done` outer steps."""
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


def share_of_tasks(config: Config) -> Share:
    """Return this worker's share of a step's tasks: all of them, where the model is sharded over the workers."""
    return ALONE if config.is_sharded else collective.share()


def gpu_peak() -> dict[str, float]:
    """Return the most memory so far, on this worker."""
    return {"gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_initialized() else {}


def stop_reason(step: int, tasks: list[str]) -> str:
    """Name the step and the tasks whose loss or gradient was not finite; every worker calls this together."""
    everywhere = sorted({task for names in collective.gather_from_workers(tasks) for task in names})
    return (
        f"outer step {step}: a loss or gradient is not finite; tasks: {', '.join(everywhere) or 'gradient only'}. "
        "The last checkpoint is kept. Lower inner.lr or outer.lr, or use model.dtype=float32, and --resume"
    )


def due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def validate(config: Config, job: Job, learning: Learning) -> dict[str, float]:
    """Return the scores before and after adapting, over the same meta-val episodes every time: the accuracy over label
    tasks, the loss over those of text, and the overall score (`rayml.tasks.statistics`).

    Each worker takes its share. All make the same calls, as a sharded model asks of them: so label tasks come first,
    and free text after them.
    """
    tasks, began = get(job.val), time.perf_counter()
    means: dict[str, dict[str, float]] = {"before": {}, "after": {}}
    for group in groups(tasks, config.validation.episodes):
        curves = validation_curves(config, group, learning)
        for end, when in ((0, "before"), (-1, "after")):
            means[when][group.metric] = mean(curve.scores[end] for curve in curves)
    by_kind = {f"val_{metric}_{when}": value for when, of in means.items() for metric, value in of.items()}
    by_kind |= {f"val_score_{when}": overall(of, tasks) for when, of in means.items()}
    return by_kind | {"validation_seconds": time.perf_counter() - began}


def validation_curves(config: Config, group: Group, learning: Learning) -> list[Curve]:
    """Return the scores before and after adapting of a group's episodes, made a whole number of steps' worth."""
    rank, workers, _ = share_of_tasks(config)
    at_a_time = math.ceil(config.tasks_per_step / workers)
    episodes = math.ceil(group.episodes / config.tasks_per_step) * config.tasks_per_step
    sampler = config.data.sampler(VALIDATION_SEED)
    curves: list[Curve] = []
    for batch in range(math.ceil(episodes / (at_a_time * workers))):
        first = (batch * workers + rank) * at_a_time
        curves += learning.score([sampler.episode(group.tasks, first + i) for i in range(at_a_time)])
    if workers > 1:
        curves = [curve for part in collective.gather_from_workers(curves) for curve in part]
    # With another number of workers the last round may score a few more.
    return [curve for curve in curves if curve.index < episodes]


class Notices:
    """What the workers are told between steps."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.asked, self.took = time.monotonic(), 0.0
        self.leaving: set[str] = set()

    def read(self) -> tuple[bool, bool]:
        """Return whether to end here, and whether a node of ours was just announced to be taken away.

        All workers ask together, and Ray only now and then: its answer takes longer than a small model's step.
        """
        told = ask = False
        if collective.rank() == 0:
            began = time.monotonic()
            # Storage that takes long to answer is not asked for more than a twentieth of the time.
            ask = began - self.asked > PREEMPTION_SECONDS + 20 * self.took
            told = (ask or self.run.is_local) and self.run.is_told_to_stop()
            self.took = 0.0 if self.run.is_local else time.monotonic() - began
        told, ask = collective.from_first_worker((told, ask))
        if not ask:
            return told, False
        self.asked = time.monotonic()
        info = ray.train.get_preemption_info()
        known, self.leaving = self.leaving, set(info.preempted_node_ids if info else ())
        return told, bool(self.leaving - known)


class StepLog:
    """Rank 0's records: for every outer step a line in `metrics.jsonl`, and a point in each tracker."""

    def __init__(self, config: Config, run: RunFolder, step: int):
        run.truncate_metrics(step)
        self.run, self.file = run, run.metrics.open("a", buffering=1)
        self.scratch = run.path if isinstance(run.path, Path) else Path(tempfile.mkdtemp(prefix="rayml-"))
        self.trackers = open_trackers(config, run, self.scratch, step)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self._tell(lambda tracker: tracker.write(record))

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                tell(tracker)
            except Exception:  # a server that is away is no reason to stop training
                logger.warning("%s is left out from here on", type(tracker).__name__, exc_info=True)
                self.trackers.remove(tracker)

    def flush(self) -> None:
        """Bring what was written so far to where the run lies; what cannot be brought now is, with the next."""
        self.file.flush()
        if self.run.is_local:
            return
        try:
            deliver(self.scratch, self.run.path)
        except OSError as error:
            logger.warning("%s; tried again later", error)

    def close(self, failed: bool) -> None:
        self._tell(lambda tracker: tracker.close(failed))
        try:
            self.flush()
            self.file.close()
        finally:
            if not self.run.is_local:
                shutil.rmtree(self.scratch)


def report(run: RunFolder, learning: Learning, record: dict[str, Any]) -> None:
    """Hand Ray Train the checkpoint, of which every worker may hold a part; a barrier for all workers.

    It is uploaded beside the steps that follow, and then removed here.
    """
    part = write_part(learning, run.checkpoints)
    ray.train.report(
        record,
        ray.train.Checkpoint.from_directory(part) if part else None,
        checkpoint_dir_name=folder_name(learning.done),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
    )


def keep_best(run: RunFolder, learning: Learning) -> None:
    """Keep the checkpoint of the best validation so far, and drop the one before it; a barrier for all workers."""
    folder = run.best / folder_name(learning.done)
    part = write_part(learning, run.best)
    if part:
        try:
            with naming_full_disk(folder, learning.done):
                deliver(part, folder)
        finally:
            shutil.rmtree(part)
    barrier()
    if collective.rank() == 0:
        keep_only(folder)


def write_part(learning: Learning, checkpoints: AnyPath) -> Path | None:
    """Write this worker's part of a checkpoint, sealed, to a folder of its own; None if it has none.

    All workers call this together, as gathering the parts may ask.
    """
    rank, folder = collective.rank(), Path(tempfile.mkdtemp(prefix="rayml-"))
    try:
        with naming_full_disk(checkpoints / folder_name(learning.done), learning.done):
            learning.write(folder)
            if rank < learning.parts:
                seal(folder, learning.done, rank, learning.parts)
                return folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # a full disk least of all keeps half a checkpoint
        raise
    shutil.rmtree(folder)
    return None


def barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
