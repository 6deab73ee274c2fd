"""Few shots of few classes, or of all of them (FewMany: Yehudai and Bandel 2024, arXiv 2404.12365), on data sets.

    python jobs/few_many.py clinc150.jsonl --shots 5,10 --draws 5 --most 1000
    python jobs/few_many.py sets/*.jsonl --ways 4 --shots 1,2,4,8,16 --draws 20 --setfit --json few.json

A file is one data set, whatever tasks it names. Each draw takes some of its classes, or all, and so many examples of
each; all others of these are asked, or at most `--most` of a class. Beside each start stand the sentence encoder MiniLM
as it is, with the nearest centroid and with logistic regression, both also with each label's own text as one more
example; and SetFit, if it is asked for; and of several starts the one that `rayml.choose_start` would take for each
draw. `--labels` replaces the labels by codes such as K27, by unrelated words, or by those of other classes. Intervals:
95 %, over data sets and their draws; of one data set, over its draws.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import rayml
from rayml.algorithms.prototypes import prototypes, squared_distances
from rayml.experiments.classifiers import PLAIN_HEADS, WITH_NAMES, classifier_for
from rayml.lm.catalog import MINILM
from rayml.lm.scorer import accuracy
from rayml.lm.sides import TaskSide
from rayml.model import MetaModel
from rayml.runs.reports import COLOURS, file_pyplot, save_figure
from rayml.starts.choice import cross_validate, split_halves
from rayml.tasks.episodes import Episode
from rayml.tasks.read import read_rows, rows_from_examples
from rayml.tasks.statistics import intervals
from rayml.tasks.table import build_tasks
from rayml.tasks.task import Example, Task

TOGETHER = 64
"""Texts in one forward of the frozen encoder."""
CHOSEN = "the start that suits"
WORDS = [
    *("river", "apple", "window", "guitar", "cloud", "hammer", "rabbit", "velvet", "island", "copper"),
    *("garden", "pencil", "thunder", "basket", "marble", "ladder", "pepper", "lantern", "meadow", "button"),
]
"""Labels that say nothing of any class."""
RELABELED: dict[str, Callable[[list[str], random.Random], list[str]]] = {
    "own": lambda labels, _rng: labels,
    "codes": lambda labels, rng: [f"{'KQTX'[n % 4]}{10 + n // 4}" for n in rng.sample(range(4 * 90), len(labels))],
    "words": lambda labels, rng: rng.sample(WORDS, len(labels)),
    "swapped": lambda labels, _rng: [*labels[1:], labels[0]],
}
Scores = dict[str, dict[str, list[float]]]
"""By method, by data set: an accuracy for each draw."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--starts", default="minilm", help="starts, or run folders, comma-separated; or none")
    parser.add_argument("--ways", type=int, help="classes of a draw; else all of a data set")
    parser.add_argument("--shots", default="5,10")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--most", type=int, default=20, help="queries of a class")
    parser.add_argument("--steps", type=int, help="inner steps; else the start's own")
    parser.add_argument("--labels", choices=list(RELABELED), default="own", help="what each class is called")
    parser.add_argument("--setfit", action="store_true", help="SetFit, too: minutes a draw where classes are many")
    parser.add_argument("--json", type=Path, help="write the draws' accuracies here")
    parser.add_argument("--plot", type=Path, help="plot accuracies over shots here, as a PNG")
    asked = parser.parse_args()
    tasks = [data_set(path) for path in asked.data]
    if asked.labels == "words" and (most := max(asked.ways or len(task.classes) for task in tasks)) > len(WORDS):
        parser.error(f"--labels words has {len(WORDS)} words for {most} classes: give --ways")
    if asked.plot and asked.starts == "none":
        parser.error("--plot shows the lead of a start: name one with --starts")
    models = {name: rayml.load(name) for name in filter(None, asked.starts.replace("none", "").split(","))}
    encoder = Encoder(rayml.load(MINILM))
    setfit = classifier_for("setfit", MINILM, torch.device("cpu"), seed=0) if asked.setfit else None
    everything: dict[str, Scores] = {}
    for shots in map(int, asked.shots.split(",")):
        scores = everything[f"{shots} shots"] = defaultdict(lambda: defaultdict(list))
        for task in tasks:
            began = time.monotonic()
            for draw in range(asked.draws):
                episode = drawn(task, asked.ways, shots, asked.most, draw)
                episode = relabeled(episode, asked.labels)
                found = encoder.scores(episode) | {n: of_start(m, episode, asked.steps) for n, m in models.items()}
                if len(models) > 1 and shots > 1:
                    found[CHOSEN] = found[better(models, episode)]
                if setfit:
                    found["setfit"] = accuracy(episode, setfit.log_probs(episode, setfit.heads[0]))
                for name, score in found.items():
                    scores[name][task.name].append(score)
            means = ", ".join(f"{name} {fmean(of[task.name]):.3f}" for name, of in scores.items())
            print(f"{shots} shots, {task.name}: {means}   ({time.monotonic() - began:.0f} s)", flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(everything, indent=1) + "\n")
        print(table(scores, list(models)), flush=True)
    if asked.plot:
        plot(everything, list(models), asked.plot)


