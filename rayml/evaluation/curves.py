"""Adaptation curves: the query score after 0, 1, ..., k inner steps, episode by episode."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rayml.lm.batch import collate
from rayml.lm.encode import Encoder
from rayml.lm.model import TaskLM
from rayml.lm.score import OptionBatch
from rayml.meta.adapt import Params, adapt
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

    With `only_ends`, score before the first step and after the last alone.

    All episodes are scored in one way: they are label tasks, or free text, or both kinds, each with its own score.
    """
    pad, device = encoder.tokenizer.eos_token_id, next(iter(start.values())).device
    sides = [
        [encoder.rows(getattr(episode, side), bool(episode.labels)) for episode in episodes]
        for side in ("support", "query")
    ]
    labels = [encoder.choices(episode.labels) for episode in episodes]
    support, query = (collate(side, pad, labels).to(device) for side in sides)
    # A free-text task rides along in the option batch with its first target as the only option.
    choices = OptionBatch(encoder, [_choices(episode) for episode in episodes]).to(device)
    scores: list[list[float]] = [[] for _ in episodes]
    has_labels = any(episode.labels for episode in episodes)
    has_text = not all(episode.labels for episode in episodes)
    for step, adapted in enumerate(adapt(lambda fast: lm.losses(fast, support), start, rates, steps, len(episodes))):
        if only_ends and 0 < step < steps:
            continue
        log_probs = choices.log_probs(lm, adapted.fast) if has_labels else [None] * len(episodes)
        losses = _losses(lm, adapted.fast, query) if has_text else [0.0] * len(episodes)
        for score, episode, options, loss in zip(scores, episodes, log_probs, losses, strict=True):
            score.append(loss if options is None or not episode.labels else _accuracy(episode, options))
    return [
        Curve(episode.task, episode.index, bool(episode.labels), score)
        for episode, score in zip(episodes, scores, strict=True)
    ]


@torch.no_grad()
def _losses(lm: TaskLM, fast: Params, query) -> list[float]:
    return lm.losses(fast, query).tolist()


def _choices(episode: Episode) -> tuple[list[str], list[str]]:
    options = list(episode.labels) or [episode.query[0].target]
    return [example.input for example in episode.query], options


def _accuracy(episode: Episode, log_probs: torch.Tensor) -> float:
    options = list(episode.labels)
    answers = [options[place] for place in log_probs.argmax(1).tolist()]
    right = [answer == example.target for answer, example in zip(answers, episode.query, strict=True)]
    return sum(right) / len(right)
