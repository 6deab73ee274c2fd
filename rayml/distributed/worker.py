"""What every Ray Train worker runs: outer steps of first-order MAML over task adapters, top to bottom."""

import json
import math
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from tensorboardX import SummaryWriter

from rayml.config import Config
from rayml.distributed.stream import EncodeEpisode, get, stream_steps
from rayml.engine import collective, local, zero
from rayml.evaluation.curves import adaptation_scores
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.encode import decode_rows
from rayml.lm.load import checkpoint_activations
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.start import principal_start
from rayml.meta.adapt import Params
from rayml.meta.fomaml import MetaGradient, fomaml
from rayml.meta.learner import Learner, outer_schedule
from rayml.runs.checkpoint import folder_name, newest_checkpoint, write_checkpoint
from rayml.runs.folder import RunFolder

# Episodes that are not trained on have seeds of their own, far from any training seed.
VALIDATION_SEED, START_SEED = 1_000_003, 3_000_017
START_EPISODES = 16
SIDES = ("support", "query")


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker. Tasks and tokenizer stay in Ray's object store."""

    config: Config
    model: str
    """Resolved by the driver."""
    encoder: ray.ObjectRef
    train: ray.ObjectRef
    val: ray.ObjectRef | None


def train_worker(settings: dict[str, Any]) -> str | None:
    """Meta-train; return None, or why training stopped early (the same on every worker)."""
    job: Job = settings["job"]
    config = job.config
    run = RunFolder(config.run.dir)
    rank, workers = collective.rank(), collective.world_size()
    device = ray.train.torch.get_device()

    lm = build_lm(config, job.model, device)
    learner = build_learner(config, untrained_start(job, lm), device)
    saved = collective.from_first_worker(newest_checkpoint(run.checkpoints) if rank == 0 else None)
    if saved:
        learner.load(saved.tensors, saved.step)
    elif rank == 0:
        run.write_untrained(learner.start)
    log = StepLog(run, learner.step) if rank == 0 else None
    sampler = config.data.sampler(config.seed)
    encode = EncodeEpisode(job.train, job.encoder, sampler)
    pad = get(job.encoder).tokenizer.eos_token_id

    steps = stream_steps(
        encode,
        first=learner.step * config.tasks_per_step,
        steps=config.outer.steps - learner.step,
        per_step=config.tasks_per_step,
        rank=rank,
        workers=workers,
    )
    ended = time.perf_counter()
    for episodes in steps:
        began = time.perf_counter()
        support, query = (collate_side(episodes, side, pad, device) for side in SIDES)
        gradient = fomaml(
            partial(lm.losses, batch=support),
            partial(lm.losses, batch=query),
            learner.start,
            learner.rates,
            config.inner.steps,
            len(episodes),
        )
        record = outer_update(learner, gradient, config.tasks_per_step)
        if not math.isfinite(record["query_loss"] + record["gradient_norm"]):
            return stop_reason(learner.step, episodes, gradient)
        now = time.perf_counter()
        record |= {"data_seconds": began - ended, "step_seconds": now - ended}
        ended = now
        if job.val and due(learner.step, config.validation.every, config.outer.steps):
            record |= validate(config, job, lm, learner)
            record["validation_seconds"] = time.perf_counter() - ended
            ended = time.perf_counter()
        if log:
            log.write(record)
        if due(learner.step, config.run.checkpoint_every, config.outer.steps):
            report(learner, record, rank)
    if log:
        log.close()
    return None


def build_lm(config: Config, model: str, device: torch.device) -> TaskLM:
    """Return the frozen base, whole or sharded, with the hooks for the task adapters on it."""
    engine = {"local": local, "zero": zero}[config.engine]
    module = engine.load(model, config.model.dtype, config.model.attention, device)
    if config.model.activation_checkpointing:
        checkpoint_activations(module)
    return TaskLM(module, TaskLoRA(module, **config.lora.shape()))


def untrained_start(job: Job, lm: TaskLM) -> Params:
    """Return the start at step 0, the same on every worker and for any number of them."""
    config = job.config
    if config.lora.start == "random":
        return lm.lora.untrained_start(config.seed)
    sampler, encoder = config.data.sampler(START_SEED), get(job.encoder)
    episodes = [encoder.episode(sampler.episode(get(job.train), index)) for index in range(START_EPISODES)]
    batches = [collate([decode_rows(e[side])], encoder.tokenizer.eos_token_id) for e in episodes for side in SIDES]
    return collective.from_first_worker(principal_start(lm, [b.to(lm.device) for b in batches], config.seed))


