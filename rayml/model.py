"""A meta-trained model in memory: load it, and let it learn tasks.

The command line, the server and `compare` all adapt through this module.
"""

import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from time import perf_counter
from typing import Any, TypeVar

import torch

from rayml.adaptation import adapt_requests, adaptation_request, inner_steps, new_task
from rayml.adapter import Adapter, new_folder, write_weights
from rayml.algorithms.inner_loop import Params
from rayml.algorithms.outer_loop import initial_log_inner_lrs
from rayml.config import Config
from rayml.errors import ConfigError, DataError, TrainingError
from rayml.lm import zero
from rayml.lm.abilities import refuse_misbehaving, refuse_peft_mismatch
from rayml.lm.catalog import resolve_model
from rayml.lm.encode import Encoder
from rayml.lm.fine_tuning import rate_factors
from rayml.lm.initialization import untrained_start
from rayml.lm.load import load_base as load_module
from rayml.lm.load import load_tokenizer
from rayml.lm.lora import linear_kinds
from rayml.lm.model import TaskLM, hooks
from rayml.lm.parameters import trained_parameters
from rayml.lm.peft_files import AdapterCard, encoder_of
from rayml.lm.precision import Precision, own_device, resolve_precision_here
from rayml.lm.scorer import Scorer
from rayml.lm.tokens import mark_embeddings
from rayml.runs.checkpoint import read_checkpoint, step_of
from rayml.runs.files import AnyPath, local_copy, local_output
from rayml.runs.folder import RunFolder
from rayml.tasks.read import Examples, rows_from_examples
from rayml.tasks.row import Row
from rayml.tasks.task import Task

log = logging.getLogger(__name__)
R = TypeVar("R")
AT_ONCE = 16
"""Most tasks in one batched inner loop."""


