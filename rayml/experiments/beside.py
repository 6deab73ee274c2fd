"""What a sentence encoder has on the episodes of an evaluation, without any training: the rival to look at first."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rayml.experiments.classifiers import Embedding, missing
from rayml.experiments.evaluate import Evaluation
from rayml.lm.catalog import MINILM, resolve_model
from rayml.lm.scorer import accuracy
from rayml.tasks.episodes import Sampler
from rayml.tasks.statistics import Curve, by_task, intervals
from rayml.tasks.task import Task

HEAD = "nearest centroid"


def encoder_beside(
    found: Evaluation, tasks: Sequence[Task], sampler: Sampler, episodes: int, bar: Callable[[str, int], Any]
) -> dict[str, Any] | None:
    """Return MiniLM's accuracy on the label tasks of an evaluation, and ours after adapting less it, paired.

    Both are told of each task, and `overall`, with 95 % intervals. None where MiniLM is not installed, or there are no
    labels.

    Args:
        bar: opens a bar of that name and length, and returns what moves it on.
    """
    labelled = [task for task in tasks if task.options]
    if not labelled or missing("embedding", MINILM):
        return None
    progress = bar("a sentence encoder beside it", len(labelled) * episodes)
    encoder = Embedding(resolve_model(MINILM), torch.device("cpu"), seed=0)
    curves = []
    for task in labelled:
        for index in range(episodes):
            episode = sampler.episode([task], index)
            right = accuracy(episode, encoder.log_probs(episode, HEAD))
            curves.append(Curve(task.name, index, True, [right]))
            progress(1)
    ours = [curve for curve in found.trained if curve.is_accuracy]
    names = dict.fromkeys(curve.task for curve in curves)
    return {
        "encoder": f"MiniLM, {HEAD}",
        "overall": paired(ours, curves),
        "tasks": {name: paired(*([c for c in each if c.task == name] for each in (ours, curves))) for name in names},
    }


def paired(ours: Sequence[Curve], theirs: Sequence[Curve]) -> dict[str, Any]:
    """Return the other's score, and ours at the end less it, of the same episodes."""
    end, other = by_task(ours)[-1], by_task(theirs)[-1]
    return dict(zip(("accuracy", "ours_less_it"), intervals(np.stack([other, end - other])), strict=True))
