"""What a method answers to episodes of held-out tasks: the raw material of a comparison."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from rayml.algorithms.inner_loop import Params, expand
from rayml.lm.generate import texts_behind, write
from rayml.lm.scorer import Scorer, score_all
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.statistics import groups, overall
from rayml.tasks.task import Task

SPARE_TOKENS = 8
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class LearnedMethod:
    """Something that learns from a support and answers queries."""

    scorer: Scorer
    start: Params | None
    """None: the bare base, which takes the support in its prompt or not at all."""
    inner_lrs: Params
    takes_support: bool = True
    """Else it is asked as it stands."""

    @property
    def takes_steps(self) -> bool:
        return self.scorer.takes_steps and self.start is not None

    def scaled(self, factor: float) -> Params:
        return {name: factor * rate for name, rate in self.inner_lrs.items()}


@dataclass(frozen=True, slots=True)
class Setting:
    """How a method adapts."""

    factor: float = 1.0
    """On its inner rates."""
    steps: int = 0


@dataclass(frozen=True)
class Choice(Generic[S]):
    """The setting that was best on meta-val, and all that were tried, with their scores."""

    setting: S
    tried: list[tuple[S, float]]


def choose_setting(
    method: LearnedMethod,
    tasks: Sequence[Task],
    sampler: Sampler,
    episodes: int,
    factors: Sequence[float],
    steps: Sequence[int],
    progress: Callable[[], None],
) -> Choice[Setting]:
    """Try every factor with every number of steps on the same meta-val episodes.

    The overall score (`rayml.tasks.statistics`) is raised. Of equals the fewest steps are taken, then the least rate.
    `progress` is told after each episode with each factor.
    """
    if not method.takes_steps:
        return Choice(Setting(), [])
    parts = groups(tasks, episodes)
    drawn = [(of.metric, [sampler.episode(of.tasks, index) for index in range(of.episodes)]) for of in parts]
    tried = []
    for factor in sorted(factors):
        means = {}
        for metric, some in drawn:
            scores = []
            for episode in some:
                scores.append(scores_at(method, episode, factor, steps))
                progress()
            means[metric] = np.array(scores).mean(0)
        for number, k in enumerate(sorted(steps)):
            at_k = {metric: float(of[number]) for metric, of in means.items()}
            tried.append((Setting(factor, k), overall(at_k, tasks)))
    best, _ = max(tried, key=lambda one: (one[1] if np.isfinite(one[1]) else -np.inf, -one[0].steps, -one[0].factor))
    return Choice(best, tried)


def scores_at(method: LearnedMethod, episode: Episode, factor: float, steps: Sequence[int]) -> list[float]:
    """Return an episode's accuracy, or, for free text, its loss, after each number of steps."""
    scorer = method.scorer
    points = scorer.outputs(scorer.prepare([episode]), method.start, method.scaled(factor), steps)
    return [score for outputs in points for score in score_all([episode], outputs)]


def answer(
    method: LearnedMethod, tasks: Sequence[Task], sampler: Sampler, episodes: int, setting: Setting, most_steps: int
) -> Iterator[dict[str, Any]]:
    """Yield, for `episodes` episodes of each task, what was answered after `setting`.

    A record holds `task`, `kind`, `index`, `curve` (accuracy, or the loss of free text, after 0, 1, ..., `most_steps`
    steps at the setting's rate, or before and after) and, for every query, `target` and `answer`, in the task's own
    words; for label tasks also the answer's probability as `confidence`. The first of each task has `seconds`.
    """
    for task in tasks:
        for index in range(episodes):
            episode = sampler.episode([task], index)
            curve, queries = _answer(method, episode, setting, most_steps)
            record = {"task": task.name, "kind": task.kind, "index": index, "curve": curve, "queries": queries}
            yield record if index else record | {"seconds": round(seconds_of(method, episode, setting), 4)}


def seconds_of(method: LearnedMethod, episode: Episode, setting: Setting) -> float:
    """Return how long it takes to learn an episode's support and to answer its queries, without a curve on the way."""
    began = time.perf_counter()
    if not episode.labels:
        text_answers(method, episode, setting)
        return time.perf_counter() - began
    scorer, start = method.scorer, method.start
    prepared = scorer.prepare([episode])
    if method.takes_support and not method.takes_steps:
        outputs = prepared.queries.outputs(None if start is None else expand(start, 1))
    else:
        outputs = next(scorer.outputs(prepared, start, method.scaled(setting.factor), (setting.steps,)))
    label_answers(episode, outputs[0])  # waits for the device
    return time.perf_counter() - began


def _answer(
    method: LearnedMethod, episode: Episode, setting: Setting, most_steps: int
) -> tuple[list[float], list[dict[str, Any]]]:
    at = range(most_steps + 1)
    scorer = method.scorer
    outputs = scorer.outputs(scorer.prepare([episode]), method.start, method.scaled(setting.factor), at)
    points = list(islice(outputs, None if method.takes_support else 1))
    curve = [score_all([episode], outputs)[0] for outputs in points]
    if episode.labels:
        (log_probs,) = points[setting.steps if method.takes_steps else -1]
        return curve, label_answers(episode, log_probs)
    return curve, text_answers(method, episode, setting)


def label_answers(episode: Episode, log_probs: torch.Tensor) -> list[dict[str, Any]]:
    """Return what is chosen among the options by their log-probabilities `[Q, C]`."""
    options = list(episode.labels)
    found = []
    for example, row in zip(episode.query, log_probs.exp().tolist(), strict=True):
        row = [probability if math.isfinite(probability) else 0.0 for probability in row]  # adapting diverged
        best = max(range(len(options)), key=row.__getitem__)
        words = {"target": episode.labels[example.target], "answer": episode.labels[options[best]]}
        found.append({**words, "confidence": round(row[best], 4)})
    return found


def text_answers(method: LearnedMethod, episode: Episode, setting: Setting) -> list[dict[str, Any]]:
    """Return what is written, greedily, to each query."""
    scorer, encoder = method.scorer, method.scorer.encoder.of(episode.task, episode.kind)
    shown = episode.support if encoder.in_context and method.takes_support else ()
    longest = max(len(encoder.tokenizer(example.target)["input_ids"]) for example in episode.support)
    most = min(encoder.max_tokens, 2 * longest + SPARE_TOKENS)
    prompts = [encoder.asked(query, shown) for query in episode.query]
    texts = texts_behind(scorer.lm, encoder.tokenizer, prompts, adapted_weights(method, episode, setting), most)
    write(scorer.lm, texts)
    return [
        {
            "target": query.target,
            "answer": text.piece().text.strip(),
            "answers": list(query.answers),
            "input": query.input,
        }
        for query, text in zip(episode.query, texts, strict=True)
    ]


def adapted_weights(method: LearnedMethod, episode: Episode, setting: Setting) -> Params | None:
    """Return one episode's weights after the setting's steps; None for the bare base."""
    if method.start is None:
        return None
    if not method.takes_steps:
        return method.start
    inner_lrs = method.scaled(setting.factor)
    *_, fast = method.scorer.adapted(method.scorer.prepare([episode]), method.start, inner_lrs, setting.steps)
    return {name: weight[0] for name, weight in fast.items()}
