"""Mode full: meta-training of all weights under DeepSpeed ZeRO, by the minibatches of the config's algorithm.

All workers adapt to the same task at a time, each with its share of the rows. They cannot adapt to a task each: the
engine averages gradients over the workers in the inner loop, too, and a step on the mean of several tasks is not MAML.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rayml.algorithms.outer_loop import StepTimer, outer_schedule
from rayml.algorithms.phased_optimizer import IDLE, Phase, PhasedOptimizer, optimizer_steps
from rayml.config import Config
from rayml.errors import RunError, TrainingError
from rayml.lm.batch import TaskBatch
from rayml.lm.label_losses import token_losses
from rayml.lm.label_trie import IGNORE
from rayml.lm.model import TaskLM
from rayml.lm.zero import TAG, client_optimizer, set_clip_norm, step_was_skipped
from rayml.training import collective

MANIFEST = "full.json"
Result = TypeVar("Result")


class NotFinite(TrainingError):  # noqa: N818
    """A loss or gradient is not finite; raised on all workers together, before a step is taken on it.

    The weights may be those of a half-adapted task: go on from a checkpoint, or stop.
    """

    def __init__(self, outer_step: int, task: int | None, what: str):
        super().__init__(outer_step, task, what)
        self.outer_step, self.task, self.what = outer_step, task, what

    def __str__(self) -> str:
        where = "in validation" if self.task is None else f"in task {self.task} of the step"
        return f"outer step {self.outer_step}: a {self.what} is not finite, {where}"


class OuterStep(NamedTuple):
    """The result of an outer step; the same on every worker."""

    task_losses: list[tuple[float, float]]
    """Each task's loss at the first minibatch, and its query's loss at the last minibatch on the query."""
    gradient_norm: float
    """Of the mean meta-gradient."""


class FullLearner:
    """Meta-trains all weights; the counterpart of `rayml.algorithms.outer_loop.Learner`.

    Every worker must make the same calls with the same episodes.

    Args:
        engine: what `rayml.lm.zero.load_full` returned for the same config.
        config: algorithm, inner and outer loop.
    """

    def __init__(self, engine: Any, config: Config):
        outer = config.outer
        self.engine, self.config = engine, config
        self.optimizer: PhasedOptimizer = client_optimizer(engine)
        self.schedule = outer_schedule(outer.schedule, outer.warmup_steps, outer.steps)
        self.lm = TaskLM(engine, None)
        self.outer_step = 0
        """Outer steps so far; the engine itself counts inner steps."""
        self.timer = StepTimer(self.lm.device)
        self._task: int | None = None

    def step(
        self, episodes: Sequence[tuple[TaskBatch, TaskBatch]], weights: Sequence[float] | None = None
    ) -> OuterStep:
        """Take one outer step over the episodes' supports and queries; return its losses and the gradient's norm.

        Args:
            episodes: support and query of one task each, whole, and the same on every worker.
            weights: of the tasks, in the meta-gradient.

        Raises:
            NotFinite: a loss or gradient is not.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.outer.lr * self.schedule(self.outer_step)
        weights = weights or [1.0] * len(episodes)
        self.timer.begin()
        task_losses = []
        for self._task, (support, query) in enumerate(episodes):
            last = self._task == len(episodes) - 1
            task_losses.append(self._train(support, query, weights[self._task], len(episodes) if last else 0))
        self._task = None
        self.outer_step += 1
        squared_norm = torch.tensor(self.optimizer.squared_norm, device=self.lm.device)  # NCCL sums on GPUs alone
        (squared_norm,) = collective.sum_over_workers([squared_norm])
        return OuterStep(task_losses, math.sqrt(float(squared_norm)))

    def _train(self, support: TaskBatch, query: TaskBatch, weight: float, tasks: int) -> tuple[float, float]:
        """Take the minibatches of one task, and collect its meta-gradient; return the two losses of an `OuterStep`."""
        batches = {"support": support, "query": query}
        first_loss = query_loss = math.nan
        for index, step in enumerate(optimizer_steps(self.config.algorithm.minibatches(self.config.inner.steps))):
            phase, sides = step.phase, [(batches[name], part) for name, part in step.sides]
            clip = 0.0 if phase.descends else self.config.outer.clip_norm
            smoothing = self.config.regularize.label_smoothing
            loss = self.run_phase(sides, phase, step.share * weight, tasks if phase.restores else 0, clip, smoothing)
            first_loss = loss if index == 0 else first_loss
            query_loss = loss if "query" in dict(step.sides) or math.isnan(query_loss) else query_loss
            self.timer("outer" if phase.restores else "inner")
        return first_loss, query_loss

    def run_phase(
        self,
        sides: Sequence[tuple[TaskBatch, float]],
        phase: Phase,
        weight: float = 1.0,
        tasks: int = 0,
        clip_norm: float = 0.0,
        smoothing: float = 0.0,
    ) -> float:
        """Take the phase's step on the loss of some sides, each with its part; return the loss over all workers.

        `weight` and `tasks` are those of `PhasedOptimizer.enter`.
        """
        loss = share_loss(self.lm, share_of(sides), smoothing)
        (total,) = collective.sum_over_workers([loss.detach()])
        mean = float(total) / collective.world_size()
        if not math.isfinite(mean):
            raise NotFinite(self.outer_step + 1, self._task, "loss")
        self._step(loss, phase, weight, tasks, clip_norm)
        return mean

    def _step(self, loss: torch.Tensor, phase: Phase, weight: float, tasks: int, clip_norm: float) -> None:
        """Run the backward and the engine's step. The clip norm is set for this step alone: inner steps do not clip."""
        self.engine.backward(loss)
        self.optimizer.enter(phase, weight, tasks)
        set_clip_norm(self.engine, clip_norm)
        self.engine.step()
        self.optimizer.enter(IDLE)
        set_clip_norm(self.engine, 0.0)
        if step_was_skipped(self.engine):
            raise NotFinite(self.outer_step + 1, self._task, "gradient")

    def adapt_and_score(self, support: TaskBatch, score: Callable[[], Result]) -> tuple[Result, Result]:
        """Return the scores before and after adapting to one task. The weights are restored, bit for bit.

        Raises:
            NotFinite: a support loss or gradient is not; the weights are then not restored.
        """
        with torch.no_grad():
            before = score()
        for _ in range(self.config.inner.steps):
            self.run_phase([(support, 1.0)], Phase(descends=True))
        with torch.no_grad():
            after = score()
        # Only the engine's step refreshes the weights that the forward reads, and it needs a backward: a cheap one.
        logits = self.engine(input_ids=support.tokens[:1, :1], use_cache=False).logits
        self._step(0.0 * logits.float().sum(), Phase(restores=True), 1.0, 0, 0.0)
        return before, after

    def save(self, folder: str | Path, state: dict[str, Any] | None = None) -> None:
        """Write a checkpoint between outer steps: every worker its shards, and the first the manifest at the end.

        Args:
            folder: the same for all workers; or one folder each, whose files are later put together.
            state: what else `load` is to return.
        """
        client_state = (state or {}) | {"outer_step": self.outer_step}
        self.engine.save_checkpoint(str(folder), tag=TAG, client_state=client_state, save_latest=False)
        collective.barrier()
        if collective.rank() == 0:
            manifest = {"step": self.outer_step, "workers": collective.world_size(), "stage": self.config.zero.stage}
            (Path(folder) / MANIFEST).write_text(json.dumps(manifest))
        collective.barrier()

    def load(self, folder: str | Path) -> dict[str, Any]:
        """Go on exactly from a checkpoint, in a fresh engine, and return what was saved with it.

        Raises:
            RunError: it is not whole, or was saved with another number of workers or ZeRO stage.
        """
        workers, stage = collective.world_size(), self.config.zero.stage
        try:
            manifest = json.loads((Path(folder) / MANIFEST).read_text())
            saved_workers, saved_stage = manifest["workers"], manifest["stage"]
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{folder}: not a whole checkpoint of mode full: {error}") from error
        if (saved_workers, saved_stage) != (workers, stage):
            raise RunError(
                f"{folder}: shards of {saved_workers} workers at zero.stage={saved_stage} cannot be resumed by "
                f"{workers} at stage {stage}. Resume with those, or export the run and start a new one from the "
                "exported model"
            )
        _, state = self.engine.load_checkpoint(str(folder), tag=TAG)
        self.outer_step = state["outer_step"]
        return state


