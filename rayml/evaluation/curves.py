"""Adaptation curves: the query score before a task's support is taken in, and after every step of taking it in."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from rayml.lm.batch import TaskBatch, collate
from rayml.lm.encode import Encoder, class_numbers
from rayml.lm.model import TaskLM
from rayml.lm.objective import class_grid, inner_losses
from rayml.lm.score import Ballot
from rayml.meta.adapt import Params, TaskLosses, adapt, expand
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


Outputs = list[torch.Tensor]
"""For each episode the log-probabilities of its queries' options, `[Q, C]`, or, of free text, its mean loss, `[]`."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """How episodes of held-out tasks are answered: by the run's own algorithm.

    `fomaml`, `reptile` and the like take their inner steps. `metaicl` and `protonet` take the support in at once: in
    the prompt, or as prototypes; their curves have two points.
    """

    lm: TaskLM
    encoder: Encoder
    algorithm: str
    steps: int
    """Inner steps."""
    unfreeze_every: int = 0

    @property
    def takes_steps(self) -> bool:
        return self.algorithm not in ("metaicl", "protonet")

    def curves(self, episodes: Sequence[Episode], start: Params, rates: Params, only_ends: bool = False) -> list[Curve]:
        """Take in the episodes' support side by side and score their queries before, after, and in between.

        The episodes are all of label tasks, or all of free text. With `only_ends`, score before the first step and
        after the last alone.
        """
        at = (0, self.steps) if only_ends else range(self.steps + 1)
        return curves_of(episodes, list(self.outputs(episodes, start, rates, at)))

    def outputs(
        self, episodes: Sequence[Episode], start: Params | None, rates: Params, at: Collection[int]
    ) -> Iterator[Outputs]:
        """Yield what is made of the queries after each number of steps in `at`, in order.

        What takes the support in at once is asked before and after. A start of None is the bare base.
        """
        if self.takes_steps and start is not None:
            yield from self._step_by_step(episodes, start, rates, at)
        else:
            yield from self._at_once(episodes, expand(start, len(episodes)) if start is not None else None)

    def _step_by_step(
        self, episodes: Sequence[Episode], start: Params, rates: Params, at: Collection[int]
    ) -> Iterator[Outputs]:
        queries = Queries(self.lm, self.encoder, episodes)
        losses = self.support_losses(episodes)
        for step, adapted in enumerate(adapt(losses, start, rates, max(at), len(episodes))):
            if step in at:
                yield queries.outputs(adapted.fast)

    def support_losses(self, episodes: Sequence[Episode]) -> TaskLosses:
        support = side_of(self.encoder, episodes, "support", self.lm.device, packs=self.lm.packs)
        return inner_losses(self.lm, support, self.unfreeze_every)

    def _at_once(self, episodes: Sequence[Episode], weights: Params | None) -> Iterator[Outputs]:
        yield Queries(self.lm, self.encoder, episodes).outputs(weights)
        if self.algorithm == "metaicl":
            yield Queries(self.lm, self.encoder, episodes, in_context=True).outputs(weights)
        else:
            yield self._by_prototypes(episodes, weights)

    @torch.no_grad()
    def _by_prototypes(self, episodes: Sequence[Episode], weights: Params | None) -> Outputs:
        support, query = (
            self.lm.states(weights, side_of(self.encoder, episodes, side, self.lm.device))
            for side in ("support", "query")
        )
        classes = class_grid([class_numbers(episode, "support") for episode in episodes]).to(self.lm.device)
        ways = max(len(episode.labels) for episode in episodes)
        logits = prototype_logits(support, classes, query, ways)
        return [of[: len(e.query), : len(e.labels)].log_softmax(-1) for e, of in zip(episodes, logits, strict=True)]


class Queries:
    """The queries of T episodes, all of label tasks or all of free text, ready to be answered.

    Args:
        in_context: show each query the episode's support in its prompt.
    """

    def __init__(self, lm: TaskLM, encoder: Encoder, episodes: Sequence[Episode], in_context: bool = False):
        self.lm, self.episodes = lm, episodes
        self.batch: TaskBatch | Ballot
        if any(bool(episode.labels) != bool(episodes[0].labels) for episode in episodes):
            raise ValueError("label tasks and free text are not scored together")
        if episodes[0].labels:
            questions = [
                encoder.of(e.task, e.kind).questions(e.query, list(e.labels), e.support if in_context else ())
                for e in episodes
            ]
            self.batch = Ballot(lm, encoder, questions)
        else:
            self.batch = side_of(encoder, episodes, "query", lm.device, in_context, lm.packs)

    @torch.no_grad()
    def outputs(self, weights: Params | None) -> Outputs:
        if isinstance(self.batch, TaskBatch):
            return list(self.lm.losses(weights, self.batch))
        return self.batch.log_probs(weights)

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


def side_of(
    encoder: Encoder,
    episodes: Sequence[Episode],
    side: str,
    device: torch.device,
    in_context: bool = False,
    packs: bool = False,
) -> TaskBatch:
    """Return one side of T episodes with nothing left out, as evaluation sees it."""
    own = [encoder.of(episode.task, episode.kind) for episode in episodes]
    rows = [
        each.rows(getattr(e, side), bool(e.labels), e.support if in_context else ())
        for each, e in zip(own, episodes, strict=True)
    ]
    labels = [each.competing(e.labels, e.support[0]) for each, e in zip(own, episodes, strict=True)]
    return collate(rows, encoder.pad, labels, packs).to(device)


def accuracy(episode: Episode, scores: torch.Tensor) -> float:
    """Return the share of queries whose highest option is the right one, of scores `[Q, C]`."""
    options = list(episode.labels)
    answers = [options[place] for place in scores.argmax(1).tolist()]
    right = [answer == example.target for answer, example in zip(answers, episode.query, strict=True)]
    return sum(right) / len(right)
