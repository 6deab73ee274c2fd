"""Meta-training of every parameter of a model that DeepSpeed ZeRO shards over the workers.

The counterpart of `replicated`: all workers adapt to the same task at a time, each with its share of the rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch

from rayml.algorithms.outer_loop import RecentGains
from rayml.lm import zero
from rayml.lm.batch import TaskBatch
from rayml.lm.scorer import EpisodeQueries, make_side
from rayml.lm.sides import on_device, side_batch, trained_tokens
from rayml.runs.checkpoint import newest_checkpoint
from rayml.runs.files import AnyPath, local_copy
from rayml.runs.folder import RunFolder
from rayml.tasks.episodes import Episode
from rayml.tasks.statistics import Curve
from rayml.training import collective
from rayml.training.full import FullLearner, NotFinite
from rayml.training.stragglers import Heartbeat
from rayml.training.stream import DivergedError, Job, fetch_once


class Sharded:
    """One worker's state, and the three things it does: take a step, score episodes, write a checkpoint."""

    def __init__(self, job: Job, device: torch.device, heartbeat: Heartbeat):
        self.config, self.device, self.heartbeat = job.config, device, heartbeat
        self.parts = collective.world_size()
        self.encoder = fetch_once(job.encoder)
        self.learner = FullLearner(zero.load_full(job.model, job.config, device), job.config)
        self.tasks = {task.name: index for index, task in enumerate(fetch_once(job.train))}
        self.gains = RecentGains(len(self.tasks))

    def begin(self, run: RunFolder) -> None:
        """Go on from the newest whole checkpoint."""
        folder = collective.on_first_worker(lambda: newest_checkpoint(run.checkpoints))
        if folder:
            with node_copy(folder) as here:
                self.gains.gains = torch.tensor(self.learner.load(here)["gains"])

    @property
    def done(self) -> int:
        """Outer steps so far."""
        return self.learner.outer_step

    def prepare(self, episodes: list[dict[str, Any]]) -> list[tuple[TaskBatch, TaskBatch]]:
        """Return supports and queries of a step's episodes, a batch for each task."""

        def batch(episode: dict[str, Any], side: str) -> TaskBatch:
            return on_device(side_batch([episode], side, self.encoder.pad), self.device)

        return [(batch(episode, "support"), batch(episode, "query")) for episode in episodes]

    def step(
        self, episodes: list[dict[str, Any]], sides: Sequence[tuple[TaskBatch, TaskBatch]], waited: float
    ) -> dict[str, Any]:
        """Take an outer step, task after task; return its record.

        Raises:
            DivergedError: a loss or gradient is not finite; raised on all workers together.
        """
        self.heartbeat(self.done + 1)  # now, since workers wait for each other in every layer
        task_indices = torch.tensor([self.tasks[episode["task"]] for episode in episodes])
        weights = self.gains.weights()[task_indices].tolist() if self.config.data.weighting == "dynamic" else None
        try:
            task_losses, gradient_norm = self.learner.step(sides, weights)
        except NotFinite as error:
            raise DivergedError([episodes[error.task]["task"]] if error.task is not None else []) from error
        gains = torch.tensor([before - after for before, after in task_losses])
        self.gains.update(*self.gains.by_task(task_indices, gains))
        support_loss, query_loss = torch.tensor(task_losses).mean(0).tolist()
        return {
            "step": self.done,
            "support_loss": support_loss,
            "query_loss": query_loss,
            "gradient_norm": gradient_norm,
            "tokens": sum(trained_tokens(self.config, support, query) for support, query in sides),
            **self.learner.timer.record(),
        }

    def score(self, episodes: Sequence[Episode]) -> list[Curve]:
        """Return the scores of episodes before and after adapting, one after the other.

        Raises:
            DivergedError: a loss or gradient is not finite; raised on all workers together.
        """
        curves = []
        for episode in episodes:
            queries = EpisodeQueries(self.learner.lm, self.encoder, [episode])
            support = make_side(self.learner.lm, self.encoder, [episode], "support").batch
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
    """Yield a local folder with a checkpoint's files. The workers of a node share one copy."""
    context = ray.train.get_context()
    node = context.get_node_rank()
    with local_copy(folder) if context.get_local_rank() == 0 else nullcontext() as copy:
        copies = {rank: path for rank, path in collective.gather_from_workers((node, copy)) if path}
        yield copies[node]
        collective.barrier()  # nobody reads it any more
