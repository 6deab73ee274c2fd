"""Did meta-training help? The same episodes of held-out tasks, from the meta-trained and from an untrained start."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rayml.experiments.answers import LearnedMethod, Setting, label_answers, text_answers
from rayml.lm.fine_tuning import rate_factors
from rayml.lm.scorer import Outputs, Scorer, batches, curves_of
from rayml.runs.files import AnyPath
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.statistics import Curve
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.model import MetaModel

FILE = "evaluation.part.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """Curves of the same episodes, in the same order, from both starts."""

    trained: list[Curve]
    untrained: list[Curve]
    answered: list["Answered"]
    """From the trained start."""

    def add(self, part: "Evaluation") -> None:
        self.trained.extend(part.trained)
        self.untrained.extend(part.untrained)
        self.answered.extend(part.answered)


@dataclass(frozen=True)
class Answered:
    """What was answered to one episode's queries (`rayml.experiments.answers`), before adapting and after."""

    task: str
    kind: str
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


class Parts:
    """The parts of an evaluation in a run's folder, in order; those of another evaluation are forgotten.

    Args:
        asked: all that the results depend on.
    """

    def __init__(self, folder: AnyPath, asked: Any):
        self.path = folder / FILE
        self.asked = hashlib.sha256(repr(asked).encode()).hexdigest()
        self.episodes = 0
        """Done so far."""
        known = list(self._read()) if self.path.exists() else []
        self._waiting = iter(known)
        self._file = self.path.open("a", buffering=1) if known else None

    def _read(self) -> Iterator[Evaluation]:
        head, *lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] or [""]
        for line in lines if head == self.asked else []:
            trained, untrained, answered = json.loads(line)
            first, second = ([Curve(**curve) for curve in each] for each in (trained, untrained))
            yield Evaluation(first, second, [Answered(**one) for one in answered])

    def next(self) -> Evaluation | None:
        """Return the next part that was done before; None, if it is to be done now."""
        part = next(self._waiting, None)
        self.episodes += len(part.trained) if part else 0
        return part

    def keep(self, part: Evaluation) -> None:
        """Write down a part that was just done."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            self._file = self.path.open("a", buffering=1)
            self._file.write(self.asked + "\n")
        lists = [[asdict(one) for one in each] for each in (part.trained, part.untrained, part.answered)]
        self._file.write(json.dumps(lists, ensure_ascii=False) + "\n")
        self.episodes += len(part.trained)

    def remove(self) -> None:
        """Forget the parts: the whole is written."""
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

    Every task gets the same number of episodes. The untrained start's rates are those that training began with:
    `inner.lr`, less by `inner.layer_decay`. What `parts` holds already is not done again. `progress` is told after each
    few episodes how many are done.
    """
    inner = model.config.inner
    factors = rate_factors(model.lm.module, model.inner_lrs, inner.layer_decay)
    inner_lrs = {n: torch.tensor(inner.lr * factors.get(n, 1.0), device=model.device) for n in model.inner_lrs}
    found = Evaluation([], [], [])
    scorer = model.scorer()
    for batch in batches(model, tasks, sampler, episodes):
        known = parts.next()
        if known:
            found.add(known)
            progress(len(batch))
            continue
        prepared, at = scorer.prepare(batch), range(scorer.steps + 1)
        points = list(scorer.outputs(prepared, model.start, model.inner_lrs, at))
        # Before the first outer step the two starts are one.
        other = list(scorer.outputs(prepared, model.untrained, inner_lrs, at)) if model.step else points
        part = Evaluation(
            curves_of(batch, points),
            curves_of(batch, other),
            list(answered(model, scorer, batch, points)),
        )
        parts.keep(part)
        found.add(part)
        progress(len(batch))
    return found


def answered(
    model: "MetaModel", scorer: Scorer, episodes: Sequence[Episode], points: Sequence[Outputs]
) -> Iterator[Answered]:
    """Yield the answers to episodes: of labels, from what was made of the queries; texts are written, both times."""
    method = LearnedMethod(scorer, model.start, model.inner_lrs)
    asked = replace(method, takes_support=False)
    for index, episode in enumerate(episodes):
        if episode.labels:
            ends = [label_answers(episode, points[k][index]) for k in (0, -1)]
        else:
            ends = [
                text_answers(asked, episode, Setting()),
                text_answers(method, episode, Setting(steps=scorer.steps)),
            ]
        yield Answered(episode.task, episode.kind, *ends)