@dataclass(frozen=True, eq=False, repr=False)
class MetaModel:
    """A base model in memory with what a run learned: a start, from which a few inner steps learn a task.

    `load` and `train` return it. Adapters that it learns share its base.
    """

    config: Config
    """The config that the run was trained with."""
    lm: TaskLM
    """The base with the hooks that apply adapters."""
    encoder: Encoder
    """How examples are shown to the model."""
    base: str
    """Where the base was loaded from."""
    start: Params
    """The shared start, `[...]` each, in float32."""
    inner_lrs: Params
    """Inner rate of each tensor that the inner loop changes: `[]`, or with the tensor's own shape (Meta-SGD)."""
    step: int
    """Outer steps taken; 0 for an untrained start."""
    untrained: Params
    """The start that training began from."""
    precision: Precision
    """The dtype and attention that the base runs with here, and why; `config.model` has them, too."""
    run: RunFolder | None = None
    """The run that it was trained in; None for an untrained start."""
    checkpoint: str = "untrained"
    """Which checkpoint of the run this is, in words."""

    def __repr__(self) -> str:
        run = f" from {self.run.path}" if self.run else ""
        name = f"{self.config.model.name}, {self.config.algorithm.name}"
        return f"<MetaModel {name}, {self.checkpoint}{run}; .adapt([(input, target), ...]) learns a task>"

    @property
    def device(self) -> torch.device:
        return next(iter(self.start.values())).device

    def scorer(self) -> Scorer:
        """Return a scorer of episodes that uses the run's own algorithm."""
        inner = self.config.inner
        return Scorer(self.lm, self.encoder, self.config.algorithm, inner.steps, inner.unfreeze_every)

    def adapt(self, examples: Examples, *, name: str = "task", steps: int | None = None) -> Adapter:
        """Learn one new task from a few examples, in about a second.

        Args:
            examples: pairs `(input, target)`; dicts, such as `{"input", "target", "options"}`; a pandas DataFrame or a
                `datasets.Dataset` with such columns; or a path or URI as `data.path` takes it. An input is a text or a
                dict of fields; a target is a text, a list of labels, or a list of spans `{"text", "type"}`. Labels are
                your own. If the run was trained on label tasks, two or more different targets are taken for labels.
            name: the task's name.
            steps: number of inner steps; by default the run's `inner.steps`.

        Raises:
            DataError: examples that cannot be read or learned, or that belong to several tasks.
            TrainingError: the inner steps diverged.
        """
        return self.adapt_many({name: examples}, steps=steps)[name]

    @torch.enable_grad()
    def adapt_many(
        self, tasks: Mapping[str, Examples], *, steps: int | None = None, at_once: int = AT_ONCE
    ) -> dict[str, Adapter]:
        """Learn T tasks side by side, in one batched inner loop; each gets the same weights as on its own.

        Args:
            tasks: examples by the name of their task, in any form that `adapt` takes.
            steps: inner steps of each task; by default the run's.
            at_once: most tasks in one loop, to limit memory. In mode full tasks are learned one at a time.

        Raises:
            DataError, TrainingError: as `adapt`.
        """
        for name, number, least in (("steps", steps, 0), ("at_once", at_once, 1)):
            if number is not None and not (isinstance(number, Integral) and number >= least):
                raise ConfigError(f"{name}: expected a whole number, {least} or more, got {number}")
        steps = inner_steps(self, steps)
        new_tasks = [self.task(rows_from_examples(examples), name) for name, examples in tasks.items()]
        requests = [adaptation_request(self, task) for task in new_tasks]
        adapters: dict[str, Adapter] = {}
        at_once = at_once if self.lm.adapter else 1
        for first in range(0, len(requests), at_once):
            batch, began = requests[first : first + at_once], perf_counter()
            results = run_to_end(adapt_requests(self, batch, [steps] * len(batch)))
            seconds = perf_counter() - began
            for task, request, (weights, losses) in zip(new_tasks[first:], batch, results, strict=False):
                check_finite(task.name, weights)
                details = {"examples": len(task.examples), "losses": losses, "seconds": seconds}
                adapters[task.name] = self.adapter(weights, request.card, **details)
        return adapters

    def task(self, rows: Sequence[Row], name: str) -> Task:
        """Return rows as one task. Its targets are taken for labels if the run was trained on label tasks.

        Raises:
            DataError: rows of several tasks, or the same text with two labels.
        """
        if len({row.task for row in rows}) > 1:
            raise DataError(f"{name}: holds {len({row.task for row in rows})} tasks; adapt to one at a time")
        return new_task(rows, name, self.takes_labels, self.kind)

    @cached_property
    def takes_labels(self) -> bool:
        """Whether targets are taken for labels where rows do not say: the run was trained on label tasks."""
        return self.run.has_label_tasks() if self.run else True

    @cached_property
    def kind(self) -> str:
        """The kind of all tasks that the run was trained on; "" if there were several kinds."""
        return self.run.task_kind() if self.run else ""

    def adapter(self, weights: Params | None, card: AdapterCard, **told: Any) -> Adapter:
        """Return an adapter on this base, from its weights and its card.

        Args:
            told: other fields of the `Adapter`, if known: `examples`, `losses`, `seconds`, `encoder`.
        """
        on_device = {name: weight.to(self.lm.device) for name, weight in (weights or {}).items()} or None
        encoder = told.pop("encoder", None) or encoder_of(card, self.encoder.tokenizer)
        return Adapter(self.lm, encoder, on_device, card, self.base, **told)

    def save(self, folder: str | AnyPath) -> AnyPath:
        """Write the learned start for other libraries: a PEFT adapter, or, in mode full, the whole model.

        It is a starting point for the inner loop that the run was trained for, not an adapter to answer with.

        Raises:
            RunError: the folder exists already.
        """
        path, lora = new_folder(folder), self.config.lora_shape
        with local_output(path) as local:
            write_weights(local, self.lm, self.encoder, self.start, lora, self.base)
            refuse_peft_mismatch(local, self.lm, self.start, lora, self.base)
        return path


