"""What goes through the model in one forward and backward, at most: rows, their length, and how often."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayml.algorithms.base import batches
from rayml.config import Config
from rayml.lm.batch import readings
from rayml.lm.encode import decode_rows


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows of one worker that share a graph, and what is scored of them."""

    rows: int
    row_tokens: int
    scored_tokens: int
    """Positions with logits, over all rows."""

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


def inner_steps(config: Config) -> int:
    """Return the inner steps of an episode in training."""
    return config.algorithm.inner_steps(config.inner.steps)


def episode_rows(config: Config) -> tuple[int, int]:
    """Return the support and query rows of an episode: the worst case, since a task may have fewer classes."""
    return config.data.ways * config.data.shots, config.data.ways * config.data.queries


def tasks_at_once(config: Config) -> int:
    """Return the tasks that a worker adapts side by side; mode full takes them one by one."""
    return config.tasks_per_worker if config.mode == "adapters" else 1


def largest_pass(config: Config, target_tokens: int) -> Pass:
    """Return one worker's largest pass, with every row as long as `data.max_tokens` allows.

    Under mode full and engine zero the workers share a task's rows, and turns at the same weights share a batch. What
    keeps the support has it in each query's prompt, or puts both sides into one graph; what is learned by hidden states
    alone scores no logits.
    """
    support, query = episode_rows(config)
    algorithm, length = config.algorithm, config.data.max_tokens + config.soft_tokens
    turns = algorithm.turns(config.inner.steps)
    of_side = {"support": support, "query": query}
    if config.mode == "full":
        rows = max(sum(of_side[turn.side] for turn in together) for together in batches(turns))
    else:
        rows = max(of_side[turn.side] for turn in turns)
    if algorithm.keeps == "prompt":
        length *= support + 1
    if algorithm.keeps_states:
        rows = support + query
    if config.mode == "full" and config.engine == "zero":
        rows = math.ceil(rows / config.fewest_workers)
    rows *= tasks_at_once(config)
    return Pass(rows, length, rows * target_tokens if algorithm.by_tokens else 0)


def tokens_per_step(config: Config) -> int:
    """Return the tokens that go forward and backward in an outer step over all workers, padding included."""
    support, query = episode_rows(config)
    of_support, of_query = passes(config)
    shown = 1 + support * (config.algorithm.keeps == "prompt")
    return config.tasks_per_step * (of_support * support + of_query * query * shown) * config.data.max_tokens


def passes(config: Config) -> tuple[int, int]:
    """Return how often an outer step runs forward and backward over an episode's support, and over its query."""
    return config.algorithm.passes(config.inner.steps)


def trained_tokens(config: Config, episodes: Sequence[dict[str, Any]]) -> int:
    """Return the tokens, without padding, that an outer step on these episodes runs forward and backward."""
    support, query = (
        sum(len(one.tokens) for e in episodes for one in readings(decode_rows(e[side]), e["labels"]))
        for side in ("support", "query")
    )
    of_support, of_query = passes(config)
    return of_support * support + of_query * query
