"""The algorithms of CONTRIBUTING.md, each one file of a user's own: trained, evaluated, compared, served."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SPLITS, make_config, meta_gradient, toy_tasks
from rich.console import Console
from serving_run import TEXTS, TICKETS, ask, examples, learn, make_run, request
from test_algorithms import START, WEIGHTS, inner_lrs, losses, run
from test_compare import REQUEST

from rayml.adapter import load_adapter
from rayml.algorithms.registry import parse_algorithm
from rayml.api import evaluate
from rayml.config import load_config, parse_config
from rayml.errors import ConfigError, RunError
from rayml.experiments.compare import compare
from rayml.model import load
from rayml.serving.adapter_files import read_adapter
from rayml.serving.replica import Replica
from rayml.serving.settings import Serving
from rayml.training.driver import train

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
QUIET = Console(quiet=True)
MATCHING = {"name": "rayml_matching:Matching", "sharpness": 20.0}


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    """The page's code, as files where the user works."""
    multi_step, matching = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name, code in (("rayml_multi_step", multi_step), ("rayml_matching", matching)):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


def config_for(folder, **changes):
    data = {"splits": SPLITS, "max_tokens": 64}
    return make_config(
        folder, **{"data": data, "outer": {"steps": 4}, "validation": {"every": 2, "episodes": 4}} | changes
    )


@pytest.mark.ray
def test_the_algorithm_of_the_tutorial_is_trained_evaluated_and_answers(tmp_path, local_mode):
    config = config_for(tmp_path, algorithm=MATCHING)
    run = train(config)
    assert load_config(run.config) == config  # its settings are kept
    records = run.records()
    assert records[-1]["query_loss"] != records[0]["query_loss"]
    found = evaluate(run.path, episodes=2)
    assert found["algorithm"] == MATCHING["name"]
    assert found["overall"]["episodes"] == 2
    task = toy_tasks(tasks=1, classes=3, per_class=4, seed=9)[0]
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"input": e.input, "target": e.target}) + "\n" for e in task.examples))
    load(run, checkpoint="newest").adapt(file).save(tmp_path / "new")
    predictor = load_adapter(tmp_path / "new")
    assert predictor.algorithm == config.algorithm
    seen = [predictor.predict(e.input).text == e.target for e in task.examples]
    assert all(seen)  # what is asked is among the examples: most of the attention is on itself


@pytest.mark.ray
def test_it_is_compared(tmp_path, local_mode):
    values = config_for(tmp_path).model_dump(mode="json")
    variant = "algorithm.name=rayml_matching:Matching", "algorithm.sharpness=20"
    asked = replace(REQUEST, methods=["multitask"], variants={"matching": variant})
    summary = compare(values, "here", asked, tmp_path / "all", "", False, QUIET)
    rows = {row["method"]: row for row in summary["kinds"]["label"]["methods"]}
    assert rows.keys() == {"multitask", "matching"}
    assert rows["matching"]["tokens"] > 0
    assert rows["matching"]["over_baseline"]


def test_it_is_served(tmp_path):
    run = make_run(tmp_path / "m", algorithm=MATCHING)
    replica = Replica(Serving.model_validate({"run": str(run.path), "adapters": {"cached_bytes": 1}}))
    (manifest,) = learn(replica, request())
    file = tmp_path / "tickets.jsonl"
    file.write_text("\n".join(map(json.dumps, examples(TICKETS))))
    load(run).adapt(file).save(tmp_path / "tickets")
    predictor = load_adapter(tmp_path / "tickets")
    for text, answer in zip(TEXTS, ask(replica, manifest.id, TEXTS), strict=True):
        assert answer["probabilities"] == pytest.approx(predictor.predict(text).probabilities, abs=1e-4)
    replica.engine.close()
    # An adapter that names what this run does not know is refused, and nothing is imported for it.
    card = tmp_path / "tickets" / "rayml.json"
    card.write_text(card.read_text().replace("rayml_matching:Matching", "rayml_multi_step:MultiStep"))
    with pytest.raises(RunError, match="learned by 'rayml_multi_step:MultiStep'; this run knows"):
        read_adapter(tmp_path / "tickets", replica.adapter_cache.fits)


def test_a_schedule_alone_is_an_algorithm():
    """The gradient of the weighted query losses after one step and after two, with the steps held constant."""
    algorithm = parse_algorithm({"name": "rayml_multi_step:MultiStep", "decay": 0.25})
    assert algorithm.runs_sharded
    assert algorithm.passes(2) == (2, 2)
    found = meta_gradient(algorithm, losses("support"), losses("query"), START, inner_lrs(), 2, WEIGHTS)
    plain = parse_algorithm({"name": "fomaml"})
    one, two = (run(plain, steps=steps) for steps in (1, 2))
    for name in START:
        torch.testing.assert_close(found.start[name], 0.25 * one.start[name] + two.start[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing:Here", "No module named 'nothing'"),
        ("rayml_matching:Nothing", "has no attribute 'Nothing'"),
        ("json:dumps", "is no subclass"),
        ("fomamll", "is none of fomaml, fomaml_plus"),
    ],
)
def test_a_name_that_is_no_algorithm_is_refused(name, message, tmp_path):
    values = config_for(tmp_path).model_dump(mode="json")
    with pytest.raises(ConfigError, match=message):
        parse_config(values, "here", [f"algorithm.name={name}"])
