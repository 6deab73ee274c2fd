"""Distil a run into a smaller base: the student learns to answer, once adapted, as its adapted teacher does.

For every episode the teacher adapts to the support by the run's own inner loop, and says how probable it finds each
choice at the query's targets. The student adapts its own adapters to the same support by the labels, and its query loss
is the divergence from what the teacher said, mixed with the loss by the labels (Hinton et al. 2015, arXiv 1503.02531).
By first order (`rayml.algorithms.meta_gradient`): the query's gradient at the student's fast weights updates its start,
its inner rates, and its layers, which the inner loop leaves alone.

The student is some of the teacher's own layers, or another model that reads the same tokens.
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

from rayml.algorithms.base import Turn
from rayml.algorithms.inner_loop import InnerLoop, Params, TaskLosses, adapt
from rayml.algorithms.meta_gradient import first_order
from rayml.algorithms.outer_loop import Learner, initial_log_inner_lrs, outer_schedule
from rayml.compression.command import Compressed, Distillation, base_folder, evenly_spaced, wanted_layers
from rayml.config import Config
from rayml.errors import ConfigError
from rayml.lm.batch import TaskBatch
from rayml.lm.catalog import resolve_model
from rayml.lm.frozen import decoder_layers
from rayml.lm.initialization import untrained_start
from rayml.lm.label_losses import token_losses
from rayml.lm.label_trie import IGNORE
from rayml.lm.load import DTYPES, load_base, load_tokenizer
from rayml.lm.lora import LAYER, in_a_layer, layer_number
from rayml.lm.model import TaskLM, hooks, mean_by_task
from rayml.lm.sides import side_batch
from rayml.model import MetaModel
from rayml.tasks.episodes import DISTILLATION_SEED
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.task import Task

WORK = "student"
"""What a student is loaded from: its files may stay mapped while it is trained, so they are not written over."""


# The loss


@dataclass(frozen=True, slots=True)
class Teacher:
    """A run, as its student sees it."""

    lm: TaskLM
    start: Params
    inner_lrs: Params
    steps: int
    """Inner steps."""

    def logits(self, support: TaskBatch, query: TaskBatch) -> Tensor:
        """Return the logits at the query's targets, `[M, V]`, after adapting to the support."""
        *_, adapted = adapt(
            partial(self.lm.losses, batch=support), self.start, self.inner_lrs, self.steps, support.tasks
        )
        with torch.no_grad():
            return self.lm.target_logits(adapted.fast, query)[0]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Of the student's query loss."""

    temperature: float
    """Logits are divided by it, the teacher's and the student's, before they are compared."""
    hard: float
    """Weight of the loss by the labels; the divergence from the teacher has the rest."""


def divergence(student: Tensor, teacher: Tensor, allowed: Tensor | None, temperature: float) -> Tensor:
    """Return the Kullback-Leibler divergence of student from teacher at M targets, `[M]` in fp32.

    Times the square of the temperature, so that gradients stay of a size (Hinton et al. 2015, section 2).

    Args:
        student, teacher: logits `[M, V]`.
        allowed: as `rayml.lm.label_trie.token_losses` takes them: over these alone, or over the vocabulary.
    """
    found = torch.zeros(len(student), device=student.device)
    few = torch.zeros(len(student), dtype=torch.bool, device=student.device)
    if allowed is not None:
        few = (allowed != IGNORE).any(1)
    for rows, among in ((few, allowed), (~few, None)):
        if rows.any():
            sides = (side[rows].float() / temperature for side in (student, teacher))
            if among is not None:
                ids = among[rows]
                sides = (side.gather(1, ids.clamp(min=0)).masked_fill(ids == IGNORE, -1e9) for side in sides)
            ours, theirs = (side.log_softmax(-1) for side in sides)
            apart = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
            found = found.index_put((rows.nonzero().squeeze(1),), apart * temperature**2)
    return found


