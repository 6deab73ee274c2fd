"""Ray Data turns a range of indices into tokenised episodes, as an ordered stream with one row for each episode.

Every worker has a stream of its own indices. One stream that Ray Data splits over the workers would lose which step a
row belongs to, and drops rows to make equal shares.
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
    import torch  # for types alone: the processes that make episodes must not load it

STEPS_AHEAD = 64
"""Steps whose episodes are made in one go, while the training takes those before."""
STEPS_PER_BLOCK = 16
Episodes = list[dict[str, Any]]


class EncodeEpisode:
    """Maps an index to its episode, tokenised. It pickles small: tasks and tokenizer stay in Ray's object store."""

    def __init__(self, tasks: ray.ObjectRef, encoder: ray.ObjectRef, sampler: Sampler):
        self.tasks, self.encoder, self.sampler = tasks, encoder, sampler

    def __call__(self, index: int) -> dict[str, Any]:
        return fetch_once(self.encoder).episode(self.sampler.episode(fetch_once(self.tasks), index))


@lru_cache(maxsize=8)
def fetch_once(reference: ray.ObjectRef) -> Any:
    """Return the object, which each process fetches only once."""
    return ray.get(reference)


def share_of_step(per_step: int, rank: int, workers: int) -> range:
    """Return which of a step's episodes are a worker's. If they do not divide evenly, some workers have one more."""
    return range(rank * per_step // workers, (rank + 1) * per_step // workers)


def worker_index(row: int, first: int, per_step: int, share: range) -> int:
    """Return the index of the episode at `row` of a worker's stream, which holds its share of every step."""
    return first + (row // len(share)) * per_step + share[row % len(share)]


def stream_steps(
    encode: EncodeEpisode, *, first: int, steps: int, per_step: int, rank: int, workers: int
) -> Iterator[list[dict[str, Any]]]:
    """Return this worker's episodes of each step, as `rayml.lm.encode.Encoder.episode` makes them.

    Work on the first ones starts at once, not when they are needed, so that it runs while the model loads.

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
        """Make all episodes of the `STEPS_AHEAD` steps after the first `done`; None if there are no more steps."""
        count = min(STEPS_AHEAD, steps - done)
        if count <= 0:
            return None
        rows = ray.data.range(count * len(share), override_num_blocks=-(-count // STEPS_PER_BLOCK))
        begin = first + done * per_step
        return rows.map(lambda row: encode(worker_index(row["id"], begin, per_step, share))).materialize()

    # Chunks are materialized whole. While a consumer throttles an execution, Ray Data's scheduling thread spins, and
    # takes the interpreter lock from the training that it feeds (three times slower, on two cores).
    thread = ThreadPoolExecutor(1)
    first_chunk = thread.submit(build, 0)

    def batches() -> Iterator[list[dict[str, Any]]]:
        next_chunk = first_chunk
        with thread:
            for done in range(0, steps, STEPS_AHEAD):
                chunk = next_chunk.result()
                next_chunk = thread.submit(build, done + STEPS_AHEAD)
                assert chunk is not None
                for batch in chunk.iter_batches(batch_size=len(share), batch_format="pyarrow"):
                    yield batch.to_pylist()  # type: ignore[union-attr]  # an Arrow table, by batch_format

    return batches()


def prefetch(
    steps: Iterator[Episodes], lay_out: Callable[[Episodes], Any], device: "torch.device"
) -> Iterator[tuple[Episodes, Any]]:
    """Yield each step's episodes, and `lay_out` of them, which is computed in a thread during the step before.

    An error in that thread is raised when its step is due.
    """

    def next_step() -> tuple[Episodes, Any] | None:
        episodes = next(steps, None)
        return None if episodes is None else (episodes, lay_out(episodes))

    def use_device() -> None:
        """Select the worker's GPU: a new thread starts with the first one."""
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, initializer=use_device) as thread:
        future = thread.submit(next_step)
        while (step := future.result()) is not None:
            future = thread.submit(next_step)
            yield step


@dataclass(frozen=True)
class Job:
    """What the driver passes to every worker. Tasks and tokenizer stay in Ray's object store."""

    config: Config
    model: str
    """The base's folder, as the driver resolved its name."""
    encoder: ray.ObjectRef
    train: ray.ObjectRef
    val: ray.ObjectRef | None
    heartbeats: Any
    """The actor of `rayml.training.heartbeat.Heartbeats`."""
    replayed: frozenset[str] = frozenset()
    """Names of the tasks that are replayed from the run that this one continues."""


class DivergedError(Exception):
    """A loss or gradient is not finite. It is raised on all workers together; `tasks` are those of such losses here."""

    def __init__(self, tasks: list[str]):
        super().__init__(tasks)
        self.tasks = tasks
