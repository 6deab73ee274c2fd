"""Adaptation curves: the query score before a task's support is taken in, and after every step of taking it in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rayml.lm.batch import TaskBatch, collate
from rayml.lm.encode import Encoder, class_numbers
from rayml.lm.model import TaskLM
from rayml.lm.objective import class_grid
from rayml.lm.score import OptionBatch
from rayml.meta.adapt import Params, adapt, expand
from rayml.meta.protonet import prototype_logits
from rayml.tasks.episodes import Episode


@dataclass(frozen=True, slots=True)
class Curve:
    """One episode's query scores after 0, 1, ..., k inner steps."""

    task: str
    index: int
    is_accuracy: bool
    """Accuracy for a label task (higher is better), else mean loss per target token (lower is better)."""
    scores: list[float]


@dataclass(frozen=True, slots=True)
class Scorer:
    """How episodes of held-out tasks are scored: by the run's own algorithm.

    `fomaml`, `reptile` and the like take their inner steps. `metaicl` and `protonet` take the support in at once: in
    the prompt, or as prototypes; their curves have two points.
    """

    lm: TaskLM
    encoder: Encoder
    algorithm: str
    steps: int
    """Inner steps."""

    def curves(self, episodes: Sequence[Episode], start: Params, rates: Params, only_ends: bool = False) -> list[Curve]:
        """Take in the episodes' support side by side and score their queries before, after, and in between.

        The episodes are all of label tasks, or all of free text. With `only_ends`, score before the first step and
        after the last alone.
        """
        labelled = bool(episodes[0].labels)
        assert all(bool(episode.labels) == labelled for episode in episodes)
        if self.algorithm in ("metaicl", "protonet"):
            points = self._at_once(episodes, expand(start, len(episodes)))
        else:
            points = self._step_by_step(episodes, start, rates, only_ends)
        scores = zip(*points, strict=True)
        return [Curve(e.task, e.index, labelled, list(s)) for e, s in zip(episodes, scores, strict=True)]

    def _step_by_step(
        self, episodes: Sequence[Episode], start: Params, rates: Params, only_ends: bool
    ) -> Iterator[list[float]]:
        support, queries = self._batch(episodes, "support"), self._queries(episodes)
        losses = partial(self.lm.losses, batch=support)
        for step, adapted in enumerate(adapt(losses, start, rates, self.steps, len(episodes))):
            if not only_ends or step in (0, self.steps):
                yield self._scores(episodes, queries, adapted.fast)

    def _at_once(self, episodes: Sequence[Episode], start: Params) -> Iterator[list[float]]:
        yield self._scores(episodes, self._queries(episodes), start)
        if self.algorithm == "metaicl":
            yield self._scores(episodes, self._queries(episodes, in_context=True), start)
        else:
            yield self._by_prototypes(episodes, start)

    def _batch(self, episodes: Sequence[Episode], side: str, in_context: bool = False) -> TaskBatch:
        rows = [self.encoder.rows(getattr(e, side), bool(e.labels), e.support if in_context else ()) for e in episodes]
        choices = [self.encoder.choices(episode.labels) for episode in episodes]
        return collate(rows, self.encoder.tokenizer.eos_token_id, choices).to(self.lm.device)

    def _queries(self, episodes: Sequence[Episode], in_context: bool = False) -> TaskBatch | OptionBatch:
        """Return the queries with every option, or, for free text, with their targets."""
        if not episodes[0].labels:
            return self._batch(episodes, "query", in_context)
        questions = [
            ([e.input for e in episode.query], list(episode.labels), episode.support if in_context else ())
            for episode in episodes
        ]
        return OptionBatch(self.encoder, questions).to(self.lm.device)

    @torch.no_grad()
    def _scores(self, episodes: Sequence[Episode], queries: TaskBatch | OptionBatch, weights: Params) -> list[float]:
        if isinstance(queries, TaskBatch):
            return self.lm.losses(weights, queries).tolist()
        return accuracies(episodes, queries.log_probs(self.lm, weights))

    @torch.no_grad()
    def _by_prototypes(self, episodes: Sequence[Episode], weights: Params) -> list[float]:
        support, query = (self.lm.states(weights, self._batch(episodes, side)) for side in ("support", "query"))
        classes = class_grid([class_numbers(episode, "support") for episode in episodes]).to(self.lm.device)
        ways = max(len(episode.labels) for episode in episodes)
        logits = prototype_logits(support, classes, query, ways)
        return accuracies(episodes, [scores[: len(e.query)] for e, scores in zip(episodes, logits, strict=True)])


def accuracies(episodes: Sequence[Episode], scores: Sequence[torch.Tensor]) -> list[float]:
    """Return each episode's share of queries `[Q, C]` whose highest option is the right one."""
    return [_accuracy(episode, score) for episode, score in zip(episodes, scores, strict=True)]


def _accuracy(episode: Episode, scores: torch.Tensor) -> float:
    options = list(episode.labels)
    answers = [options[place] for place in scores.argmax(1).tolist()]
    right = [answer == example.target for answer, example in zip(answers, episode.query, strict=True)]
    return sum(right) / len(right)
