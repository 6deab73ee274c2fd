"""A whole outer step of a large model on one device, as training takes it; its memory beside what `rayml plan` says."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from benchmark import disturbed, random_episodes, random_model
from benchmark_machine import measured_flops, peak_bytes, timed

from gpu_steps.bench import Bench
from gpu_steps.sizes import config_of, folder
from rayml.algorithms.inner_loop import InnerLoop
from rayml.algorithms.outer_loop import Learner
from rayml.config import Config
from rayml.lm.load import checkpoint_activations
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.sides import TaskSide
from rayml.planning.memory import plan_memory
from rayml.planning.shape import read_shape
from rayml.training.replicated import build_learner


def run(bench: Bench) -> None:
    size = bench.size
    path = folder(bench.scratch, size.large, size.dtype, bench.device, weights=False)
    config = config_of(size, path, size.large_tasks)
    model = random_model(size.large, config, bench.device)
    held = sum(weight.nbytes for weight in model.parameters())
    lora = TaskLoRA(model, **config.lora.shape())
    lm = TaskLM(model, lora)
    learner = build_learner(config, disturbed(lora, 0), {}, bench.device)
    episodes = random_episodes(config, model)
    tokens = episodes.tokens(config.inner.steps)
    for checkpointing in (False, True):
        case = {"model": size.large, "tasks": size.large_tasks, "checkpointing": checkpointing}
        planned = config_of(size, path, size.large_tasks, activation_checkpointing=checkpointing)
        if checkpointing:
            checkpoint_activations(model)
        with bench.attempt("outer step", **case):

            def step() -> Any:
                support, query = (
                    TaskSide(lm, tasks, episodes.labels, [()] * len(tasks), 0)
                    for tasks in (episodes.support, episodes.query)
                )
                return outer_step(config, learner, support, query, bench.device)

            step()
            seconds = [timed(step, bench.device) for _ in range(size.repeats)]
            found = plan(planned)
            most, rate = peak(held, step, bench.device), tokens / statistics.median(seconds)
            numbers = {"seconds": seconds, "tokens": tokens, "tokens_per_second": rate, "peak_bytes": most}
            bench.record("outer step", **case, **numbers, **found)
        if not checkpointing:
            with bench.attempt("outer step's FLOPs", **case):
                bench.record("outer step's FLOPs", **case, flops=measured_flops(step))


def outer_step(config: Config, learner: Learner, support: TaskSide, query: TaskSide, device: torch.device) -> float:
    """Take one, as `rayml.training.replicated` does; return the norm of its gradient."""
    tasks = len(support.tasks)
    inner = InnerLoop(learner.inner_lrs, config.inner.steps, config.learns_inner_lrs)
    weights = torch.ones(tasks, device=device)
    gradient = config.algorithm.meta_gradient(support, query, learner.start, inner, weights)
    start, inner_lrs = ({name: g / tasks for name, g in of.items()} for of in (gradient.start, gradient.inner_lrs))
    return learner.update(start, inner_lrs)


def peak(held: int, step: Callable[[], Any], device: torch.device) -> int:
    """Return the most that is allocated at a time, the model's `held` bytes and all that is learned included."""
    beyond = peak_bytes(step, device)
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else held + beyond


def plan(config: Config) -> dict[str, Any]:
    found = plan_memory(read_shape(config), config)
    return {"planned_bytes": found.device_bytes, "planned": {part.name: part.device_bytes for part in found.parts}}
