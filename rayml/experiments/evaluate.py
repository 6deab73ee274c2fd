"""Did meta-training help? The same episodes of held-out tasks, from the meta-trained and from an untrained start."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayml.experiments.answers import LearnedMethod, Setting, label_answers, text_answers
from rayml.experiments.classifiers import Embedding, Head, answer_by_classifier, install_command
from rayml.lm.catalog import MINILM, resolve_model
from rayml.lm.fine_tuning import rate_factors
from rayml.lm.scorer import Outputs, Scorer, batches, curves_of
from rayml.progress import Bar
from rayml.runs.files import AnyPath, write_atomically
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.statistics import Curve, intervals, scores_by_task
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.model import MetaModel

PARTS_FILE = "evaluation.part.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """Curves of the same episodes, in the same order, from both starts."""

    trained: list[Curve]
    untrained: list[Curve]
    answers: list["EpisodeAnswers"]
    """From the trained start."""

    def add(self, part: "Evaluation") -> None:
        self.trained.extend(part.trained)
        self.untrained.extend(part.untrained)
        self.answers.extend(part.answers)


@dataclass(frozen=True)
class EpisodeAnswers:
    """The answers to one episode's queries (`rayml.experiments.answers`), before adapting and after."""

    task: str
    kind: str
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


class Parts:
    """The finished parts of an evaluation, kept in a run's folder, so that one that is interrupted can continue.

    Parts of another evaluation are dropped.

    Args:
        inputs: everything that the results depend on.
    """

    def __init__(self, folder: AnyPath, inputs: Any):
        self.path = folder / PARTS_FILE
        self.fingerprint = hashlib.sha256(repr(inputs).encode()).hexdigest()
        self.episodes = 0
        """Number of episodes done so far."""
        parts = list(self._read()) if self.path.exists() else []
        self._unread = iter(parts)
        self._file = self.path.open("a", buffering=1) if parts else None

    def _read(self) -> Iterator[Evaluation]:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a crash left a line unfinished, which the next one must not be added to
            write_atomically(self.path, whole)
        head, *lines = whole.split("\n")[:-1] or [""]
        for line in lines if head == self.fingerprint else []:
            trained, untrained, answers = json.loads(line)
            yield Evaluation(
                [Curve(**curve) for curve in trained],
                [Curve(**curve) for curve in untrained],
                [EpisodeAnswers(**episode) for episode in answers],
            )

    def next(self) -> Evaluation | None:
        """Return the next part if it was done before, else None."""
        part = next(self._unread, None)
        self.episodes += len(part.trained) if part else 0
        return part

    def keep(self, part: Evaluation) -> None:
        """Write a new part to the file."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            self._file = self.path.open("a", buffering=1)
            self._file.write(self.fingerprint + "\n")
        lists = [[asdict(item) for item in items] for items in (part.trained, part.untrained, part.answers)]
        self._file.write(json.dumps(lists, ensure_ascii=False) + "\n")
        self.episodes += len(part.trained)

    def remove(self) -> None:
        """Remove the file, once the whole evaluation is written."""
        if self._file:
            self._file.close()
        self.path.unlink(missing_ok=True)


def evaluate(
    model: "MetaModel",
    tasks: Sequence[Task],
    sampler: Sampler,
    episodes: int,
    parts: Parts,
    progress: Callable[[int], None],
) -> Evaluation:
    """Adapt to `episodes` episodes of each task from both starts, by the run's own algorithm and inner steps.

    The untrained start has the inner rates that training began with: `inner.lr` with `inner.layer_decay`. Parts that
    `parts` holds are not done again. `progress` is called after every few episodes with their number.
    """
    inner = model.config.inner
    factors = rate_factors(model.lm.module, model.inner_lrs, inner.layer_decay)
    inner_lrs = {n: torch.tensor(inner.lr * factors.get(n, 1.0), device=model.device) for n in model.inner_lrs}
    evaluation = Evaluation([], [], [])
    scorer = model.scorer()
    for batch in batches(model, tasks, sampler, episodes):
        part = parts.next()
        if part is None:
            prepared, at = scorer.prepare(batch), range(scorer.steps + 1)
            points = list(scorer.outputs(prepared, model.start, model.inner_lrs, at))
            # Before the first outer step both starts are the same.
            untrained_points = list(scorer.outputs(prepared, model.untrained, inner_lrs, at)) if model.step else points
            answers = list(episode_answers(model, scorer, batch, points))
            part = Evaluation(curves_of(batch, points), curves_of(batch, untrained_points), answers)
            parts.keep(part)
        evaluation.add(part)
        progress(len(batch))
    return evaluation


def episode_answers(
    model: "MetaModel", scorer: Scorer, episodes: Sequence[Episode], points: Sequence[Outputs]
) -> Iterator[EpisodeAnswers]:
    """Yield the answers to each episode: labels from the outputs after each step, texts by generating them now."""
    method = LearnedMethod(scorer, model.start, model.inner_lrs)
    unadapted = replace(method, takes_support=False)
    for index, episode in enumerate(episodes):
        if episode.labels:
            before, after = (label_answers(episode, outputs[index]) for outputs in (points[0], points[-1]))
        else:
            before = text_answers(unadapted, episode, Setting())
            after = text_answers(method, episode, Setting(steps=scorer.steps))
        yield EpisodeAnswers(episode.task, episode.kind, before, after)


def encoder_beside(
    evaluation: Evaluation, tasks: Sequence[Task], sampler: Sampler, episodes: int, add_bar: Bar
) -> dict[str, Any] | None:
    """Return MiniLM's accuracy on the label tasks of an evaluation, without training: the first baseline to look at.

    It comes with the paired difference, ours less MiniLM's, for each task and `overall`, with 95 % intervals. None if
    MiniLM is not installed, or there are no label tasks.
    """
    labelled = [task for task in tasks if task.options]
    if not labelled or install_command("embedding", MINILM):
        return None
    advance = add_bar("a sentence encoder beside it", len(labelled) * episodes)
    encoder, head = Embedding(resolve_model(MINILM), torch.device("cpu"), seed=0), Head("nearest centroid")
    accuracies = []
    for record in answer_by_classifier(encoder, labelled, sampler, episodes, head):
        accuracies += record["curve"]
        advance()
    theirs = np.array(accuracies).reshape(len(labelled), episodes)
    ours = scores_by_task([curve for curve in evaluation.trained if curve.is_accuracy])[-1]
    both = np.stack([theirs, ours - theirs])

    def summarize(rows: slice) -> dict[str, Any]:
        return dict(zip(("accuracy", "ours_less_it"), intervals(both[:, rows]), strict=True))

    return {
        "encoder": f"MiniLM, {head.head}",
        "overall": summarize(slice(None)),
        "tasks": {task.name: summarize(slice(row, row + 1)) for row, task in enumerate(labelled)},
    }