def query_losses(lm: TaskLM, batch: TaskBatch, teacher: Tensor, mixture: Mixture, weights: Params) -> Tensor:
    """Return each task's mixed loss, `[T]`, of a student under its tasks' weights."""
    logits, _ = lm.target_logits(weights, batch)
    soft = divergence(logits, teacher.to(logits.device), batch.allowed, mixture.temperature)
    hard = token_losses(logits, batch.scored.targets, batch.allowed, known=batch.scored.among)
    return mean_by_task((1 - mixture.hard) * soft + mixture.hard * hard, batch)


def also_for(base: Params, gradients: Params, losses: TaskLosses) -> TaskLosses:
    """Return the losses such that whoever differentiates them also gets the base's gradients, from one backward.

    What is returned has the losses' values and their gradients for the fast weights, which are taken here together with
    those of their sum for the base's weights, `[...]` each, which go to `gradients`.
    """

    def taken(fast: Params) -> Tensor:
        values = losses(fast)
        wanted = [*fast.values(), *base.values()]
        found = torch.autograd.grad(values.sum(), wanted, materialize_grads=True)
        gradients.update(zip(base, found[len(fast) :], strict=True))
        linear = [((w - w.detach()) * g).flatten(1).sum(1) for w, g in zip(fast.values(), found, strict=False)]
        return values.detach() + torch.stack(linear).sum(0)

    return taken


# Training