# One task's rows are divided over the workers such that the mean of the workers' gradients is the task's own.


class RowShare(NamedTuple):
    """A worker's rows of one task."""

    batch: TaskBatch
    scale: Tensor
    """`[rows]`: the factor on the sum of each row's token losses; 0 for a row that only fills in."""


def share_of(sides: Sequence[tuple[TaskBatch, float]]) -> RowShare:
    """Return this worker's rows of some sides of a task, each with its part in the loss: i, i + W, ... of W workers.

    The task's loss is a mean over all its targets, but the engine averages gradients over the workers, however many
    targets each of them has. So a row's sum of losses is scaled by part * W / (number of targets of its side). All
    workers must make the same calls, so a worker without a row takes the first one, scaled by 0.
    """
    for batch, _ in sides:
        if batch.tasks != 1:
            raise ValueError(
                f"mode full adapts to one task at a time, got {batch.tasks}: workers' gradients are averaged"
            )
    workers, rank = collective.world_size(), collective.rank()
    task_batch = join_sides([batch for batch, _ in sides])
    scales = [torch.full((len(b.tokens),), workers * part / int(b.loss_mask().sum())) for b, part in sides]
    scale = torch.cat(scales).to(task_batch.tokens.device)
    if rank < len(task_batch.tokens):
        rows = slice(rank, None, workers)
        return RowShare(task_batch.take(rows), scale[rows])
    return RowShare(task_batch.take(slice(0, 1)), torch.zeros_like(scale[:1]))


def share_loss(lm: TaskLM, share: RowShare, smoothing: float = 0.0) -> Tensor:
    """Return this worker's part of the loss; the mean over the workers is the task's own (`TaskLM.losses`)."""
    batch = share.batch
    logits, positions = lm.target_logits(None, batch)
    losses = token_losses(logits, batch.scored.targets, batch.allowed, smoothing, known=batch.scored.among)
    return (share.scale[positions // batch.tokens.shape[1]] * losses).sum()


def join_sides(sides: Sequence[TaskBatch]) -> TaskBatch:
    """Return the rows of some sides of one episode as one batch."""

    def join(tensors: Sequence[Tensor], fill: int) -> Tensor:
        width = max(tensor.shape[1] for tensor in tensors)
        return torch.cat([pad(tensor, (0, width - tensor.shape[1]), value=fill) for tensor in tensors])

    if len(sides) == 1:
        return sides[0]
    tokens, targets = join([side.tokens for side in sides], 0), join([side.targets for side in sides], IGNORE)
    allowed = [side.allowed for side in sides if side.allowed is not None]
    return TaskBatch(tokens, targets, 1, join(allowed, IGNORE) if allowed else None)
