"""Adaptation curves: the query score before adapting to a task's support, and after every step."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from rayml.algorithms.base import Algorithm
from rayml.algorithms.inner_loop import InnerLoop, Params, TaskLosses, expand
from rayml.lm.encode import Encoder, class_numbers
from rayml.lm.fine_tuning import special_steps
from rayml.lm.model import TaskLM
from rayml.lm.option_scoring import prompts_of, weighted_prompts
from rayml.lm.queries import AskedTasks, KeptSupport
from rayml.lm.sides import TaskSide
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.statistics import Curve
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.model import MetaModel


Outputs = list[torch.Tensor]
"""For each episode the log-probabilities of its queries' options, `[Q, C]`, or, of free text, its mean loss, `[]`."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """How episodes of held-out tasks are answered: by the run's own algorithm.

    What takes the support in at once, and not by inner steps, has curves of two points.
    """

    lm: TaskLM
    encoder: Encoder
    algorithm: Algorithm
    steps: int
    """Inner steps."""
    unfreeze_every: int = 0

    @property
    def takes_steps(self) -> bool:
        return self.algorithm.takes_steps

    def curves(
        self, episodes: Sequence[Episode], start: Params, inner_lrs: Params, only_ends: bool = False
    ) -> list[Curve]:
        """Adapt to the episodes' supports side by side and score their queries before, after, and in between.

        The episodes are all of label tasks, or all of free text. With `only_ends`, score before the first step and
        after the last alone.
        """
        at = (0, self.steps) if only_ends else range(self.steps + 1)
        return curves_of(episodes, list(self.outputs(self.prepare(episodes), start, inner_lrs, at)))

    def prepare(self, episodes: Sequence[Episode]) -> "Prepared":
        """Return episodes as the model reads them, to be learned and answered from any number of starts."""
        return Prepared(self, episodes)

    def outputs(
        self, prepared: "Prepared", start: Params | None, inner_lrs: Params, at: Collection[int]
    ) -> Iterator[Outputs]:
        """Yield what is made of the queries after each number of steps in `at`, in order.

        What takes the support in at once is asked before and after, and before the first step nothing is known of the
        support: prototypes come with the steps. A start of None is the bare base.
        """
        if self.takes_steps and start is not None and max(at):
            for step, fast in enumerate(self.adapted(prepared, start, inner_lrs, max(at))):
                if step in at:
                    yield (prepared.queries if step else prepared.before).outputs(fast)
        else:
            weights = expand(start, len(prepared.episodes)) if start is not None else None
            yield prepared.before.outputs(weights)
            yield prepared.queries.outputs(weights)

    def adapted(self, prepared: "Prepared", start: Params, inner_lrs: Params, steps: int) -> Iterator[Params]:
        """Yield the fast weights `[T, ...]` after 0, 1, ..., `steps` steps on the episodes' support."""
        support = prepared.support
        inner = InnerLoop(inner_lrs, steps, special=special_steps(support, self.unfreeze_every))
        for adapted in inner.adapt(self.algorithm.support_losses(support), start, len(prepared.episodes)):
            yield adapted.fast

    def support_losses(self, episodes: Sequence[Episode]) -> TaskLosses:
        """Return what the inner loop descends."""
        support = side_of(self.lm, self.encoder, episodes, "support")
        return special_steps(support, self.unfreeze_every)(self.algorithm.support_losses(support))


class Prepared:
    """T episodes as the model reads them. Their batches keep what the frozen layers make of them."""

    def __init__(self, scorer: Scorer, episodes: Sequence[Episode]):
        self._scorer, self.episodes = scorer, episodes

    @cached_property
    def support(self) -> TaskSide:
        return side_of(self._scorer.lm, self._scorer.encoder, self.episodes, "support")

    @cached_property
    def queries(self) -> "Queries":
        return Queries(self._scorer.lm, self._scorer.encoder, self.episodes, self._scorer.algorithm)

    @cached_property
    def before(self) -> "Queries":
        """The queries as they are asked of what has not seen the support."""
        algorithm, is_label = self._scorer.algorithm, bool(self.episodes[0].labels)
        if algorithm.keeps == "nothing" and not (is_label and algorithm.keeps_states):
            return self.queries
        return Queries(self._scorer.lm, self._scorer.encoder, self.episodes)


