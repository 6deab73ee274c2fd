"""The answers of a method to episodes of held-out tasks: the raw material of a comparison."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from rayml.algorithms.inner_loop import Params, expand
from rayml.lm.generate import prepare_generations, write
from rayml.lm.scorer import Scorer, score_all
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.statistics import group_by_metric, overall_score
from rayml.tasks.task import Task

SPARE_TOKENS = 8
"""Tokens that an answer may have beyond twice the longest target of the support."""
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class LearnedMethod:
    """A model that learns from a support and answers queries."""

    scorer: Scorer
    start: Params | None
    """None: the bare base, which sees the support in its prompt or not at all."""
    inner_lrs: Params
    takes_support: bool = True
    """If not, it answers without the support (zero-shot)."""

    @property
    def takes_steps(self) -> bool:
        return self.scorer.takes_steps and self.start is not None

    def scaled_lrs(self, factor: float) -> Params:
        return {name: factor * rate for name, rate in self.inner_lrs.items()}


@dataclass(frozen=True, slots=True)
class Setting:
    """How a method adapts."""

    factor: float = 1.0
    """Factor on its inner rates."""
    steps: int = 0


@dataclass(frozen=True)
class Choice(Generic[S]):
    """The setting that did best on meta-val, and all tried settings with their scores."""

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

    The best overall score (`rayml.tasks.statistics`) wins; among equals the fewest steps, then the smallest rate.
    `progress` is called after each episode with each factor.
    """
    if not method.takes_steps:
        return Choice(Setting(), [])
    by_metric = {
        group.metric: [sampler.episode(group.tasks, index) for index in range(group.episodes)]
        for group in group_by_metric(tasks, episodes)
    }
    tried = []
    for factor in sorted(factors):
        means = {}
        for metric, drawn in by_metric.items():
            scores = []
            for episode in drawn:
                scores.append(scores_after(method, episode, factor, steps))
                progress()
            means[metric] = np.array(scores).mean(0)
        for index, step_count in enumerate(sorted(steps)):
            means_after = {metric: float(mean[index]) for metric, mean in means.items()}
            tried.append((Setting(factor, step_count), overall_score(means_after, tasks)))

    def rank(scored: tuple[Setting, float]) -> tuple[float, int, float]:
        setting, score = scored
        return score if np.isfinite(score) else -np.inf, -setting.steps, -setting.factor

    return Choice(max(tried, key=rank)[0], tried)


def scores_after(method: LearnedMethod, episode: Episode, factor: float, steps: Sequence[int]) -> list[float]:
    """Return an episode's accuracy, or, for free text, its loss, after each number of steps."""
    scorer = method.scorer
    points = scorer.outputs(scorer.prepare([episode]), method.start, method.scaled_lrs(factor), steps)
    return [score_all([episode], outputs)[0] for outputs in points]


def answer_episodes(
    method: LearnedMethod, tasks: Sequence[Task], sampler: Sampler, episodes: int, setting: Setting, most_steps: int
) -> Iterator[dict[str, Any]]:
    """Yield a record of the answers to each of `episodes` episodes of each task, after adapting by `setting`.

    A record holds `task`, `kind`, `index`, `curve` (accuracy, or the loss of free text, after 0, 1, ..., `most_steps`
    steps at the setting's rate, or before and after) and, for every query, `target` and `answer`, in the task's own
    words; for label tasks also the answer's probability as `confidence`. The first record of each task has `seconds`.
    """
    for task in tasks:
        for index in range(episodes):
            episode = sampler.episode([task], index)
            curve, queries = curve_and_answers(method, episode, setting, most_steps)
            record = {"task": task.name, "kind": task.kind, "index": index, "curve": curve, "queries": queries}
            yield record if index else record | {"seconds": round(time_episode(method, episode, setting), 4)}


def time_episode(method: LearnedMethod, episode: Episode, setting: Setting) -> float:
    """Return the seconds that it takes to learn an episode's support and answer its queries, without the curve."""
    began = time.perf_counter()
    if not episode.labels:
        text_answers(method, episode, setting)
        return time.perf_counter() - began
    scorer, start = method.scorer, method.start
    prepared = scorer.prepare([episode])
    if method.takes_support and not method.takes_steps:
        outputs = prepared.queries.outputs(None if start is None else expand(start, 1))
    else:
        outputs = next(scorer.outputs(prepared, start, method.scaled_lrs(setting.factor), (setting.steps,)))
    label_answers(episode, outputs[0])  # this waits for the device
    return time.perf_counter() - began


def curve_and_answers(
    method: LearnedMethod, episode: Episode, setting: Setting, most_steps: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """Return an episode's curve, and its answers after the setting's steps."""
    scorer, inner_lrs = method.scorer, method.scaled_lrs(setting.factor)
    all_outputs = scorer.outputs(scorer.prepare([episode]), method.start, inner_lrs, range(most_steps + 1))
    points = list(islice(all_outputs, None if method.takes_support else 1))
    curve = [score_all([episode], outputs)[0] for outputs in points]
    if episode.labels:
        (log_probs,) = points[setting.steps if method.takes_steps else -1]
        return curve, label_answers(episode, log_probs)
    return curve, text_answers(method, episode, setting)


def label_answers(episode: Episode, log_probs: torch.Tensor) -> list[dict[str, Any]]:
    """Return the most probable option for each query, from log-probabilities `[Q, C]`."""
    options = list(episode.labels)
    answers = []
    for example, row in zip(episode.query, log_probs.exp().tolist(), strict=True):
        # Where adapting diverged, probabilities are NaN.
        confidences = [probability if math.isfinite(probability) else 0.0 for probability in row]
        confidence = max(confidences)
        answer = episode.labels[options[confidences.index(confidence)]]
        target = episode.labels[example.target]
        answers.append({"target": target, "answer": answer, "confidence": round(confidence, 4)})
    return answers


def text_answers(method: LearnedMethod, episode: Episode, setting: Setting) -> list[dict[str, Any]]:
    """Return the text that is generated, greedily, for each query."""
    scorer, encoder = method.scorer, method.scorer.encoder.for_task(episode.task, episode.kind)
    shown = encoder.shown(episode.support, is_label=False) if method.takes_support else ()
    longest_target = max(len(encoder.tokenizer(example.target)["input_ids"]) for example in episode.support)
    most_tokens = min(encoder.max_tokens, 2 * longest_target + SPARE_TOKENS)
    prompts = [encoder.prompt_tokens(query, shown) for query in episode.query]
    texts = prepare_generations(
        scorer.lm, encoder.tokenizer, prompts, adapted_weights(method, episode, setting), most_tokens
    )
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
    inner_lrs = method.scaled_lrs(setting.factor)
    *_, fast = method.scorer.adapted(method.scorer.prepare([episode]), method.start, inner_lrs, setting.steps)
    return {name: weight[0] for name, weight in fast.items()}
