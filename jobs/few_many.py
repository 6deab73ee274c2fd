"""All classes of a data set at once, by few shots of each (FewMany: Yehudai and Bandel 2024, arXiv 2404.12365).

    python jobs/few_many.py clinc150.jsonl --starts minilm --shots 5,10 --draws 5

All rows are one task, whatever task they name. Each draw takes so many examples of every class; all others are asked,
or at most `--most` of a class. Beside each start stands the sentence encoder MiniLM as it is: the nearest centroid,
and logistic regression. Accuracies of the draws are printed, and their mean.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import rayml
from rayml.algorithms.prototypes import prototypes, squared_distances
from rayml.lm.batch import TaskSide
from rayml.model import MetaModel
from rayml.tasks.episodes import Episode
from rayml.tasks.read import read_rows
from rayml.tasks.table import build_tasks
from rayml.tasks.task import Task

TOGETHER = 64
"""Texts in one forward of the frozen encoder."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--starts", default="minilm", help="starts, or run folders, comma-separated; or none")
    parser.add_argument("--shots", default="5,10")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--most", type=int, default=1000, help="queries of a class")
    parser.add_argument("--steps", type=int, help="inner steps; else the start's own")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    ((task, *_), _) = build_tasks([replace(row, task="all", options=()) for row in read_rows([asked.data])])
    print(f"{len(task.classes)} classes, {len(task.examples)} texts", flush=True)
    models = {name: rayml.load(name) for name in filter(None, asked.starts.replace("none", "").split(","))}
    encoder = rayml.load("minilm")
    vectors = frozen_vectors(encoder, task)
    found: dict[str, list[float]] = {}
    for shots in map(int, asked.shots.split(",")):
        for draw in range(asked.draws):
            episode = drawn(task, shots, asked.most, draw)
            scores = of_encoder(episode, vectors) | {
                n: of_start(model, episode, asked.steps) for n, model in models.items()
            }
            for name, score in scores.items():
                found.setdefault(f"{shots} shots, {name}", []).append(score)
            print(shots, draw, {name: round(score, 4) for name, score in scores.items()}, flush=True)
    for name, draws in found.items():
        print(f"{name:45} {fmean(draws):.3f}   {' '.join(f'{one:.3f}' for one in draws)}")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


def drawn(task: Task, shots: int, most: int, seed: int) -> Episode:
    """Return an episode of all classes that have more than `shots` examples."""
    rng = random.Random(seed)
    support, query = [], []
    labels = [label for label, examples in task.classes.items() if len(examples) > shots]
    for label in labels:
        examples = rng.sample(task.classes[label], len(task.classes[label]))
        support += examples[:shots]
        query += examples[shots : shots + most]
    return Episode(seed, task.name, tuple(support), tuple(query), {label: label for label in labels})


def frozen_vectors(model: MetaModel, task: Task) -> dict[str, Tensor]:
    """Return the unit vector of each text, by the encoder as it is."""
    rows = model.encoder.rows(task.examples, True)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for first in range(0, len(order), TOGETHER):
            some = order[first : first + TOGETHER]
            side = TaskSide(model.lm, [[rows[i] for i in some]], [[]], [[]], model.encoder.pad)
            for i, vector in zip(some, model.lm.states(None, side.batch)[0], strict=True):
                found[task.examples[i].input] = vector
    return found


def of_encoder(episode: Episode, vectors: dict[str, Tensor]) -> dict[str, float]:
    """Return the accuracy of the nearest centroid, and of logistic regression, of frozen vectors."""
    labels = {label: number for number, label in enumerate(episode.labels)}
    support, query = (torch.stack([vectors[e.input] for e in side]) for side in (episode.support, episode.query))
    classes, right = (torch.tensor([labels[e.target] for e in side]) for side in (episode.support, episode.query))
    nearest = squared_distances(query[None], prototypes(support[None], classes[None]))[0].argmin(-1)
    regression = LogisticRegression(max_iter=1000, C=10).fit(support.numpy(), classes.numpy())
    chosen = torch.as_tensor(regression.predict(query.numpy()))
    return {
        "nearest centroid": float((nearest == right).float().mean()),
        "logistic regression": float((chosen == right).float().mean()),
    }


def of_start(model: MetaModel, episode: Episode, steps: int | None) -> float:
    """Return the accuracy after adapting from a start to all classes at once."""
    adapter = model.adapt([(e.input, e.target) for e in episode.support], name="all", steps=steps)
    answers = adapter.predict([example.input for example in episode.query])
    return fmean(answer.label == e.target for answer, e in zip(answers, episode.query, strict=True))


if __name__ == "__main__":
    main()
