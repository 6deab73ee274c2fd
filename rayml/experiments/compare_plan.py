"""What a comparison would train, and about how long it would take."""

import time
from collections.abc import Sequence
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rayml.algorithms.inner_loop import expand, task_gradients
from rayml.config import Config
from rayml.experiments.method_runs import MethodRun, Request
from rayml.experiments.scorer import side_of
from rayml.model import untrained_model
from rayml.tasks.splits import Splits
from rayml.tasks.task import Task

START_SECONDS = 30
"""Of a training run's workers, about."""


def show_plan(method_runs: Sequence[MethodRun], base: Config, splits: Splits, request: Request, out: Console) -> None:
    """Print what would be trained and asked, and about how long it would take."""
    pace = seconds_per_token(base, splits.train)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("method", "seeds", "outer steps", "tokens a step", "tokens", "minutes a run"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    hours = 0.0
    for first in (method_run for method_run in method_runs if method_run.seed == 0 or method_run.is_given):
        seeds = 1 if first.is_given else sum(method_run.name == first.name for method_run in method_runs)
        minutes = (first.tokens * pace + START_SECONDS) / 60
        hours += seeds * minutes / 60 if first.trains else 0
        counts = first.config.outer.steps, first.tokens_per_step, first.tokens
        cells = [*map(str, counts)] if first.run else ["-"] * 3
        table.add_row(first.name, str(seeds), *cells, f"{minutes:.1f}" if first.trains else "-")
    out.print(table)
    tries = len(request.factors) * len(request.steps)
    for line in (
        f"adaptation: {tries} settings tried on {request.val_episodes} meta-val episodes; "
        f"asked: {request.episodes} episodes of each of {len(splits.test)} meta-test tasks",
        f"training about {hours:.1f} h on this machine, by one episode that was timed; choosing and asking come on top",
    ):
        out.print(line, highlight=False, soft_wrap=True)


def seconds_per_token(config: Config, tasks: Sequence[Task]) -> float:
    """Time the forward and backward of an episode's support here, in one process."""
    model = untrained_model(config, tasks)
    episode = config.data.sampler(config.seed).episode(tasks, 0)
    fast = expand(model.start, 1)
    seconds = 0.0
    for _ in range(2):  # the first warms up
        batch = side_of(model.lm, model.encoder, [episode], "support").batch
        began = time.perf_counter()
        task_gradients(partial(model.lm.losses, batch=batch), fast)
        seconds = time.perf_counter() - began
    return seconds / batch.tokens.numel()
