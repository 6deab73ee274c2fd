"""Meta-training where what is learned lies whole on every worker: adapters, or in mode full a model that fits.

Every worker adapts its own tasks; their meta-gradients meet in one all-reduce an outer step.
"""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch

from rayml.algorithms.inner_loop import InnerLoop, Params
from rayml.algorithms.meta_gradient import MetaGradient
from rayml.algorithms.outer_loop import Learner, RecentGains, StepTimer, initial_log_inner_lrs, outer_schedule
from rayml.config import Config
from rayml.lm import zero
from rayml.lm.encode import Encoder
from rayml.lm.fine_tuning import rate_factors, special_steps
from rayml.lm.frozen import ALONE, KnownStates, in_file, known_states
from rayml.lm.initialization import untrained_start
from rayml.lm.load import checkpoint_activations, load_base
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM, hooks
from rayml.lm.rows import TokenRow
from rayml.lm.scorer import Scorer
from rayml.lm.sides import TaskSide, trained_tokens, training_sides
from rayml.model import start_of
from rayml.runs.checkpoint import read_newest, write_state
from rayml.runs.folder import RunFolder
from rayml.tasks.episodes import relabel
from rayml.tasks.statistics import Curve
from rayml.tasks.task import Task
from rayml.training import collective
from rayml.training.stragglers import Heartbeat
from rayml.training.stream import DivergedError, Job, get

WORTH_KNOWING = 2
"""Times that an example comes back on average, from which on its frozen states are kept."""
MOST_IN_MEMORY, MOST_IN_FILE = 2 * 2**30, 16 * 2**30
"""Bytes on each worker, for those states."""