def data_set(path: str) -> Task:
    """Return all rows of a file as one task."""
    name = Path(path).stem
    ((task, *_), _) = build_tasks([replace(row, task=name, options=()) for row in read_rows([path])])
    print(f"{name}: {len(task.classes)} classes, {len(task.examples)} texts", flush=True)
    return task


def drawn(task: Task, ways: int | None, shots: int, most: int, seed: int) -> Episode:
    """Return an episode of some classes that have more than `shots` examples, or of all of them."""
    rng = random.Random(f"{task.name} {seed}")
    labels = [label for label, examples in task.classes.items() if len(examples) > shots]
    labels = rng.sample(labels, min(ways, len(labels))) if ways else labels
    support: list[Example] = []
    query: list[Example] = []
    for label in labels:
        examples = rng.sample(task.classes[label], len(task.classes[label]))
        support += examples[:shots]
        query += examples[shots : shots + most]
    return Episode(seed, task.name, tuple(support), tuple(query), {label: label for label in labels}, task.kind)


def relabeled(episode: Episode, how: str) -> Episode:
    """Return the episode with other labels, drawn anew for it."""
    own = list(episode.labels)
    new = dict(zip(own, RELABELED[how](own, random.Random(f"{episode.task} {episode.index}")), strict=True))
    support, query = (
        tuple(replace(example, target=new[example.target]) for example in side)
        for side in (episode.support, episode.query)
    )
    return replace(episode, support=support, query=query, labels={label: label for label in new.values()})


class Encoder:
    """A sentence encoder as it is. What it made of a text is kept."""

    def __init__(self, model: MetaModel):
        self.model = model
        self._vectors: dict[Example, Tensor] = {}

    def scores(self, episode: Episode) -> dict[str, float]:
        """Return the accuracy of the nearest centroid, and of logistic regression, without and with label names."""
        labels = {label: number for number, label in enumerate(episode.labels)}
        names = tuple(Example(label, label) for label in labels)
        query, right = self._read(episode.query), [labels[example.target] for example in episode.query]
        scores: dict[str, float] = {}
        for with_names, examples in (("", episode.support), (WITH_NAMES, (*episode.support, *names))):
            support, classes = self._read(examples), torch.tensor([labels[example.target] for example in examples])
            nearest = squared_distances(query[None], prototypes(support[None], classes[None]))[0].argmin(-1)
            regression = LogisticRegression(max_iter=1000, C=10).fit(support.numpy(), classes.numpy())
            for head, answers in zip(PLAIN_HEADS, (nearest.numpy(), regression.predict(query.numpy())), strict=True):
                scores[head + with_names] = float((answers == np.array(right)).mean())
        return scores

    def _read(self, examples: tuple[Example, ...]) -> Tensor:
        new = [example for example in examples if example not in self._vectors]
        rows = self.model.encoder.rows(new, True)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        with torch.no_grad():
            for first in range(0, len(order), TOGETHER):
                some = order[first : first + TOGETHER]
                side = TaskSide(self.model.lm, [[rows[i] for i in some]], [[]], [[]], self.model.encoder.pad)
                for i, vector in zip(some, self.model.lm.vectors(None, side.batch)[0], strict=True):
                    vector = torch.nn.functional.normalize(vector, dim=-1)
                    self._vectors[new[i]] = vector
        return torch.stack([self._vectors[example] for example in examples])


