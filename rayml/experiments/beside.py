"""The accuracy of an untrained sentence encoder on the episodes of an evaluation: the baseline to look at first."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rayml.experiments.classifiers import Embedding, missing
from rayml.experiments.evaluate import Evaluation
from rayml.lm.catalog import MINILM, resolve_model
from rayml.lm.scorer import accuracy
from rayml.progress import Bar
from rayml.tasks.episodes import Sampler
from rayml.tasks.statistics import Curve, by_task, intervals
from rayml.tasks.task import Task

HEAD = "nearest centroid"


def encoder_beside(
    evaluation: Evaluation, tasks: Sequence[Task], sampler: Sampler, episodes: int, add_bar: Bar
) -> dict[str, Any] | None:
    """Return MiniLM's accuracy on the label tasks of an evaluation, and the paired difference: ours less MiniLM's.

    Both come for each task and `overall`, with 95 % intervals. None if MiniLM is not installed, or there are no label
    tasks.
    """
    labelled = [task for task in tasks if task.options]
    if not labelled or missing("embedding", MINILM):
        return None
    advance = add_bar("a sentence encoder beside it", len(labelled) * episodes)
    encoder = Embedding(resolve_model(MINILM), torch.device("cpu"), seed=0)
    curves = []
    for task in labelled:
        for index in range(episodes):
            episode = sampler.episode([task], index)
            score = accuracy(episode, encoder.log_probs(episode, HEAD))
            curves.append(Curve(task.name, index, True, [score]))
            advance()
    ours = [curve for curve in evaluation.trained if curve.is_accuracy]

    def compare(name: str) -> dict[str, Any]:
        return paired_scores(*([curve for curve in group if curve.task == name] for group in (ours, curves)))

    return {
        "encoder": f"MiniLM, {HEAD}",
        "overall": paired_scores(ours, curves),
        "tasks": {task.name: compare(task.name) for task in labelled},
    }


def paired_scores(ours: Sequence[Curve], theirs: Sequence[Curve]) -> dict[str, Any]:
    """Return their accuracy, and the difference of ours after adapting, on the same episodes."""
    our_scores, their_scores = by_task(ours)[-1], by_task(theirs)[-1]
    accuracies, differences = intervals(np.stack([their_scores, our_scores - their_scores]))
    return {"accuracy": accuracies, "ours_less_it": differences}
