"""Score adaptation: the query score before adapting to a task's support, and after every inner step."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from rayml.algorithms.base import Algorithm, LabelledStates
from rayml.algorithms.inner_loop import InnerLoop, Params, expand
from rayml.lm.encode import Encoder, class_numbers, label_examples
from rayml.lm.fine_tuning import inner_loss_transform
from rayml.lm.model import TaskLM
from rayml.lm.option_scoring import prompts_of, weighted_prompts
from rayml.lm.queries import LearnedPrototypes, TaskQueries
from rayml.lm.sides import TaskSide
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.statistics import Curve
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.model import MetaModel


Outputs = list[torch.Tensor]
"""For each episode, the log-probabilities of its queries' options, `[Q, C]`; for free text, its mean loss, `[]`."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Answers episodes of held-out tasks with the run's own algorithm.

    An algorithm without inner steps takes the support in at once, and has curves of two points.
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
        """Adapt to the episodes' supports side by side, and score their queries before, after, and in between.

        The episodes are all of label tasks, or all of free text.

        Args:
            only_ends: score only before the first step and after the last.
        """
        at = (0, self.steps) if only_ends else range(self.steps + 1)
        return curves_of(episodes, list(self.outputs(self.prepare(episodes), start, inner_lrs, at)))

    def prepare(self, episodes: Sequence[Episode]) -> "Prepared":
        """Return episodes as the model reads them, to be learned and answered from any number of starts."""
        return Prepared(self, episodes)

    def outputs(
        self, prepared: "Prepared", start: Params | None, inner_lrs: Params, at: Collection[int]
    ) -> Iterator[Outputs]:
        """Yield the outputs for the queries after each number of steps in `at`, in order.

        Without inner steps, there are outputs before and after the support is taken in. Before the first step nothing
        of the support is known, so prototypes are used from the first step on.

        Args:
            start: None is the bare base.
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
        inner = InnerLoop(inner_lrs, steps, transform=inner_loss_transform(support, self.unfreeze_every))
        for adapted in inner.adapt(self.algorithm.support_losses(support), start, len(prepared.episodes)):
            yield adapted.fast


class Prepared:
    """T episodes as the model reads them. Their batches keep the output of the frozen layers."""

    def __init__(self, scorer: Scorer, episodes: Sequence[Episode]):
        self._scorer, self.episodes = scorer, episodes

    @cached_property
    def support(self) -> TaskSide:
        return make_side(self._scorer.lm, self._scorer.encoder, self.episodes, "support")

    @cached_property
    def queries(self) -> "EpisodeQueries":
        return EpisodeQueries(
            self._scorer.lm, self._scorer.encoder, self.episodes, self._scorer.algorithm, self.support
        )

    @cached_property
    def before(self) -> "EpisodeQueries":
        """The queries as they are asked before the support is seen: by label tokens, with nothing kept of it.

        A sentence encoder, which has no label tokens, compares them with the labels' own texts.
        """
        algorithm, has_labels = self._scorer.algorithm, bool(self.episodes[0].labels)
        if self._scorer.encoder.sentences:
            episodes = [replace(e, support=tuple(label_examples(e.labels, e.query[0]))) for e in self.episodes]
            encoder = replace(self._scorer.encoder, label_names=False)  # they are the examples already
            means = algorithm.model_copy(update={"prototype_steps": 0})
            return EpisodeQueries(self._scorer.lm, encoder, episodes, means)
        if not algorithm.keeps_examples(has_labels) and not (has_labels and algorithm.keeps_states):
            return self.queries
        return EpisodeQueries(self._scorer.lm, self._scorer.encoder, self.episodes)


class EpisodeQueries:
    """The queries of T episodes, all of label tasks or all of free text, ready to be answered.

    Args:
        algorithm: answers, with what it keeps of the episodes' support. None: score the label tokens.
        support: that of the episodes, if it was made before.
    """

    def __init__(
        self,
        lm: TaskLM,
        encoder: Encoder,
        episodes: Sequence[Episode],
        algorithm: Algorithm | None = None,
        support: TaskSide | None = None,
    ):
        self.lm, self.episodes, self.algorithm = lm, episodes, algorithm
        if any(bool(episode.labels) != bool(episodes[0].labels) for episode in episodes):
            raise ValueError("label tasks and free text are not scored together")
        keeps = algorithm.keeps if algorithm else "nothing"
        self.queries: TaskQueries | TaskSide
        if not episodes[0].labels:
            in_context = bool(algorithm and algorithm.shows_examples(is_label=False))
            self.queries = make_side(lm, encoder, episodes, "query", in_context=in_context)
            return
        options = [len(e.labels) for e in episodes]
        prompts, first_tokens = [], []
        for e in episodes:
            task_encoder = encoder.for_task(e.task, e.kind, e.labels)
            if algorithm and not algorithm.scores_options:
                prompts.append(prompts_of(lm, task_encoder, e.query, next(iter(e.labels))))
                labels = task_encoder.label_tokens(e.labels, e.support[0])
                first_tokens.append([tokens[0] for tokens in labels if tokens])
            else:
                shown = e.support if keeps == "prompt" else ()
                prompts.append(weighted_prompts(lm, task_encoder, e.query, list(e.labels), shown))
        kept: LabelledStates | None = None
        if algorithm and algorithm.keeps_states:
            side = support or make_side(lm, encoder, episodes, "support")
            kept = LearnedPrototypes(algorithm, side) if algorithm.prototypes else side
        self.queries = TaskQueries(lm, encoder.pad, prompts, kept, options, first_tokens)

    @torch.no_grad()
    def outputs(self, weights: Params | None) -> Outputs:
        if isinstance(self.queries, TaskSide):
            return list(self.lm.losses(weights, self.queries.batch))
        return self.algorithm.answer(self.queries, weights) if self.algorithm else self.queries.label_log_probs(weights)

    def scores(self, weights: Params | None) -> list[float]:
        """Return each episode's accuracy, or, for free text, its mean loss per target token."""
        return score_all(self.episodes, self.outputs(weights))


