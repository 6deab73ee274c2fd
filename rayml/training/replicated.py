"""Meta-training where every worker holds all that is learned: adapters, or in mode full a model that fits.

Every worker adapts to its own tasks. One all-reduce per outer step sums their meta-gradients.
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
from rayml.lm.fine_tuning import inner_loss_transform, rate_factors
from rayml.lm.frozen import ALONE, KnownStates, compute_known_states, tensor_in_file
from rayml.lm.initialization import untrained_start
from rayml.lm.load import checkpoint_activations, load_base
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM, hooks
from rayml.lm.rows import TokenRow
from rayml.lm.scorer import Scorer
from rayml.lm.sides import TaskSide, trained_tokens, training_sides
from rayml.model import read_start
from rayml.runs.checkpoint import read_newest, write_state
from rayml.runs.folder import RunFolder
from rayml.tasks.episodes import relabel
from rayml.tasks.statistics import Curve
from rayml.tasks.task import Task
from rayml.training import collective
from rayml.training.stragglers import Heartbeat
from rayml.training.stream import DivergedError, Job, fetch_once

MIN_REPEATS = 2
"""How often an example must come back on average before its frozen states are worth keeping."""
MOST_IN_MEMORY, MOST_IN_FILE = 2 * 2**30, 16 * 2**30
"""The most bytes that those states may take on each worker."""


def room_for_states(like: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """Return an empty tensor of this shape, in a file if it is large; None if any worker has no room for it."""
    size = math.prod(shape) * like.element_size()
    if size <= MOST_IN_MEMORY:
        return like.new_empty(shape)
    states = None
    if size <= MOST_IN_FILE and has_disk_for(size * collective.world_size()):
        with suppress(OSError):
            states = tensor_in_file(like, shape)
    return states if all(collective.gather_from_workers(states is not None)) else None


def has_disk_for(size: int) -> bool:
    """Return whether the folder of temporary files is on a disk that has twice this many bytes free."""
    folder = Path(tempfile.gettempdir()).resolve()
    partitions = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    partition = max(partitions, key=lambda part: len(part.mountpoint), default=None)
    in_memory = partition is not None and partition.fstype in ("tmpfs", "ramfs")
    return not in_memory and shutil.disk_usage(folder).free > 2 * size


class Replicated:
    """One worker's state, and the three things it does: take a step, score episodes, write a checkpoint."""

    parts = 1
    """How many workers write a part of a checkpoint."""

    def __init__(self, job: Job, device: torch.device, heartbeat: Heartbeat):
        config = job.config
        self.config, self.device, self.heartbeat = config, device, heartbeat
        self.rank, self.workers = collective.rank(), collective.world_size()
        self.lm = build_lm(config, job.model, device)
        self.encoder = fetch_once(job.encoder)
        rows = repeated_rows(job, self.encoder) if self.lm.has_frozen_layers else []
        if rows:
            self.lm.known = self._compute_known_states(rows)
        heartbeat.doing("finding the start")
        start = agreed_start(job, self.lm)
        factors = rate_factors(self.lm.module, start, config.inner.layer_decay)
        self.learner = build_learner(config, start, factors, device)
        self.tasks = {task.name: index for index, task in enumerate(fetch_once(job.train))}
        self.gains = RecentGains(len(self.tasks), device)
        self.timer = StepTimer(device)

    def _compute_known_states(self, rows: Sequence[TokenRow]) -> KnownStates | None:
        """Return the rows' hidden states after the frozen layers, computed in shares; None if there is no room."""

        def report_progress(percent: int) -> None:
            self.heartbeat.doing(f"reading {len(rows)} training examples with the frozen layers, once: {percent} %")

        return compute_known_states(
            self.lm, rows, self.encoder.pad, collective.share(), report_progress, room_for_states
        )

    def begin(self, run: RunFolder) -> None:
        """Go on from the newest whole checkpoint; without one, save the untrained start for later comparison."""
        saved = read_newest(run.checkpoints) if self.rank == 0 else None
        step = collective.from_first_worker(saved.step if saved else None)
        if step is not None:
            tensors = collective.tensors_from_first_worker(saved.tensors if saved else {})
            self.learner.load(tensors, step)
            self.gains.gains.copy_(tensors["gains"])
            return
        old_run = self.config.run.continues
        if old_run:
            start, log_inner_lrs = read_start(RunFolder(old_run)) if self.rank == 0 else ({}, {})
            self.learner.warm_start(*map(collective.tensors_from_first_worker, (start, log_inner_lrs)))
        if self.rank == 0 and self.config.mode == "adapters":
            run.write_untrained(self.learner.start)

    @property
    def done(self) -> int:
        """Outer steps so far."""
        return self.learner.step

    def prepare(self, episodes: list[dict[str, Any]]) -> list[tuple[TaskSide, TaskSide]]:
        """Return supports and queries of a step's episodes, in groups of as many tasks as share a forward."""
        group_size = self.config.tasks_together
        groups = [episodes[first : first + group_size] for first in range(0, len(episodes), group_size)]
        sides = [training_sides(self.lm, group, self.encoder.pad, self.config) for group in groups]
        for side in chain.from_iterable(sides):
            side.prepare()
        return sides

    def step(
        self, episodes: list[dict[str, Any]], sides: Sequence[tuple[TaskSide, TaskSide]], waited: float
    ) -> dict[str, Any]:
        """Take an outer step with all workers, on their episodes; return its record.

        Args:
            sides: what `lay_out` returned for this worker's episodes.
            waited: seconds that this worker waited for them.

        Raises:
            DivergedError: a loss or gradient is not finite; raised on all workers together.
        """
        self.timer.begin()
        gradient, tokens = self._meta_gradient(episodes, sides)
        record = self._update(gradient, tokens, episodes, waited) | self.timer.record()
        if not math.isfinite(record["query_loss"] + record["gradient_norm"]):
            losses = zip(episodes, gradient.query_losses.tolist(), strict=True)
            raise DivergedError([episode["task"] for episode, loss in losses if not math.isfinite(loss)])
        return record

    def _task_indices(self, episodes: list[dict[str, Any]]) -> torch.Tensor:
        return torch.tensor([self.tasks[episode["task"]] for episode in episodes], device=self.lm.device)

    def _meta_gradient(
        self, episodes: list[dict[str, Any]], sides: Sequence[tuple[TaskSide, TaskSide]]
    ) -> tuple[MetaGradient, int]:
        """Return the meta-gradient of this worker's tasks, one group after the other, and the tokens it took."""
        config, learner, regularize = self.config, self.learner, self.config.regularize
        weights = torch.ones(len(episodes), device=self.lm.device)
        if config.data.weighting == "dynamic":
            weights = self.gains.weights()[self._task_indices(episodes)]
        gradients, tokens, first = [], 0, 0
        for support, query in sides:
            group = slice(first, first := first + support.batch.tasks)
            inner = InnerLoop(
                learner.inner_lrs,
                config.inner.steps,
                config.learns_inner_lrs,
                inner_loss_transform(support, config.inner.unfreeze_every, regularize.adversarial),
                after_steps=lambda: self.timer("inner"),
            )
            with lora_dropout(config, self.lm, episodes[group]):
                gradients.append(config.algorithm.meta_gradient(support, query, learner.start, inner, weights[group]))
            tokens += trained_tokens(config, support.batch, query.batch)
            self.timer("outer")
        return join_gradients(gradients), tokens

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
        gains: Sequence[torch.Tensor] = ()
        if self.config.data.weighting == "dynamic":
            gains = self.gains.by_task(self._task_indices(episodes), support - query)
        gradients = [*gradient.start.values(), *gradient.inner_lrs.values()]
        self.heartbeat(learner.step + 1)
        query_loss, support_loss, tokens, seconds, *rest = collective.sum_over_workers(
            [query.sum(), support.sum(), tokens, seconds, *gains, *gradients]
        )
        self.timer("communication")
        gains, gradients = rest[: len(gains)], [total / tasks for total in rest[len(gains) :]]
        query_loss, support_loss = query_loss / tasks, support_loss / tasks
        norm = math.nan
        if collective.all_finite([*gradients, query_loss]):
            start = dict(zip(gradient.start, gradients, strict=False))
            norm = learner.update(start, dict(zip(gradient.inner_lrs, gradients[len(start) :], strict=True)))
            if gains:
                self.gains.update(*gains)
        self.timer("outer")
        inner_lrs = torch.cat([rate.flatten() for rate in learner.log_inner_lrs.values()])
        record = {"step": learner.step, "query_loss": float(query_loss), "gradient_norm": norm, "tokens": int(tokens)}
        if gradient.support_losses is not None:
            record |= {"support_loss": float(support_loss), "inner_lr": float(inner_lrs.mean().exp())}
        return record | slowest_worker(seconds)

    def score(self, episodes: Sequence[Any]) -> list[Curve]:
        """Return the scores of this worker's episodes before and after adapting."""
        config, learner = self.config, self.learner
        scorer = Scorer(self.lm, self.encoder, config.algorithm, config.inner.steps, config.inner.unfreeze_every)
        # With a sharded base every worker must run the same number of forwards, so all episodes share one.
        group_size = len(episodes)
        if config.mode == "full" or (config.tasks_at_once and config.engine == "local"):
            group_size = config.tasks_together
        curves: list[Curve] = []
        for first in range(0, len(episodes), group_size):
            group = episodes[first : first + group_size]
            curves += scorer.curves(group, learner.start, learner.inner_lrs, only_ends=True)
        return curves

    def write(self, folder: Path) -> None:
        """Write this worker's part of a checkpoint. The first worker's part is all there is."""
        if self.rank < self.parts:
            write_state(folder, self.learner.state() | {"gains": self.gains.gains})


