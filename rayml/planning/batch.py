"""What goes through the model in one forward and backward, at most: rows, their length, and how often."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayml.config import Config
from rayml.lm.batch import readings
from rayml.lm.encode import decode_rows

WITHOUT_INNER_LOOP = {"multitask", "metaicl", "protonet"}


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
    return 0 if config.algorithm.name in WITHOUT_INNER_LOOP else config.inner.steps


def episode_rows(config: Config) -> tuple[int, int]:
    """Return the support and query rows of an episode: the worst case, since a task may have fewer classes."""
    return config.data.ways * config.data.shots, config.data.ways * config.data.queries


def tasks_at_once(config: Config) -> int:
    """Return the tasks that a worker adapts side by side; mode full takes them one by one."""
    return config.tasks_per_worker if config.mode == "adapters" else 1


def largest_pass(config: Config, target_tokens: int) -> Pass:
    """Return one worker's largest pass, with every row as long as `data.max_tokens` allows.

    Under mode full and engine zero the workers share a task's rows. MetaICL has the support in each query's prompt;
    prototypes put both sides into one graph, and score hidden states instead of logits. Multi-task learning puts both
    into one in mode full.
    """
    support, query = episode_rows(config)
    name, length = config.algorithm.name, config.data.max_tokens + config.soft_tokens
    rows = max(support, query) if inner_steps(config) or name == "multitask" else query
    if name == "metaicl":
        length *= support + 1
    if name == "protonet" or (name == "multitask" and config.mode == "full"):
        rows = support + query
    if config.mode == "full" and config.engine == "zero":
        rows = math.ceil(rows / config.fewest_workers)
    rows *= tasks_at_once(config)
    return Pass(rows, length, 0 if name == "protonet" else rows * target_tokens)


def tokens_per_step(config: Config) -> int:
    """Return the tokens that go forward and backward in an outer step over all workers, padding included."""
    support, query = episode_rows(config)
    of_support, of_query = passes(config)
    shown = 1 + support * (config.algorithm.name == "metaicl")
    return config.tasks_per_step * (of_support * support + of_query * query * shown) * config.data.max_tokens


def passes(config: Config) -> tuple[int, int]:
    """Return how often an outer step runs forward and backward over an episode's support, and over its query."""
    steps = config.inner.steps
    return {
        "metaicl": (0, 1),  # the support is in the query's rows
        "multitask": (1, 1),
        "protonet": (1, 1),
        "reptile": ((steps + 1) // 2, steps // 2),  # the sides take turns
    }.get(config.algorithm.name, (steps, 1))


def trained_tokens(config: Config, episodes: Sequence[dict[str, Any]]) -> int:
    """Return the tokens, without padding, that an outer step on these episodes runs forward and backward."""
    support, query = (
        sum(len(one.tokens) for e in episodes for one in readings(decode_rows(e[side]), e["labels"]))
        for side in ("support", "query")
    )
    of_support, of_query = passes(config)
    return of_support * support + of_query * query