def score_all(episodes: Sequence[Episode], outputs: Outputs) -> list[float]:
    """Return each episode's accuracy, or, for free text, its mean loss per target token."""
    return [accuracy(e, out) if e.labels else float(out) for e, out in zip(episodes, outputs, strict=True)]


def curves_of(episodes: Sequence[Episode], points: Sequence[Outputs]) -> list[Curve]:
    """Return the curve of each episode from the outputs after each number of steps."""
    scores = zip(*(score_all(episodes, outputs) for outputs in points), strict=True)
    return [Curve(e.task, e.index, bool(e.labels), list(s)) for e, s in zip(episodes, scores, strict=True)]


def trained_curves(
    model: "MetaModel",
    tasks: Sequence[Task],
    sampler: Sampler,
    episodes: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Curve]:
    """Return the curves of `episodes` episodes of each task from the trained start.

    Args:
        progress: is called with the number of episodes after each batch.
    """
    scorer, curves = model.scorer(), []
    for batch in batches(model, tasks, sampler, episodes):
        curves += scorer.curves(batch, model.start, model.inner_lrs)
        progress(len(batch))
    return curves


def batches(model: "MetaModel", tasks: Sequence[Task], sampler: Sampler, episodes: int) -> Iterator[list[Episode]]:
    """Yield `episodes` episodes of each task, as many at a time as a worker adapts side by side."""
    at_a_time = model.config.tasks_together
    for task in tasks:
        for first in range(0, episodes, at_a_time):
            yield [sampler.episode([task], index) for index in range(first, min(first + at_a_time, episodes))]


def make_side(
    lm: TaskLM, encoder: Encoder, episodes: Sequence[Episode], side: str, in_context: bool = False
) -> TaskSide:
    """Return one side of T episodes as evaluation sees it, without token dropout."""
    rows, classes, labels = [], [], []
    for e in episodes:
        task_encoder = encoder.for_task(e.task, e.kind, e.labels)
        if side == "support":
            side_rows, side_classes = task_encoder.support(e.support, list(e.labels))
        else:
            shown = task_encoder.shown(e.support, bool(e.labels)) if in_context else ()
            side_rows = task_encoder.rows(e.query, bool(e.labels), shown)
            side_classes = class_numbers(e, side)
        rows.append(side_rows)
        classes.append(side_classes)
        labels.append(task_encoder.competing_tokens(e.labels, e.support[0]))
    return TaskSide(lm, rows, labels, classes, encoder.pad)


def accuracy(episode: Episode, scores: torch.Tensor) -> float:
    """Return the share of queries whose option with the highest score, of `[Q, C]`, is the right one."""
    options = list(episode.labels)
    answers = [options[index] for index in scores.argmax(1).tolist()]
    is_right = [answer == example.target for answer, example in zip(answers, episode.query, strict=True)]
    return sum(is_right) / len(is_right)