def repeated_rows(job: Job, encoder: Encoder) -> list[TokenRow]:
    """Return the rows of the tasks whose examples come back in `MIN_REPEATS` episodes or more, on average."""
    config, data = job.config, job.config.data
    validations = -(-config.outer.steps // config.validation.every) if job.val else 0  # the last step validates, too
    rows: list[TokenRow] = []
    for tasks, episodes in (
        (fetch_once(job.train), config.outer.steps * config.tasks_per_step),
        (fetch_once(job.val) if job.val else (), validations * config.validation.episodes),
    ):
        drawn = episodes * data.ways * (data.shots + data.queries)
        shows = config.algorithm.shows_examples(is_label=False)
        if not shows and drawn >= MIN_REPEATS * sum(len(task.examples) for task in tasks):
            for task in tasks:
                rows += task_rows(encoder.for_task(task.name, task.kind), task, data.labels)
    return rows


def task_rows(encoder: Encoder, task: Task, labels: str) -> list[TokenRow]:
    """Return what episodes read of a task: a row for each example, and for each label's own text, if it has those.

    Which letter stands for a label may differ, and how many of a label's tokens are read.
    """
    letter = "A" if task.options and labels == "letters" else None
    examples = [relabel(example, letter) for example in task.examples]
    rows, _ = encoder.support(examples, [letter] if letter else task.options)
    if encoder.is_masked:  # whose tokens all see each other: none is read after the mask but the suffix
        read = [[*row.tokens[: row.start], *row.suffix] for row in rows]
    elif not task.options:  # a text's last token predicts nothing
        read = [row.tokens[:-1] for row in rows]
    else:
        return rows
    return [TokenRow(tokens, len(tokens)) for tokens in read]


def slowest_worker(seconds: torch.Tensor) -> dict[str, Any]:
    """Return which worker was slowest in a step, and how many times the median it took; `seconds`: `[workers]`."""
    if len(seconds) == 1:
        return {}
    worker = int(seconds.argmax())
    return {"slowest_worker": worker, "slowest_factor": float(seconds[worker] / seconds.median())}


def join_gradients(gradients: Sequence[MetaGradient]) -> MetaGradient:
    """Return the meta-gradient of all tasks from those of groups of them."""
    if len(gradients) == 1:
        return gradients[0]
    starts, inner_lrs, support, query = zip(*gradients, strict=True)
    return MetaGradient(
        {name: sum(start[name] for start in starts) for name in starts[0]},
        {name: sum(rate[name] for rate in inner_lrs) for name in inner_lrs[0]},
        None if support[0] is None else torch.cat(support),
        torch.cat(query),
    )


def lora_dropout(config: Config, lm: TaskLM, episodes: Sequence[dict[str, Any]]) -> AbstractContextManager[None]:
    """Apply dropout to the adapters' inputs inside the block. Masks depend only on the run's seed and the episode."""
    rate = config.regularize.lora_dropout
    if not rate or not isinstance(lm.adapter, TaskLoRA):
        return nullcontext()
    return lm.adapter.dropping(rate, [hash((config.seed, episode["index"])) & 0xFFFFFFFF for episode in episodes])


def build_lm(config: Config, model: str, device: torch.device) -> TaskLM:
    """Return the model, whole or sharded; in mode adapters with the hooks of the task adapters."""
    dtype, attention = config.model.dtype, config.model.attention
    if config.engine == "zero":
        module = zero.load(model, dtype, attention, device)
    else:
        module = load_base(model, dtype, attention).to(device)
    if config.model.activation_checkpointing:
        checkpoint_activations(module)
    lora_shape = config.lora.shape() if config.mode == "adapters" else {}
    lm = TaskLM(module, hooks(module, lora_shape, config.soft_tokens))
    lm.probe()
    return lm


def agreed_start(job: Job, lm: TaskLM) -> Params:
    """Return the start at step 0: the first worker's adapters, since another CPU may compute other last digits."""
    # A sharded model's forwards need all workers, so each runs all of them. Of a whole one, each runs its share.
    share = ALONE if zero.is_sharded(next(lm.module.parameters())) else collective.share()
    start = untrained_start(job.config, lm, fetch_once(job.encoder), fetch_once(job.train), share)
    return collective.tensors_from_first_worker(start) if lm.adapter else start


def build_learner(config: Config, start: Params, factors: Mapping[str, float], device: torch.device) -> Learner:
    """Return a learner at step 0."""
    outer, inner, per_weight = config.outer, config.inner, config.algorithm.learned_rates == "weight"
    start = {name: weight.to(device) for name, weight in start.items()}
    return Learner(
        start,
        initial_log_inner_lrs(start, inner.lr, inner.modules, per_weight, factors),
        learn_rates=config.learns_inner_lrs,
        optimizer=outer.optimizer,
        lr=outer.lr,
        lr_of_inner_lr=outer.lr_of_inner_lr,
        weight_decay=outer.weight_decay,
        clip_norm=outer.clip_norm,
        schedule=outer_schedule(outer.schedule, outer.warmup_steps, outer.steps),
    )