def room_for_states(like: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """Return a tensor of a shape, in a file where it is large; None, where that is too large for one of the workers."""
    size = math.prod(shape) * like.element_size()
    if size <= MOST_IN_MEMORY:
        return like.new_empty(shape)
    found = None
    if size <= MOST_IN_FILE and has_disk_for(size * collective.world_size()):
        with suppress(OSError):
            found = in_file(like, shape)
    return found if all(collective.gather_from_workers(found is not None)) else None


def has_disk_for(size: int) -> bool:
    """Return whether twice so many bytes are free where temporary files lie, and those lie on a disk."""
    folder = Path(tempfile.gettempdir()).resolve()
    mounts = [one for one in psutil.disk_partitions(all=True) if folder.is_relative_to(one.mountpoint)]
    own = max(mounts, key=lambda one: len(one.mountpoint), default=None)
    in_memory = own is not None and own.fstype in ("tmpfs", "ramfs")
    return not in_memory and shutil.disk_usage(folder).free > 2 * size


class Replicated:
    """The state of one worker, and the three things it does: take a step, score episodes, write a checkpoint."""

    parts = 1
    """Of a checkpoint."""

    def __init__(self, job: Job, device: torch.device, heartbeat: Heartbeat):
        config = job.config
        self.config, self.device, self.heartbeat = config, device, heartbeat
        self.rank, self.workers = collective.rank(), collective.world_size()
        self.lm = build_lm(config, job.model, device)
        self.encoder = get(job.encoder)
        rows = returning_rows(job, self.encoder) if self.lm.has_frozen_layers else []
        if rows:
            self.lm.known = self._known_states(rows)
        heartbeat.doing("finding the start")
        start = agreed_start(job, self.lm)
        factors = rate_factors(self.lm.module, start, config.inner.layer_decay)
        self.learner = build_learner(config, start, factors, device)
        self.tasks = {task.name: index for index, task in enumerate(get(job.train))}
        self.gains = RecentGains(len(self.tasks), device)
        self.timer = StepTimer(device)

    def _known_states(self, rows: Sequence[TokenRow]) -> KnownStates | None:
        """Return what the frozen layers make of rows, of which each worker runs a share; None, if that is too much."""

        def tell(percent: int) -> None:
            self.heartbeat.doing(f"reading {len(rows)} training examples with the frozen layers, once: {percent} %")

        return known_states(self.lm, rows, self.encoder.pad, collective.share(), tell, room_for_states)

    def begin(self, run: RunFolder) -> None:
        """Go on from the newest whole checkpoint, or keep the untrained start to compare with."""
        saved = read_newest(run.checkpoints) if self.rank == 0 else None
        step = collective.from_first_worker(saved.step if saved else None)
        if step is not None:
            tensors = collective.tensors_from_first_worker(saved.tensors if saved else {})
            self.learner.load(tensors, step)
            self.gains.gains.copy_(tensors["gains"])
            return
        old = self.config.run.continues
        if old:
            start, log_inner_lrs = start_of(RunFolder(old)) if self.rank == 0 else ({}, {})
            self.learner.begin_at(*map(collective.tensors_from_first_worker, (start, log_inner_lrs)))
        if self.rank == 0 and self.config.mode == "adapters":
            run.write_untrained(self.learner.start)

    @property
    def done(self) -> int:
        """Outer steps so far."""
        return self.learner.step

    def lay_out(self, episodes: list[dict[str, Any]]) -> list[tuple[TaskSide, TaskSide]]:
        """Return the supports and the queries of a step's episodes, as many side by side as a forward takes."""
        together, pad = self.config.tasks_together, self.encoder.pad
        parts = [episodes[first : first + together] for first in range(0, len(episodes), together)]
        both = [training_sides(self.lm, part, pad, self.config) for part in parts]
        for side in chain.from_iterable(both):
            side.lay_out()
        return both

    def step(
        self, episodes: list[dict[str, Any]], sides: Sequence[tuple[TaskSide, TaskSide]], waited: float
    ) -> dict[str, Any]:
        """Take an outer step on this worker's episodes and all others'; return its record.

        Args:
            sides: the episodes, laid out.
            waited: seconds that this worker waited for them.

        Raises:
            DivergedError: a loss or gradient is not finite; on all workers together.
        """
        self.timer.begin()
        gradient, tokens = self._gradient(episodes, sides, self._weights(episodes))
        record = self._update(gradient, tokens, episodes, waited) | self.timer.record()
        if not math.isfinite(record["query_loss"] + record["gradient_norm"]):
            losses = zip(episodes, gradient.query_losses.tolist(), strict=True)
            raise DivergedError([episode["task"] for episode, loss in losses if not math.isfinite(loss)])
        return record

    def _weights(self, episodes: list[dict[str, Any]]) -> torch.Tensor:
        task_indices = torch.tensor([self.tasks[episode["task"]] for episode in episodes])
        if self.config.data.weighting != "dynamic":
            return torch.ones(len(task_indices), device=self.lm.device)
        return self.gains.weights()[task_indices.to(self.lm.device)]

    def _gradient(
        self, episodes: list[dict[str, Any]], sides: Sequence[tuple[TaskSide, TaskSide]], weights: torch.Tensor
    ) -> tuple[MetaGradient, int]:
        """Return the meta-gradient, of some tasks side by side after the other, and tokens."""
        config, learner, regularize = self.config, self.learner, self.config.regularize
        parts, tokens, first = [], 0, 0
        for support, query in sides:
            some = slice(first, first := first + support.batch.tasks)
            inner = InnerLoop(
                learner.inner_lrs,
                config.inner.steps,
                config.learns_inner_lrs,
                special_steps(support, config.inner.unfreeze_every, regularize.adversarial),
                ended=lambda: self.timer("inner"),
            )
            with dropping(config, self.lm, episodes[some]):
                parts.append(config.algorithm.meta_gradient(support, query, learner.start, inner, weights[some]))
            tokens += trained_tokens(config, support.batch, query.batch)
            self.timer("outer")
        return joined(parts), tokens

    def _update(
        self, gradient: MetaGradient, tokens_here: int, episodes: list[dict[str, Any]], waited: float
    ) -> dict[str, Any]:
        """Average the meta-gradient over all workers' tasks, in one all-reduce, and take the outer step.

        A gradient that is not finite is not applied: every worker sees the same sum, so all refuse it together.
        """
        learner, tasks = self.learner, self.config.tasks_per_step
        query = gradient.query_losses
        support = query * 0 if gradient.support_losses is None else gradient.support_losses
        tokens = torch.tensor(float(tokens_here), device=query.device)
        seconds = torch.zeros(self.workers, device=query.device)
        seconds[self.rank] = waited + sum(self.timer.seconds.values())
        tally = self._tally(episodes, support - query)
        sent = [
            query.sum(),
            support.sum(),
            tokens,
            seconds,
            *tally,
            *gradient.start.values(),
            *gradient.inner_lrs.values(),
        ]
        self.heartbeat(learner.step + 1)
        query_loss, support_loss, tokens, seconds, *rest = collective.sum_over_workers(sent)
        self.timer("communication")
        tally, mean = rest[: len(tally)], [total / tasks for total in rest[len(tally) :]]
        query_loss, support_loss = query_loss / tasks, support_loss / tasks
        norm = math.nan
        if collective.all_finite([*mean, query_loss]):
            start = dict(zip(gradient.start, mean, strict=False))
            norm = learner.update(start, dict(zip(gradient.inner_lrs, mean[len(start) :], strict=True)))
            if tally:
                self.gains.update(*tally)
        self.timer("outer")
        inner_lrs = torch.cat([rate.flatten() for rate in learner.log_inner_lrs.values()])
        record = {"step": learner.step, "query_loss": float(query_loss), "gradient_norm": norm, "tokens": int(tokens)}
        if gradient.support_losses is not None:
            record |= {"support_loss": float(support_loss), "inner_lr": float(inner_lrs.mean().exp())}
        return record | slowest(seconds)

    def _tally(self, episodes: list[dict[str, Any]], gains: torch.Tensor) -> list[torch.Tensor]:
        """Return the sums of the tasks' gains, and their counts, `[tasks]` each; nothing where no weight needs them."""
        if self.config.data.weighting != "dynamic":
            return []
        task_indices = torch.tensor([self.tasks[episode["task"]] for episode in episodes], device=gains.device)
        counts, sums = (torch.zeros(len(self.tasks), device=gains.device) for _ in range(2))
        return [
            sums.index_add_(0, task_indices, gains.float()),
            counts.index_add_(0, task_indices, torch.ones(len(task_indices), device=gains.device)),
        ]

    def score(self, episodes: Sequence[Any]) -> list[Curve]:
        """Return the scores of this worker's episodes before and after adapting."""
        config = self.config
        scorer = Scorer(self.lm, self.encoder, config.algorithm, config.inner.steps, config.inner.unfreeze_every)
        together = len(episodes)
        if config.mode == "full" or (config.tasks_at_once and config.engine == "local"):
            together = config.tasks_together  # sharded workers gather layers together: all take as many forwards
        return [
            curve
            for first in range(0, len(episodes), together)
            for curve in scorer.curves(
                episodes[first : first + together], self.learner.start, self.learner.inner_lrs, only_ends=True
            )
        ]

    def write(self, folder: Path) -> None:
        """Write this worker's part of a checkpoint: the first one's is all."""
        if self.rank < self.parts:
            write_state(folder, self.learner.state() | {"gains": self.gains.gains})


def returning_rows(job: Job, encoder: Encoder) -> list[TokenRow]:
    """Return the rows of the tasks whose examples come back in later episodes, as often as it takes to be worth it."""
    config, data = job.config, job.config.data
    validations = -(-config.outer.steps // config.validation.every) if job.val else 0  # the last step is one
    rows: list[TokenRow] = []
    for tasks, episodes in (
        (get(job.train), config.outer.steps * config.tasks_per_step),
        (get(job.val) if job.val else (), validations * config.validation.episodes),
    ):
        drawn = episodes * data.ways * (data.shots + data.queries)
        if not encoder.in_context and drawn >= WORTH_KNOWING * sum(len(task.examples) for task in tasks):
            rows += [row for task in tasks for row in task_rows(encoder.of(task.name, task.kind), task, data.labels)]
    return rows


def task_rows(encoder: Encoder, task: Task, labels: str) -> list[TokenRow]:
    """Return a row for each example of a task, as episodes show it but for which letter stands for a label."""
    letter = "A" if task.options and labels == "letters" else None
    return encoder.rows([relabel(example, letter) for example in task.examples], bool(task.options))


def slowest(seconds: torch.Tensor) -> dict[str, Any]:
    """Return which worker took longest for its part of a step, and how many times the median; `seconds`: [workers]."""
    if len(seconds) == 1:
        return {}
    worker = int(seconds.argmax())
    return {"slowest_worker": worker, "slowest_factor": float(seconds[worker] / seconds.median())}


def joined(parts: Sequence[MetaGradient]) -> MetaGradient:
    """Return the meta-gradient of all tasks from those of some each."""
    if len(parts) == 1:
        return parts[0]
    starts, inner_lrs, support, query = zip(*parts, strict=True)
    return MetaGradient(
        {name: sum(start[name] for start in starts) for name in starts[0]},
        {name: sum(rate[name] for rate in inner_lrs) for name in inner_lrs[0]},
        None if support[0] is None else torch.cat(support),
        torch.cat(query),
    )


def dropping(config: Config, lm: TaskLM, episodes: Sequence[dict[str, Any]]) -> AbstractContextManager[None]:
    """Drop adapters' inputs inside the block, with masks that depend on the run's seed and on each episode alone."""
    share = config.regularize.lora_dropout
    if not share or not isinstance(lm.adapter, TaskLoRA):
        return nullcontext()
    return lm.adapter.dropping(share, [hash((config.seed, episode["index"])) & 0xFFFFFFFF for episode in episodes])


def build_lm(config: Config, model: str, device: torch.device) -> TaskLM:
    """Return the model, whole or sharded, with the hooks for the task adapters on it in mode adapters."""
    kind = config.model.dtype, config.model.attention
    module = zero.load(model, *kind, device) if config.engine == "zero" else load_base(model, *kind).to(device)
    if config.model.activation_checkpointing:
        checkpoint_activations(module)
    shape = config.lora.shape() if config.mode == "adapters" else {}
    lm = TaskLM(module, hooks(module, shape, config.soft_tokens))
    lm.try_out()
    return lm


def agreed_start(job: Job, lm: TaskLM) -> Params:
    """Return the start at step 0, the same on every worker: adapters come from the first, by its own arithmetic."""
    # All workers take the forwards of a sharded model together.
    share = ALONE if zero.is_sharded(next(lm.module.parameters())) else collective.share()
    start = untrained_start(job.config, lm, get(job.encoder), get(job.train), share)
    return collective.tensors_from_first_worker(start) if lm.adapter else start


def build_learner(config: Config, start: Params, factors: Mapping[str, float], device: torch.device) -> Learner:
    """Return a learner at step 0."""
    outer, inner, by_weight = config.outer, config.inner, config.algorithm.learned_rates == "weight"
    start = {name: weight.to(device) for name, weight in start.items()}
    return Learner(
        start,
        initial_log_inner_lrs(start, inner.lr, inner.modules, by_weight, factors),
        learn_rates=config.learns_inner_lrs,
        optimizer=outer.optimizer,
        lr=outer.lr,
        lr_of_inner_lr=outer.lr_of_inner_lr,
        weight_decay=outer.weight_decay,
        clip_norm=outer.clip_norm,
        schedule=outer_schedule(outer.schedule, outer.warmup_steps, outer.steps),
    )
