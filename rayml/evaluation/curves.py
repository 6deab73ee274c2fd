"""Adaptation curves: the query score after 0, 1, ..., k inner steps, episode by episode."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rayml.lm.batch import TaskBatch, collate
from rayml.lm.encode import Encoder
from rayml.lm.model import TaskLM
from rayml.lm.score import OptionBatch
from rayml.meta.adapt import Adapted, Params, adapt
from rayml.tasks.episodes import Episode


@dataclass(frozen=True, slots=True)
class Curve:
    """One episode's query scores after 0, 1, ..., k inner steps."""

    task: str
    index: int
    is_accuracy: bool
    """Accuracy for a label task (higher is better), else mean loss per target token (lower is better)."""
    scores: list[float]


def adaptation_scores(
    lm: TaskLM,
    encoder: Encoder,
    episodes: Sequence[Episode],
    start: Params,
    rates: Params,
    steps: int,
    only_ends: bool = False,
) -> list[Curve]:
    """Adapt to the episodes' support side by side and score their queries after every step.

    The episodes are all of label tasks, or all of free text. With `only_ends`, score before the first step and after
    the last alone.
    """
    labelled = bool(episodes[0].labels)
    assert all(bool(episode.labels) == labelled for episode in episodes)
    pad, device = encoder.tokenizer.eos_token_id, next(iter(start.values())).device
    choices = [encoder.choices(episode.labels) for episode in episodes]
    support, query = (
        collate([encoder.rows(getattr(episode, side), labelled) for episode in episodes], pad, choices).to(device)
        for side in ("support", "query")
    )
    questions = [([e.input for e in episode.query], list(episode.labels)) for episode in episodes]
    options = OptionBatch(encoder, questions).to(device) if labelled else None
    scores: list[list[float]] = [[] for _ in episodes]
    for step, adapted in enumerate(adapt(partial(lm.losses, batch=support), start, rates, steps, len(episodes))):
        if only_ends and 0 < step < steps:
            continue
        found = _accuracies(episodes, options.log_probs(lm, adapted.fast)) if options else _losses(lm, adapted, query)
        for score, value in zip(scores, found, strict=True):
            score.append(value)
    return [
        Curve(episode.task, episode.index, labelled, score) for episode, score in zip(episodes, scores, strict=True)
    ]


@torch.no_grad()
def _losses(lm: TaskLM, adapted: Adapted, query: TaskBatch) -> list[float]:
    return lm.losses(adapted.fast, query).tolist()


def _accuracies(episodes: Sequence[Episode], log_probs: list[torch.Tensor]) -> list[float]:
    return [_accuracy(episode, scores) for episode, scores in zip(episodes, log_probs, strict=True)]


def _accuracy(episode: Episode, log_probs: torch.Tensor) -> float:
    options = list(episode.labels)
    answers = [options[place] for place in log_probs.argmax(1).tolist()]
    right = [answer == example.target for answer, example in zip(answers, episode.query, strict=True)]
    return sum(right) / len(right)