def build_learner(config: Config, start: Params, device: torch.device) -> Learner:
    """Return a learner at step 0."""
    outer = config.outer
    return Learner(
        {name: weight.to(device) for name, weight in start.items()},
        inner_lr=config.inner.lr,
        learn_lr=config.inner.learn_lr,
        lr=outer.lr,
        lr_of_inner_lr=outer.lr_of_inner_lr,
        weight_decay=outer.weight_decay,
        clip_norm=outer.clip_norm,
        schedule=outer_schedule(outer.schedule, outer.warmup_steps, outer.steps),
    )


def collate_side(episodes: list[dict[str, Any]], side: str, pad: int, device: torch.device) -> TaskBatch:
    rows = [decode_rows(episode[side]) for episode in episodes]
    return collate(rows, pad, [episode["choices"] for episode in episodes]).to(device)


def outer_update(learner: Learner, gradient: MetaGradient, tasks: int) -> dict[str, Any]:
    """Average the meta-gradient over all workers' tasks, in one all-reduce, and take the outer step.

    A gradient that is not finite is not applied: every worker sees the same sum, so all refuse it together.
    """
    names = list(gradient.start)
    support = gradient.support_losses
    losses = [gradient.query_losses.sum(), support.sum() if support is not None else gradient.query_losses.sum() * 0]
    sent = [*gradient.start.values(), *gradient.rates.values(), *losses]
    mean = [total / tasks for total in collective.sum_over_workers(sent)]
    starts, rates = mean[: len(names)], mean[len(names) : 2 * len(names)]
    query_loss, support_loss = float(mean[-2]), float(mean[-1])
    finite = math.isfinite(query_loss) and all(bool(g.isfinite().all()) for g in (*starts, *rates))
    norm = math.nan
    if finite:
        norm = learner.update(dict(zip(names, starts, strict=True)), dict(zip(names, rates, strict=True)))
    rate = torch.stack(list(learner.log_rates.values())).mean().exp()
    return {
        "step": learner.step,
        "query_loss": query_loss,
        "support_loss": support_loss,
        "gradient_norm": norm,
        "inner_lr": float(rate),
    }


def stop_reason(done: int, episodes: list[dict[str, Any]], gradient: MetaGradient) -> str:
    """Name the step and the tasks whose loss or gradient was not finite; every worker calls this together."""
    here = [
        episode["task"]
        for episode, loss in zip(episodes, gradient.query_losses.tolist(), strict=True)
        if not math.isfinite(loss)
    ]
    tasks = sorted({task for names in collective.gather_from_workers(here) for task in names})
    return (
        f"outer step {done + 1}: a loss or gradient is not finite; tasks: {', '.join(tasks) or 'gradient only'}. "
        "The last checkpoint is kept. Lower inner.lr or outer.lr, or use model.dtype=float32, and --resume"
    )


def due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def validate(config: Config, job: Job, lm: TaskLM, learner: Learner) -> dict[str, float]:
    """Return the scores before and after adapting, over the same meta-val episodes every time.

    Each worker takes its share. All make the same calls, as a sharded base asks of them: so either all episodes are
    of label tasks, or, where there is none, of free text.
    """
    encoder = get(job.encoder)
    tasks = [task for task in get(job.val) if task.options] or get(job.val)
    workers, share = collective.world_size(), config.tasks_per_worker
    sampler = config.data.sampler(VALIDATION_SEED)
    rounds = math.ceil(config.validation.episodes / (share * workers))
    curves = []
    for batch in range(rounds):
        first = (batch * workers + collective.rank()) * share
        episodes = [sampler.episode(tasks, first + i) for i in range(share)]
        steps = config.inner.steps
        curves += adaptation_scores(lm, encoder, episodes, learner.start, learner.rates, steps, only_ends=True)
    everyone = [curve for part in collective.gather_from_workers(curves) for curve in part]
    name = "accuracy" if everyone[0].is_accuracy else "loss"
    before, after = (sum(curve.scores[k] for curve in everyone) / len(everyone) for k in (0, -1))
    return {f"val_{name}_before": before, f"val_{name}_after": after}


class StepLog:
    """Rank 0's records: a line in `metrics.jsonl` and a point in TensorBoard for every outer step."""

    def __init__(self, run: RunFolder, step: int):
        run.truncate_metrics(step)
        self.file = run.metrics.open("a", buffering=1)
        self.board = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step":
                self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.file.close()
        self.board.close()


def report(learner: Learner, record: dict[str, Any], rank: int) -> None:
    """Hand rank 0's checkpoint to Ray Train; a barrier for all workers."""
    name = folder_name(learner.step)
    if rank:
        ray.train.report(record, checkpoint_dir_name=name)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), learner.step, learner.state())
        ray.train.report(record, ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)
