"""Ray Data: an index range becomes tokenised episodes, streaming and in order, one row an episode.

Every worker streams its own indices. Ray Data's split of one stream over workers keeps neither the step that a row
belongs to nor, where it must be equal, every row; a stream per worker keeps both, whatever the number of workers.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import ray
import ray.data

from rayml.config import Config
from rayml.tasks.episodes import Sampler

if TYPE_CHECKING:
    import torch  # no more than that: the workers that make episodes do without

STEPS_AHEAD = 64
STEPS_PER_BLOCK = 16
Episodes = list[dict[str, Any]]


class EncodeEpisode:
    """Maps an index to its episode, tokenised. Light to pickle: tasks and tokenizer stay in Ray's object store."""

    def __init__(self, tasks: ray.ObjectRef, encoder: ray.ObjectRef, sampler: Sampler):
        self.tasks, self.encoder, self.sampler = tasks, encoder, sampler

    def __call__(self, index: int) -> dict[str, Any]:
        return get(self.encoder).episode(self.sampler.episode(get(self.tasks), index))


@lru_cache(maxsize=8)
def get(reference: ray.ObjectRef) -> Any:
    """Return the object, fetched once a process."""
    return ray.get(reference)


def share_of_step(per_step: int, rank: int, workers: int) -> range:
    """Return a worker's episodes among those of a step; where they do not divide, some workers have one more."""
    return range(rank * per_step // workers, (rank + 1) * per_step // workers)


def worker_index(row: int, first: int, per_step: int, share: range) -> int:
    """Return the episode at `row` of a worker's stream: step by step, its share of the step's episodes."""
    return first + (row // len(share)) * per_step + share[row % len(share)]


def stream_steps(
    encode: EncodeEpisode, *, first: int, steps: int, per_step: int, rank: int, workers: int
) -> Iterator[list[dict[str, Any]]]:
    """Return this worker's episodes of each step, as `rayml.lm.encode.Encoder.episode` made them.

    The first ones are begun at once, not when they are asked for: meanwhile the model loads.

    Args:
        first: index of the first episode of the first step.
        steps: number of steps.
        per_step: episodes in a step, over all workers.
    """
    share = share_of_step(per_step, rank, workers)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    def build(done: int) -> ray.data.Dataset | None:
        """Build the episodes of the next steps, to the end, beside the training."""
        taken = min(STEPS_AHEAD, steps - done)
        if taken <= 0:
            return None
        rows = ray.data.range(taken * len(share), override_num_blocks=-(-taken // STEPS_PER_BLOCK))
        begin = first + done * per_step
        return rows.map(lambda row: encode(worker_index(row["id"], begin, per_step, share))).materialize()

    # A part at a time: while its consumer holds an execution back, Ray Data's scheduling thread spins, and takes the
    # interpreter lock from the training that it feeds (three times slower, on two cores).
    ahead = ThreadPoolExecutor(1)
    begun = ahead.submit(build, 0)

    def parts() -> Iterator[list[dict[str, Any]]]:
        part = begun
        with ahead:
            for done in range(0, steps, STEPS_AHEAD):
                ready = part.result()
                part = ahead.submit(build, done + STEPS_AHEAD)
                assert ready is not None
                for batch in ready.iter_batches(batch_size=len(share), batch_format="pyarrow"):
                    yield batch.to_pylist()  # type: ignore[union-attr]  # an Arrow table, as asked for

    return parts()


def one_ahead(
    steps: Iterator[Episodes], lay_out: Callable[[Episodes], Any], device: "torch.device"
) -> Iterator[tuple[Episodes, Any]]:
    """Yield each step's episodes and what `lay_out` makes of them: a step's are made while the one before it is taken.

    What making them raises is raised when they are asked for.
    """

    def one() -> tuple[Episodes, Any] | None:
        episodes = next(steps, None)
        return None if episodes is None else (episodes, lay_out(episodes))

    def begin() -> None:
        """Be on the worker's own GPU: a thread begins on the first one."""
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, initializer=begin) as thread:
        coming = thread.submit(one)
        while (ready := coming.result()) is not None:
            coming = thread.submit(one)
            yield ready


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker. Tasks and tokenizer stay in Ray's object store."""

    config: Config
    model: str
    """Resolved by the driver."""
    encoder: ray.ObjectRef
    train: ray.ObjectRef
    val: ray.ObjectRef | None
    heartbeats: Any
    """The actor that knows how far every worker is."""
    replayed: frozenset[str] = frozenset()
    """Names of the old run's tasks, where this one continues another."""


class DivergedError(Exception):
    """A loss or gradient is not finite: raised on all workers together, with this one's tasks of such a loss."""

    def __init__(self, tasks: list[str]):
        super().__init__(tasks)
        self.tasks = tasks
