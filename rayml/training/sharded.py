"""Meta-training of every parameter of a model that is sharded over the workers by DeepSpeed ZeRO.

All workers adapt to one task after another, each with its share of the rows: the counterpart of `replicated`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import ray.train
import torch

from rayml.algorithms.outer_loop import RecentGains
from rayml.lm import zero
from rayml.lm.batch import TaskBatch
from rayml.lm.scorer import Queries, side_of
from rayml.lm.sides import on_device, side_batch, trained_tokens
from rayml.runs.checkpoint import newest_checkpoint
from rayml.runs.files import AnyPath, local_copy
from rayml.runs.folder import RunFolder
from rayml.tasks.episodes import Episode
from rayml.tasks.statistics import Curve
from rayml.training import collective
from rayml.training.full import FullLearner, NotFinite
from rayml.training.stragglers import Heartbeat
from rayml.training.stream import DivergedError, Job, get


class Sharded:
    """The state of one worker, and the three things it does: take a step, score episodes, write a checkpoint."""

    def __init__(self, job: Job, device: torch.device, heartbeat: Heartbeat):
        self.config, self.device, self.heartbeat = job.config, device, heartbeat
        self.parts = collective.world_size()
        self.encoder = get(job.encoder)
        self.pad = self.encoder.pad
        self.learner = FullLearner(zero.load_full(job.model, job.config, device), job.config)
        self.tasks = {task.name: index for index, task in enumerate(get(job.train))}
        self.gains = RecentGains(len(self.tasks))

    def begin(self, run: RunFolder) -> None:
        """Go on from the newest whole checkpoint."""
        is_first = collective.rank() == 0
        folder = collective.from_first_worker(newest_checkpoint(run.checkpoints) if is_first else None)
        if folder:
            with node_copy(folder) as here:
                self.gains.gains = torch.tensor(self.learner.load(here)["gains"])

    @property
    def done(self) -> int:
        """Outer steps so far."""
        return self.learner.outer_step

    def lay_out(self, episodes: list[dict[str, Any]]) -> list[tuple[TaskBatch, TaskBatch]]:
        """Return the supports and the queries of a step's episodes, a task at a time."""

        def laid_out(episode: dict[str, Any], side: str) -> TaskBatch:
            return on_device(side_batch([episode], side, self.pad), self.device)

        return [(laid_out(episode, "support"), laid_out(episode, "query")) for episode in episodes]

    def step(
        self, episodes: list[dict[str, Any]], sides: Sequence[tuple[TaskBatch, TaskBatch]], waited: float
    ) -> dict[str, Any]:
        """Take an outer step, task after task; return its record. All wait for the slowest in every layer.

        Raises:
            DivergedError: a loss or gradient is not finite; on all workers together.
        """
        self.heartbeat(self.done + 1)
        task_indices = torch.tensor([self.tasks[episode["task"]] for episode in episodes])
        weights = self.gains.weights()[task_indices].tolist() if self.config.data.weighting == "dynamic" else None
        try:
            found = self.learner.step(sides, weights)
        except NotFinite as error:
            raise DivergedError([episodes[error.task]["task"]] if error.task is not None else []) from error
        gains = torch.tensor([before - after for before, after in found.task_losses])
        counts, sums = torch.zeros(2, len(self.tasks))
        self.gains.update(
            sums.index_add(0, task_indices, gains), counts.index_add(0, task_indices, torch.ones(len(task_indices)))
        )
        means = torch.tensor(found.task_losses).mean(0).tolist()
        losses = {"support_loss": means[0], "query_loss": means[1]}
        tokens = sum(trained_tokens(self.config, *both) for both in sides)
        phases = self.learner.timer.record()
        return {"step": self.done, **losses, "gradient_norm": found.gradient_norm, "tokens": tokens, **phases}

    def score(self, episodes: Sequence[Episode]) -> list[Curve]:
        """Return the scores of episodes before and after adapting, one after the other.

        Raises:
            DivergedError: a loss or gradient is not finite; on all workers together.
        """
        curves = []
        for episode in episodes:
            queries = Queries(self.learner.lm, self.encoder, [episode])
            support = side_of(self.learner.lm, self.encoder, [episode], "support").batch
            try:
                before, after = self.learner.adapt_and_score(support, partial(queries.scores, None))
            except NotFinite as error:
                raise DivergedError([episode.task]) from error
            curves.append(Curve(episode.task, episode.index, bool(episode.labels), [*before, *after]))
        return curves

    def write(self, folder: Path) -> None:
        """Write this worker's part of a checkpoint; every worker has one."""
        self.learner.save(folder, {"gains": self.gains.gains.tolist()})


@contextmanager
def node_copy(folder: AnyPath) -> Iterator[Path]:
    """Yield a folder of this machine with a checkpoint's files, of which the workers of a node have one copy."""
    context = ray.train.get_context()
    with local_copy(folder) if context.get_local_rank() == 0 else nullcontext() as own:
        copies = dict(filter(itemgetter(1), collective.gather_from_workers((context.get_node_rank(), own))))
        yield copies[context.get_node_rank()]
        collective.gather_from_workers(None)  # nobody reads it any more
