"""Distil a run into a smaller base: a student learns to answer, after adapting, as its teacher does after adapting.

In every episode the teacher adapts to the support by the run's own inner loop, and gives its logits at the query's
targets. The student adapts its own adapters to the same support by the labels. Its query loss is the divergence from
the teacher's probabilities, mixed with the loss by the labels (Hinton et al. 2015, arXiv 1503.02531).
To first order (`rayml.algorithms.meta_gradient`), the query's gradient at the student's fast weights updates its start,
its inner rates, and its layers, which the inner loop does not change.

The student consists of some of the teacher's layers, or is another model with the same tokenizer.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayml.algorithms.base import Minibatch
from rayml.algorithms.inner_loop import InnerLoop, Params, TaskLosses, adapt
from rayml.algorithms.meta_gradient import first_order
from rayml.algorithms.outer_loop import Learner, initial_log_inner_lrs, outer_schedule
from rayml.compression.command import Compressed, Distillation, base_folder, evenly_spaced, student_layers
from rayml.config import Config
from rayml.errors import ConfigError
from rayml.lm.batch import TaskBatch
from rayml.lm.catalog import resolve_model
from rayml.lm.frozen import decoder_layers
from rayml.lm.initialization import untrained_start
from rayml.lm.label_losses import token_losses
from rayml.lm.label_trie import IGNORE
from rayml.lm.load import DTYPES, load_base, load_tokenizer
from rayml.lm.lora import LAYER, is_in_layer, layer_number
from rayml.lm.model import TaskLM, hooks, mean_by_task
from rayml.lm.sides import side_batch
from rayml.model import MetaModel
from rayml.tasks.episodes import DISTILLATION_SEED
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.task import Task

INITIAL = "student"
"""The folder that a student is loaded from. Its files may be memory-mapped during training, so they stay in place."""


# The loss


@dataclass(frozen=True, slots=True)
class Teacher:
    """The part of a run that its student learns from."""

    lm: TaskLM
    start: Params
    inner_lrs: Params
    inner_steps: int

    def logits(self, support: TaskBatch, query: TaskBatch) -> Tensor:
        """Return the logits at the query's targets, `[M, V]`, after adapting to the support."""
        *_, adapted = adapt(
            partial(self.lm.losses, batch=support), self.start, self.inner_lrs, self.inner_steps, support.tasks
        )
        with torch.no_grad():
            return self.lm.target_logits(adapted.fast, query)[0]


def divergence(student: Tensor, teacher: Tensor, allowed: Tensor | None, temperature: float) -> Tensor:
    """Return the Kullback-Leibler divergence of the student from the teacher at M targets, `[M]` in fp32.

    It is scaled by the square of the temperature, so that gradients keep their size (Hinton et al. 2015, section 2).

    Args:
        student, teacher: logits `[M, V]`.
        allowed: the tokens to compare, as in `rayml.lm.label_losses.token_losses`; None for the vocabulary.
    """
    divergences = torch.zeros(len(student), device=student.device)
    is_limited = torch.zeros(len(student), dtype=torch.bool, device=student.device)
    if allowed is not None:
        is_limited = (allowed != IGNORE).any(1)
    for rows, choices in ((is_limited, allowed), (~is_limited, None)):
        if rows.any():
            logits = (side[rows].float() / temperature for side in (student, teacher))
            if choices is not None:
                ids = choices[rows]
                logits = (side.gather(1, ids.clamp(min=0)).masked_fill(ids == IGNORE, -1e9) for side in logits)
            log_student, log_teacher = (side.log_softmax(-1) for side in logits)
            kl = nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
            divergences = divergences.index_put((rows.nonzero().squeeze(1),), kl * temperature**2)
    return divergences


def query_losses(lm: TaskLM, batch: TaskBatch, teacher: Tensor, settings: Distillation, weights: Params) -> Tensor:
    """Return each task's mixed loss, `[T]`, under the tasks' weights."""
    logits, _ = lm.target_logits(weights, batch)
    soft = divergence(logits, teacher.to(logits.device), batch.allowed, settings.temperature)
    hard = token_losses(logits, batch.scored.targets, batch.allowed, known=batch.scored.among)
    return mean_by_task((1 - settings.hard) * soft + settings.hard * hard, batch)