class Student:
    """A student in training: its layers' own weights in fp32, and what `learner` holds."""

    def __init__(self, lm: TaskLM, learner: Learner, steps: int, base_lr: float):
        self.lm, self.learner, self.steps, self.base_lr = lm, learner, steps, base_lr
        self.base = {name: p.requires_grad_() for name, p in lm.module.named_parameters() if in_a_layer(name)}
        self.optimizer = torch.optim.AdamW(self.base.values(), lr=base_lr, weight_decay=0.0)

    def step(
        self, teacher: Teacher, episodes: Sequence[dict[str, Any]], pad: int, mixture: Mixture
    ) -> dict[str, float]:
        """Take an outer step on encoded episodes; return its record."""
        sides = [side_batch(episodes, side, pad, self.lm.packs and teacher.lm.packs) for side in ("support", "query")]
        asked = [batch.to(teacher.lm.device) for batch in sides]
        support, query = (batch.to(self.lm.device) for batch in sides)
        soft, gradients = teacher.logits(*asked), dict[str, Tensor]()
        losses = also_for(self.base, gradients, partial(query_losses, self.lm, query, soft, mixture))
        learner, weights = self.learner, torch.ones(len(episodes), device=self.lm.device)
        of_sides: dict[str, TaskLosses] = {"support": partial(self.lm.losses, batch=support), "query": losses}
        inner = InnerLoop(learner.inner_lrs, self.steps, learns_inner_lrs=True)
        turns = [*[Turn("support", descends=True)] * self.steps, Turn("query", 1.0)]
        found = first_order(turns, of_sides, learner.start, inner, weights)
        tasks = len(episodes)
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * learner.schedule(learner.step)
        for name, weight in self.base.items():
            weight.grad = gradients[name] / tasks
        nn.utils.clip_grad_norm_(self.base.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean = [{name: gradient / tasks for name, gradient in part.items()} for part in (found.start, found.inner_lrs)]
        norm = learner.update(*mean)
        return {"step": learner.step, "query_loss": float(found.query_losses.mean()), "gradient_norm": norm}


def distilled(
    model: MetaModel, base: str, name: str, how: Distillation, folder: Path, progress: Callable[[], None]
) -> Compressed:
    """Teach a student on the run's meta-train tasks; `metrics.jsonl` gets its losses.

    Raises:
        ConfigError: a student of as many layers, or that reads other tokens.
    """
    tasks = prepare_splits(model.config.data).train
    config, lm, start, log_inner_lrs = student_of(model, base, name, folder, tasks)
    learner = Learner(
        {n: w.to(model.device) for n, w in start.items()},
        {n: w.to(model.device) for n, w in log_inner_lrs.items()},
        learn_rates=config.learns_inner_lrs,
        lr=config.outer.lr,
        lr_of_inner_lr=config.outer.lr_of_inner_lr,
        weight_decay=0.0,
        clip_norm=config.outer.clip_norm,
        schedule=outer_schedule("cosine", min(10, how.steps // 10), how.steps),
    )
    untrained = {n: w.clone() for n, w in start.items()}
    student = Student(lm, learner, config.inner.steps, how.lr)
    teacher = Teacher(model.lm, model.start, model.inner_lrs, config.inner.steps)
    sampler, encoder = config.data.sampler(DISTILLATION_SEED), model.encoder
    mixture, records = Mixture(how.temperature, how.hard), []
    for step in range(how.steps):
        drawn = range(step * config.tasks_per_step, (step + 1) * config.tasks_per_step)
        episodes = [encoder.episode(sampler.episode(tasks, index)) for index in drawn]
        records.append(student.step(teacher, episodes, encoder.pad, mixture))
        progress()
    shutil.rmtree(folder / WORK, ignore_errors=True)
    lm.module.to(DTYPES[config.model.dtype]).save_pretrained(base_folder(folder))  # the dtype that its run loads it in
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Compressed(config, learner.start, learner.inner_lrs, untrained)


# The student


def student_of(
    model: MetaModel, base: str, name: str, folder: Path, tasks: Sequence[Task]
) -> tuple[Config, TaskLM, Params, Params]:
    """Return a student's config, its model with hooks, and the start and logarithms of the rates that it begins with.

    Of the teacher's own layers it begins with the teacher's adapters; another model as meta-training would.
    """
    config, count = model.config, wanted_layers(name)
    if count is not None:
        total = model.lm.module.config.num_hidden_layers
        kept = KeptLayers(evenly_spaced(total, count))
        write_student(base, kept, folder / WORK)
        lora = config.lora.model_copy(update={"last_layers": kept.lora_layers(config, total)})
        config = config.model_copy(update={"lora": lora})
        lm = student_lm(config, str(folder / WORK), model)
        log_inner_lrs = {n: rate.log() for n, rate in kept.tensors(model.inner_lrs).items()}
        return config, lm, kept.tensors(model.start), log_inner_lrs
    path = resolve_model(name)
    if load_tokenizer(path).get_vocab() != model.encoder.tokenizer.get_vocab():
        raise ConfigError(f"--distill {name}: reads other tokens than its teacher; expected a model of one family")
    lm = student_lm(config, path, model)
    start = untrained_start(config, lm, model.encoder, tasks)
    by_weight = config.algorithm.learned_rates == "weight"
    return config, lm, start, initial_log_inner_lrs(start, config.inner.lr, config.inner.modules, per_weight=by_weight)


def student_lm(config: Config, path: str, model: MetaModel) -> TaskLM:
    """Return a student where its teacher lies, in fp32 to be trained."""
    module = load_base(path, "float32", config.model.attention).to(model.device)
    return TaskLM(module, hooks(module, config.lora.shape(), config.soft_tokens))


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """The teacher's layers that its student has, in order."""

    layers: list[int]

    def lora_layers(self, config: Config, total: int) -> int | None:
        """Return how many of the student's last layers are adapted: those whose original is."""
        last = config.lora.last_layers
        return None if last is None else sum(layer >= total - last for layer in self.layers)

    def tensors(self, teacher: Params) -> Params:
        """Return the kept layers' adapters (or rates), by their names in the student."""
        index = {layer: number for number, layer in enumerate(self.layers)}
        return {
            LAYER.sub(f".{index[layer_number(name)]}.", name, count=1): tensor.clone()
            for name, tensor in teacher.items()
            if layer_number(name) in index
        }


def write_student(base: str, kept: KeptLayers, folder: Path) -> None:
    """Write the teacher's base with the kept layers alone, in fp32: small steps would round to nothing in bfloat16."""
    model = load_base(base, "float32")
    layers = decoder_layers(model)
    parent, _, name = next(name for name, module in model.named_modules() if module is layers).rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList([layers[layer] for layer in kept.layers]))
    config = model.config
    config.num_hidden_layers = len(kept.layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept.layers]
    model.save_pretrained(folder)