def of_start(model: MetaModel, episode: Episode, steps: int | None) -> float:
    """Return the accuracy after adapting from a start."""
    adapter = model.adapt(as_rows(episode.kind, episode.support), name=episode.task, steps=steps)
    answers = adapter.predict([row["input"] for row in as_rows(episode.kind, episode.query)])
    return fmean(answer.label == e.target for answer, e in zip(answers, episode.query, strict=True))


def as_rows(kind: str, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return examples as a user gives them: an input in parts is a dict."""
    told = {"kind": kind} if kind else {}
    return [{"input": dict(e.parts) or e.input, "target": e.target, **told} for e in examples]


def better(models: dict[str, MetaModel], episode: Episode) -> str:
    """Return the start that answers each half of the support best after learning the other."""
    one, other = split_halves(rows_from_examples(as_rows(episode.kind, episode.support)))
    return min(models, key=lambda name: cross_validate(models[name], one, other)[0])


def table(scores: Scores, starts: list[str]) -> str:
    """Return lines of each method's mean, and of each start's lead over every method that is none."""
    values = {name: np.array(list(of.values())) for name, of in scores.items()}  # [data sets, draws]
    values = {name: of if len(of) > 1 else of[0] for name, of in values.items()}
    lines = [f"  {name:22} {shown(intervals(of[None])[0])}" for name, of in values.items()]
    for start in (*starts, *({CHOSEN} & values.keys())):
        for name in (name for name in values if name not in (CHOSEN, *starts) or (start == CHOSEN and name in starts)):
            lines.append(f"  {start} less {name:22} {shown(intervals((values[start] - values[name])[None])[0])}")
    return "\n".join(lines)


def plot(everything: dict[str, Scores], starts: Sequence[str], picture: Path) -> None:
    """Plot accuracies over shots, and the lead of the first start over every method that is no start."""
    figure, (left, right) = file_pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_shots = sorted((int(name.split()[0]), scores) for name, scores in everything.items())
    shots = [number for number, _ in by_shots]
    # By method, for each number of shots: [data sets, draws].
    values = {name: [np.array(list(scores[name].values())) for _, scores in by_shots] for name in by_shots[0][1]}
    baselines = [name for name in values if name not in (CHOSEN, *starts)]
    colours = dict(zip(baselines, reversed(COLOURS), strict=False)) | dict(zip(starts, COLOURS, strict=False))
    for method in (*baselines, *starts):
        left.plot(shots, [of.mean() for of in values[method]], label=method, color=colours[method], marker="o")
    for number, method in enumerate(baselines):
        differences = [ours - theirs for ours, theirs in zip(values[starts[0]], values[method], strict=True)]
        leads = [intervals(of[None])[0] for of in differences]
        bars = [[lead["mean"] - lead["low"] for lead in leads], [lead["high"] - lead["mean"] for lead in leads]]
        places = [shot * 1.06 ** (number - 1.5) for shot in shots]  # side by side
        means = [lead["mean"] for lead in leads]
        right.errorbar(places, means, bars, capsize=3, linestyle="", color=colours[method], marker="o")
    right.axhline(0, color="grey", linewidth=1)
    left.set(ylabel="accuracy, mean over data sets")
    right.set(ylabel=f"{starts[0]} minus each method, 95 % intervals")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="examples per class", xticks=shots, xticklabels=shots)
        axis.grid(alpha=0.25)
    left.legend(frameon=False)
    save_figure(figure, picture)


def shown(found: dict[str, float]) -> str:
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


if __name__ == "__main__":
    main()
