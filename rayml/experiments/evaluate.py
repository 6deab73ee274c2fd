"""Did meta-training help? The same episodes of held-out tasks, from the meta-trained and from an untrained start."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayml.experiments.answers import LearnedMethod, Setting, label_answers, text_answers
from rayml.experiments.metrics import scores, span_report
from rayml.experiments.scorer import Curve, Outputs, Scorer, curves_of
from rayml.experiments.statistics import by_task, intervals
from rayml.lm.layerwise import rate_factors
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.experiments.parts import Parts
    from rayml.model import MetaModel


@dataclass(frozen=True)
class Evaluation:
    """Curves of the same episodes, in the same order, from both starts."""

    trained: list[Curve]
    untrained: list[Curve]
    answered: list["Answered"]
    """From the trained start."""

    def add(self, part: "Evaluation") -> None:
        self.trained.extend(part.trained)
        self.untrained.extend(part.untrained)
        self.answered.extend(part.answered)


@dataclass(frozen=True)
class Answered:
    """What was answered to one episode's queries (`rayml.experiments.answers`), before adapting and after."""

    task: str
    kind: str
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


def evaluate(
    model: "MetaModel",
    tasks: Sequence[Task],
    sampler: Sampler,
    episodes: int,
    parts: "Parts",
    progress: Callable[[int], None],
) -> Evaluation:
    """Adapt to `episodes` episodes of each task from both starts, by the run's own algorithm and inner steps.

    Every task gets the same number of episodes. The untrained start's rates are those that training began with:
    `inner.lr`, less by `inner.layer_decay`. What `parts` holds already is not done again. `progress` is told after each
    few episodes how many are done.
    """
    inner = model.config.inner
    factors = rate_factors(model.lm.module, model.inner_lrs, inner.layer_decay)
    inner_lrs = {n: torch.tensor(inner.lr * factors.get(n, 1.0), device=model.device) for n in model.inner_lrs}
    found = Evaluation([], [], [])
    scorer = model.scorer()
    for batch in batches(model, tasks, sampler, episodes):
        known = parts.next()
        if known:
            found.add(known)
            progress(len(batch))
            continue
        prepared, at = scorer.prepare(batch), range(scorer.steps + 1)
        points = list(scorer.outputs(prepared, model.start, model.inner_lrs, at))
        # Before the first outer step the two starts are one.
        other = list(scorer.outputs(prepared, model.untrained, inner_lrs, at)) if model.step else points
        part = Evaluation(
            curves_of(batch, points),
            curves_of(batch, other),
            list(answered(model, scorer, batch, points)),
        )
        parts.keep(part)
        found.add(part)
        progress(len(batch))
    return found


def answered(
    model: "MetaModel", scorer: Scorer, episodes: Sequence[Episode], points: Sequence[Outputs]
) -> Iterator[Answered]:
    """Yield the answers to episodes: of labels, from what was made of the queries; texts are written, both times."""
    method = LearnedMethod(scorer, model.start, model.inner_lrs)
    asked = replace(method, takes_support=False)
    for index, episode in enumerate(episodes):
        if episode.labels:
            ends = [label_answers(episode, points[k][index]) for k in (0, -1)]
        else:
            ends = [
                text_answers(asked, episode, Setting()),
                text_answers(method, episode, Setting(steps=scorer.steps)),
            ]
        yield Answered(episode.task, episode.kind, *ends)


def trained_curves(
    model: "MetaModel",
    tasks: Sequence[Task],
    sampler: Sampler,
    episodes: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Curve]:
    """Return the curves of the same episodes from the trained start alone; `progress` is told how many were adapted."""
    scorer, found = model.scorer(), []
    for batch in batches(model, tasks, sampler, episodes):
        found += scorer.curves(batch, model.start, model.inner_lrs)
        progress(len(batch))
    return found


def batches(model: "MetaModel", tasks: Sequence[Task], sampler: Sampler, episodes: int) -> Iterator[list[Episode]]:
    """Yield `episodes` episodes of each task, as many at a time as a worker adapts side by side."""
    at_a_time = model.config.tasks_per_worker if model.lm.adapter else 1
    for task in tasks:
        for first in range(0, episodes, at_a_time):
            yield [sampler.episode([task], index) for index in range(first, min(first + at_a_time, episodes))]


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """Return what `evaluation.json` holds, each number with a 95 % interval: of a task over its episodes, overall over
    tasks and episodes.

    "overall" is the accuracy over label tasks, or the loss where there is none; "overall_loss" is the loss over free
    text where there are both.
    """
    groups = {name: _only(evaluation, task=name) for name in dict.fromkeys(c.task for c in evaluation.trained)}
    by_kind = [
        summary(part) for part in (_only(evaluation, is_accuracy=kind) for kind in (True, False)) if part.trained
    ]
    return {
        "overall": by_kind[0],
        "overall_loss": by_kind[1] if len(by_kind) > 1 else None,
        "tasks": {
            name: summary(group) | answer_summary([a for a in evaluation.answered if a.task == name])
            for name, group in groups.items()
        },
    }


def answer_summary(answered: Sequence[Answered]) -> dict[str, Any]:
    """Return one task's kind and the scores of its answers by its kind's metrics; of spans, also seqeval's report."""
    kind = answered[0].kind
    before, after = ([scores(kind, getattr(a, when)) for a in answered] for when in ("before", "after"))
    found: dict[str, Any] = {"kind": kind, "answers": {}}
    for name in before[0]:
        ends = [np.array([of[name] for of in each]) for each in (before, after)]
        scored = intervals(np.stack([*ends, ends[1] - ends[0]]))
        found["answers"][name] = dict(zip(("before", "after", "gain"), scored, strict=True))
    if kind == "ner":
        found["spans"] = span_report([query for a in answered for query in a.after])
    return found


def _only(evaluation: Evaluation, **wanted: Any) -> Evaluation:
    """Return the curves whose attributes have the wanted values."""

    def keep(curve: Curve) -> bool:
        return all(getattr(curve, name) == value for name, value in wanted.items())

    return Evaluation(list(filter(keep, evaluation.trained)), list(filter(keep, evaluation.untrained)), [])


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return before, after and the curves, from both starts, and the paired differences."""
    trained, untrained = by_task(evaluation.trained), by_task(evaluation.untrained)
    points, tasks, episodes = trained.shape
    differences = trained[-1] - trained[0], trained[-1] - untrained[-1]
    found = intervals(np.stack([*trained, *untrained, *differences]))
    curve, untrained_curve, (gain, over_untrained) = found[:points], found[points : 2 * points], found[2 * points :]
    return {
        "metric": "accuracy" if evaluation.trained[0].is_accuracy else "loss",
        "episodes": tasks * episodes,
        "before": curve[0],
        "after": curve[-1],
        "untrained_before": untrained_curve[0],
        "untrained_after": untrained_curve[-1],
        "gain": gain,
        "over_untrained": over_untrained,
        "curve": curve,
        "untrained_curve": untrained_curve,
    }
