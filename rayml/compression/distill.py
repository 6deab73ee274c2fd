"""Distil a run into a smaller base: the student learns to answer, once adapted, as its adapted teacher does.

For every episode the teacher adapts to the support by the run's own inner loop, and says how probable it finds each
choice at the query's targets. The student adapts its own adapters to the same support by the labels, and its query loss
is the divergence from what the teacher said, mixed with the loss by the labels (Hinton et al. 2015, arXiv 1503.02531).
By first order (`rayml.algorithms.meta_gradient`): the query's gradient at the student's fast weights updates its start,
its inner rates, and its layers, which the inner loop leaves alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rayml.algorithms.base import Turn
from rayml.algorithms.inner_loop import InnerLoop, Params, TaskLosses, adapt
from rayml.algorithms.meta_gradient import first_order
from rayml.algorithms.outer_loop import Learner
from rayml.lm.batch import TaskBatch
from rayml.lm.label_trie import IGNORE, token_losses
from rayml.lm.lora import in_a_layer
from rayml.lm.model import TaskLM, mean_by_task
from rayml.lm.objective import side_batch


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