def load(run: str | AnyPath | RunFolder, *, checkpoint: str | None = None, every_linear: bool = False) -> MetaModel:
    """Load a run's base and what it learned, on this machine's GPU if there is one, else on its CPU.

    Args:
        run: the folder that `train` wrote, its URI, or a `RunFolder`; or a start by its name, such as `minilm`.
        checkpoint: "best" by meta-val, or "newest"; by default the best if there were validations, else the newest.
        every_linear: hook every linear, for adapters that change more linears than this run's (in mode adapters).

    Raises:
        RunError: there is no run, or no such checkpoint in it.
        ConfigError: its base cannot be loaded here.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    config, checkpoint_path = folder.trained(checkpoint)
    config, precision, lm, encoder, base = load_base(config, every_linear, folder.trained_dtype())
    if lm.adapter:
        untrained = {name: weight.to(lm.device) for name, weight in folder.read_untrained().items()}
    else:
        untrained = {n: p.detach().float() for n, p in trained_parameters(lm.module, config.full).items()}
    start, log_inner_lrs, step = read_learned(config, checkpoint_path, untrained, lm.device)
    inner_lrs = {name: rate.exp() for name, rate in log_inner_lrs.items()}
    described = folder.describe_checkpoint(checkpoint_path)
    return MetaModel(config, lm, encoder, base, start, inner_lrs, step, untrained, precision, folder, described)


def untrained_model(config: Config, tasks: Sequence[Task]) -> MetaModel:
    """Load a config's base, with the start and the inner rates that training on these tasks would begin with."""
    config, precision, lm, encoder, base = load_base(config)
    start = {name: weight.to(lm.device) for name, weight in untrained_start(config, lm, encoder, tasks).items()}
    factors = rate_factors(lm.module, start, config.inner.layer_decay)
    log_inner_lrs = initial_log_inner_lrs(
        start, config.inner.lr, config.inner.modules, per_weight=False, factors=factors
    )
    inner_lrs = {name: rate.exp() for name, rate in log_inner_lrs.items()}
    return MetaModel(config, lm, encoder, base, start, inner_lrs, 0, start, precision)


def load_base(
    config: Config, every_linear: bool = False, made_in: str | None = None
) -> tuple[Config, Precision, TaskLM, Encoder, str]:
    """Load a config's base, unsharded.

    Args:
        made_in: the dtype that the run was trained in.

    Returns:
        The config with the dtype and attention that the base was loaded with, why it has those, the base with its
        hooks, its encoder, and where it was loaded from.
    """
    device = own_device(config)
    base = resolve_model(config.model.name)
    config, precision = resolve_precision_here(config, base, device, made_in)
    if precision.warning:
        log.warning(precision.warning)
    module = load_module(base, config.model.dtype, config.model.attention).to(device)
    shape = config.lora.shape()
    if every_linear:
        shape |= {"targets": linear_kinds(module), "last_layers": None}
    lm = TaskLM(module, hooks(module, shape if config.mode == "adapters" else {}, config.soft_tokens))
    refuse_misbehaving(lm)
    tokenizer = load_tokenizer(base)
    mark_embeddings(tokenizer, module.get_input_embeddings().num_embeddings)
    return config, precision, lm, config.encoder(tokenizer), base


def read_learned(
    config: Config, folder: AnyPath, names: Iterable[str], device: torch.device
) -> tuple[Params, Params, int]:
    """Return a checkpoint's start, the logarithms of its inner rates, and its outer step.

    Args:
        names: the start's tensors, to select from a sharded checkpoint, which holds all parameters of the model.
    """
    if config.is_sharded:
        with local_copy(folder) as local:
            step, parameters = step_of(folder), zero.consolidate(local)
        start = {name: parameters[name].to(device) for name in names}
        return start, initial_log_inner_lrs(start, config.inner.lr, config.inner.modules, per_weight=False), step
    saved = read_checkpoint(folder)
    start, log_inner_lrs = (
        {key.removeprefix(prefix): t.to(device) for key, t in saved.tensors.items() if key.startswith(prefix)}
        for prefix in ("start/", "log_rate/")
    )
    return start, log_inner_lrs, saved.step


def read_start(run: RunFolder) -> tuple[Params, Params]:
    """Return what a run of adapters learned: its start, and the logarithms of its inner rates; on the CPU."""
    config, folder = run.trained()
    return read_learned(config, folder, (), torch.device("cpu"))[:2]


def check_finite(name: str, weights: Params) -> None:
    """Raise TrainingError if a task's weights are not finite."""
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise TrainingError(f"{name}: the adaptation diverged: its numbers are not finite; take fewer steps")


def run_to_end(loop: Generator[Any, None, R]) -> R:
    """Run a generator to its end, and return its return value."""
    while True:
        try:
            next(loop)
        except StopIteration as stop:
            return stop.value