def with_base_gradients(base: Params, gradients: Params, losses: TaskLosses) -> TaskLosses:
    """Return losses that also give the base's gradients when they are differentiated, from one backward.

    The backward happens when the losses are called: it takes the gradients of their sum for the fast weights, and for
    the base's weights, `[...]` each, which go to `gradients`. The returned losses have the same values, and are linear
    in the fast weights, with those gradients.
    """

    def linearized(fast: Params) -> Tensor:
        values = losses(fast)
        inputs = [*fast.values(), *base.values()]
        grads = torch.autograd.grad(values.sum(), inputs, materialize_grads=True)
        gradients.update(zip(base, grads[len(fast) :], strict=True))
        linear = [((w - w.detach()) * g).flatten(1).sum(1) for w, g in zip(fast.values(), grads, strict=False)]
        return values.detach() + torch.stack(linear).sum(0)

    return linearized


# Training


class Student:
    """A student in training: its layers' weights in fp32, and its learner with the start and inner rates."""

    def __init__(self, lm: TaskLM, learner: Learner, inner_steps: int, settings: Distillation):
        self.lm, self.learner, self.inner_steps, self.settings = lm, learner, inner_steps, settings
        self.base = {name: p.requires_grad_() for name, p in lm.module.named_parameters() if is_in_layer(name)}
        self.optimizer = torch.optim.AdamW(self.base.values(), lr=settings.lr, weight_decay=0.0)

    def step(self, teacher: Teacher, episodes: Sequence[dict[str, Any]], pad: int) -> dict[str, float]:
        """Take an outer step on encoded episodes; return its record."""
        sides = [side_batch(episodes, side, pad, self.lm.packs and teacher.lm.packs) for side in ("support", "query")]
        teacher_support, teacher_query = (batch.to(teacher.lm.device) for batch in sides)
        support, query = (batch.to(self.lm.device) for batch in sides)
        teacher_logits = teacher.logits(teacher_support, teacher_query)
        gradients: Params = {}
        losses = with_base_gradients(
            self.base, gradients, partial(query_losses, self.lm, query, teacher_logits, self.settings)
        )
        learner, weights = self.learner, torch.ones(len(episodes), device=self.lm.device)
        side_losses: dict[str, TaskLosses] = {"support": partial(self.lm.losses, batch=support), "query": losses}
        inner = InnerLoop(learner.inner_lrs, self.inner_steps, learns_inner_lrs=True)
        minibatches = [*[Minibatch("support", descends=True)] * self.inner_steps, Minibatch("query", 1.0)]
        meta = first_order(minibatches, side_losses, learner.start, inner, weights)
        tasks = len(episodes)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * learner.schedule(learner.step)
        for name, weight in self.base.items():
            weight.grad = gradients[name] / tasks
        nn.utils.clip_grad_norm_(self.base.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        means = [{name: gradient / tasks for name, gradient in part.items()} for part in (meta.start, meta.inner_lrs)]
        norm = learner.update(*means)
        return {"step": learner.step, "query_loss": float(meta.query_losses.mean()), "gradient_norm": norm}


def distill(
    model: MetaModel, base: str, name: str, settings: Distillation, folder: Path, progress: Callable[[], None]
) -> Compressed:
    """Teach a student on the run's meta-train tasks, and write its losses to `metrics.jsonl`.

    Raises:
        ConfigError: the student has too many layers, or another tokenizer.
    """
    tasks = prepare_splits(model.config.data).train
    config, lm, start, log_inner_lrs = make_student(model, base, name, folder, tasks)
    learner = Learner(
        {n: w.to(model.device) for n, w in start.items()},
        {n: w.to(model.device) for n, w in log_inner_lrs.items()},
        learn_rates=config.learns_inner_lrs,
        lr=config.outer.lr,
        lr_of_inner_lr=config.outer.lr_of_inner_lr,
        weight_decay=0.0,
        clip_norm=config.outer.clip_norm,
        schedule=outer_schedule("cosine", min(10, settings.steps // 10), settings.steps),
    )
    untrained = {n: w.clone() for n, w in start.items()}
    student = Student(lm, learner, config.inner.steps, settings)
    teacher = Teacher(model.lm, model.start, model.inner_lrs, config.inner.steps)
    sampler, encoder = config.data.sampler(DISTILLATION_SEED), model.encoder
    records = []
    for step in range(settings.steps):
        indices = range(step * config.tasks_per_step, (step + 1) * config.tasks_per_step)
        episodes = [encoder.episode(sampler.episode(tasks, index)) for index in indices]
        records.append(student.step(teacher, episodes, encoder.pad))
        progress()
    shutil.rmtree(folder / INITIAL, ignore_errors=True)
    lm.module.to(DTYPES[config.model.dtype]).save_pretrained(base_folder(folder))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Compressed(config, learner.start, learner.inner_lrs, untrained)


# The student


def make_student(
    model: MetaModel, base: str, name: str, folder: Path, tasks: Sequence[Task]
) -> tuple[Config, TaskLM, Params, Params]:
    """Return a student's config, its model with hooks, its start, and the logarithms of its inner rates.

    A student of the teacher's layers starts from the teacher's adapters; another model starts as in meta-training.
    """
    config, count = model.config, student_layers(name)
    if count is not None:
        total = model.lm.module.config.num_hidden_layers
        layers = evenly_spaced(total, count)
        write_student(base, layers, folder / INITIAL)
        if config.lora.last_layers is not None:  # those of the student's layers that are adapted in the teacher
            adapted = sum(layer >= total - config.lora.last_layers for layer in layers)
            lora = config.lora.model_copy(update={"last_layers": adapted})
            config = config.model_copy(update={"lora": lora})
        lm = student_lm(config, str(folder / INITIAL), model)
        log_inner_lrs = {n: rate.log() for n, rate in keep_layers(model.inner_lrs, layers).items()}
        return config, lm, keep_layers(model.start, layers), log_inner_lrs
    path = resolve_model(name)
    if load_tokenizer(path).get_vocab() != model.encoder.tokenizer.get_vocab():
        raise ConfigError(f"--distill {name}: reads other tokens than its teacher; expected a model of one family")
    lm = student_lm(config, path, model)
    start = untrained_start(config, lm, model.encoder, tasks)
    by_weight = config.algorithm.learned_rates == "weight"
    return config, lm, start, initial_log_inner_lrs(start, config.inner.lr, config.inner.modules, per_weight=by_weight)


def student_lm(config: Config, path: str, model: MetaModel) -> TaskLM:
    """Return a student on its teacher's device, in fp32 for training."""
    module = load_base(path, "float32", config.model.attention).to(model.device)
    return TaskLM(module, hooks(module, config.lora.shape(), config.soft_tokens))


def keep_layers(teacher: Params, layers: Sequence[int]) -> Params:
    """Return the adapters (or rates) of some of the teacher's layers, by their names in the student, and all that is
    outside of layers: a soft prompt, a readout."""
    numbers, kept = {layer: number for number, layer in enumerate(layers)}, {}
    for name, tensor in teacher.items():
        if not is_in_layer(name):
            kept[name] = tensor.clone()
        elif layer_number(name) in numbers:
            kept[LAYER.sub(f".{numbers[layer_number(name)]}.", name, count=1)] = tensor.clone()
    return kept


def write_student(base: str, kept: Sequence[int], folder: Path) -> None:
    """Write the teacher's base with the kept layers alone, in fp32: bfloat16 would round small steps to zero."""
    model = load_base(base, "float32")
    layers = decoder_layers(model)
    parent, _, name = next(name for name, module in model.named_modules() if module is layers).rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList([layers[layer] for layer in kept]))
    config = model.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    model.save_pretrained(folder)
