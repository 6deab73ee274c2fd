"""Draw episodes: each is a pure function of (seed, index) and the tasks, whatever the number of workers."""

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rayml.errors import DataError
from rayml.tasks.task import Example, Task

LabelScheme = Literal["words", "letters"]
LETTERS = string.ascii_uppercase
# Episodes that are not trained on have seeds of their own, far from any training seed.
VALIDATION_SEED, EVALUATION_SEED, SUPPORT_SEED, DISTILLATION_SEED = 1_000_003, 2_000_003, 4_000_037, 5_000_011


@dataclass(frozen=True, slots=True)
class Episode:
    """The support and query of one task, used once.

    Targets are as the model sees them. `labels` maps them back to the task's own words, in the order of the
    options; it is empty for free text.
    """

    index: int
    task: str
    support: tuple[Example, ...]
    query: tuple[Example, ...]
    labels: dict[str, str]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Sampler:
    """How episodes are drawn. For a label task `shots` and `queries` count per class, else per task."""

    ways: int
    shots: int
    queries: int
    labels: LabelScheme
    seed: int
    sampling_exponent: float = 1.0
    """A task's share of the episodes is proportional to its number of classes to this power: 0 is uniform."""
    replayed: frozenset[str] = frozenset()
    """Tasks that an earlier run was trained on, by name. Together they have a fixed share of the episodes."""
    replay: float = 0.0
    """That share."""
    fewest_ways: int | None = None
    fewest_shots: int | None = None
    """Fewest classes, or shots, of an episode, up to `ways`, or `shots`; None for a fixed number."""

    def episode(self, tasks: Sequence[Task], index: int) -> Episode:
        """Return episode `index`: draw a task by its share, then some of its classes, then their examples.

        A task with fewer classes than `ways` gives all. Support and query never share an example; a task's examples
        have distinct texts (see `rayml.tasks.table`), so they share no text either.
        """
        rng = random.Random(f"{self.seed}/{index}")  # a str seed is hashed by SHA-512: the same on every machine
        (task,) = rng.choices(tasks, self._weights(tasks))
        ways, shots = draw_size(rng, self.fewest_ways, self.ways), draw_size(rng, self.fewest_shots, self.shots)
        chosen = rng.sample(list(task.classes), min(ways, len(task.classes)))
        examples = {name: rng.sample(task.classes[name], shots + self.queries) for name in chosen}
        shown = shown_labels(task, chosen, self.labels)
        support = [(name, example) for name in chosen for example in examples[name][:shots]]
        query = [(name, example) for name in chosen for example in examples[name][shots:]]
        return Episode(
            index=index,
            task=task.name,
            support=tuple(relabel(example, shown.get(name)) for name, example in support),
            query=tuple(relabel(example, shown.get(name)) for name, example in query),
            labels={label: name for name, label in shown.items()},
            kind=task.kind,
        )

    def _weights(self, tasks: Sequence[Task]) -> list[float]:
        """Return the weight of each task in the draw."""
        weights = [len(task.classes) ** self.sampling_exponent for task in tasks]
        replayed = [task.name in self.replayed for task in tasks]
        if not any(replayed) or all(replayed):
            return weights
        sums = {group: sum(w for w, r in zip(weights, replayed, strict=True) if r == group) for group in (True, False)}
        scales = {True: self.replay / sums[True], False: (1 - self.replay) / sums[False]}
        return [weight * scales[is_replayed] for weight, is_replayed in zip(weights, replayed, strict=True)]

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise DataError, with every class that is too small for an episode."""
        need = self.shots + self.queries
        short = [
            f"task {task.name!r}{f', class {name!r}' if name else ''}: has {len(examples)}, needs {need}"
            for task in tasks
            for name, examples in task.classes.items()
            if len(examples) < need
        ]
        short += [f"task {task.name!r}: has one class, needs two" for task in tasks if len(task.options) == 1]
        if short:
            raise DataError(
                f"too few distinct examples for shots={self.shots} + queries={self.queries}:\n  "
                + "\n  ".join(short)
                + "\nAdd examples, lower data.shots or data.queries, or set data.drop_small_classes=true."
            )
        too_many = [task.name for task in tasks if self.labels == "letters" and min(self.ways, len(task.options)) > 26]
        if too_many:
            raise DataError(f"data.labels=letters has 26 letters; lower data.ways for {', '.join(too_many)}")


def draw_size(rng: random.Random, fewest: int | None, most: int) -> int:
    """Return a log-uniform number from `fewest` to `most`, so that few and many are both practised."""
    return most if fewest is None else round(math.exp(rng.uniform(math.log(fewest), math.log(most))))


def shown_labels(task: Task, chosen: Sequence[str], scheme: LabelScheme) -> dict[str, str]:
    """Return the label that the model sees for each chosen class: its own word, or the letter of its index in `chosen`.

    `chosen` is in random order, so letters are permuted in every episode: tasks become mutually exclusive, and the
    model has to adapt (Yin et al. 2020, arXiv 1912.03820).
    """
    if not task.options:
        return {}
    if scheme == "words":
        return {name: name for name in chosen}
    return {name: LETTERS[index] for index, name in enumerate(chosen)}


def relabel(example: Example, label: str | None) -> Example:
    """Return the example with the label that the model sees; free text (None) stays as it is."""
    return example if label is None else replace(example, target=label)