class Queries:
    """The queries of T episodes, all of label tasks or all of free text, ready to be answered.

    Args:
        algorithm: answers, with what it keeps of the episodes' support; without one, label tokens are scored as they
            stand.
    """

    def __init__(self, lm: TaskLM, encoder: Encoder, episodes: Sequence[Episode], algorithm: Algorithm | None = None):
        self.lm, self.episodes, self.algorithm = lm, episodes, algorithm
        if any(bool(episode.labels) != bool(episodes[0].labels) for episode in episodes):
            raise ValueError("label tasks and free text are not scored together")
        keeps = algorithm.keeps if algorithm else "nothing"
        self.asked: AskedTasks | TaskSide
        if not episodes[0].labels:
            self.asked = side_of(lm, encoder, episodes, "query", in_context=keeps == "prompt")
            return
        both = [(encoder.of(e.task, e.kind, e.labels), e) for e in episodes]
        kept = [
            KeptSupport(own.rows(e.support, is_label=True), class_numbers(e, "support"))
            for own, e in both
            if algorithm and algorithm.keeps_states
        ]
        options = [len(e.labels) for e in episodes]
        if algorithm and not algorithm.scores_options:
            ways = [prompts_of(lm, own, e.query, next(iter(e.labels))) for own, e in both]
            tokens = [[of[0] for of in own.label_tokens(e.labels, e.support[0]) if of] for own, e in both]
            self.asked = AskedTasks(lm, encoder.pad, ways, kept, options, tokens)
        else:
            shown = [e.support if keeps == "prompt" else () for e in episodes]
            ways = [
                weighted_prompts(lm, own, e.query, list(e.labels), of) for (own, e), of in zip(both, shown, strict=True)
            ]
            self.asked = AskedTasks(lm, encoder.pad, ways, kept, options)

    @torch.no_grad()
    def outputs(self, weights: Params | None) -> Outputs:
        if isinstance(self.asked, TaskSide):
            return list(self.lm.losses(weights, self.asked.batch))
        return self.algorithm.answer(self.asked, weights) if self.algorithm else self.asked.label_log_probs(weights)

    def scores(self, weights: Params | None) -> list[float]:
        """Return each episode's accuracy, or, for free text, its mean loss per target token."""
        return score_all(self.episodes, self.outputs(weights))


def score_all(episodes: Sequence[Episode], outputs: Outputs) -> list[float]:
    """Return each episode's accuracy, or, for free text, its mean loss per target token."""
    return [accuracy(e, out) if e.labels else float(out) for e, out in zip(episodes, outputs, strict=True)]


def curves_of(episodes: Sequence[Episode], points: Sequence[Outputs]) -> list[Curve]:
    """Return the curve of each episode from what was made of their queries after each number of steps."""
    scores = zip(*(score_all(episodes, outputs) for outputs in points), strict=True)
    return [Curve(e.task, e.index, bool(e.labels), list(s)) for e, s in zip(episodes, scores, strict=True)]


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
    at_a_time = model.config.tasks_together
    for task in tasks:
        for first in range(0, episodes, at_a_time):
            yield [sampler.episode([task], index) for index in range(first, min(first + at_a_time, episodes))]


def side_of(lm: TaskLM, encoder: Encoder, episodes: Sequence[Episode], side: str, in_context: bool = False) -> TaskSide:
    """Return one side of T episodes with nothing left out, as evaluation sees it."""
    own = [encoder.of(episode.task, episode.kind, episode.labels) for episode in episodes]
    rows = [
        each.rows(getattr(e, side), bool(e.labels), e.support if in_context else ())
        for each, e in zip(own, episodes, strict=True)
    ]
    labels = [each.competing(e.labels, e.support[0]) for each, e in zip(own, episodes, strict=True)]
    return TaskSide(lm, rows, labels, [class_numbers(e, side) for e in episodes], encoder.pad)


def accuracy(episode: Episode, scores: torch.Tensor) -> float:
    """Return the share of queries whose highest option is the right one, of scores `[Q, C]`."""
    options = list(episode.labels)
    answers = [options[index] for index in scores.argmax(1).tolist()]
    right = [answer == example.target for answer, example in zip(answers, episode.query, strict=True)]
    return sum(right) / len(right)
