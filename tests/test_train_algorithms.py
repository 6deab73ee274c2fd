"""Every algorithm and mode from end to end: trained, evaluated, exported, taught a new task.

Starting a worker takes ten times as long as its training here, so workers are started only where that is what is
tested: in mode full, and in test_train.py.
"""

import json
import shutil

import pytest
import torch
from conftest import SPLITS, make_config, toy_tasks, training_here, write_tasks
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from rayml.adapter import load_adapter
from rayml.algorithms.registry import REGISTERED
from rayml.api import evaluate
from rayml.errors import DataError, RunError
from rayml.lm.catalog import resolve_model
from rayml.lm.load import load_base
from rayml.model import load
from rayml.runs.checkpoint import is_best, is_enough, newest_checkpoint, verify
from rayml.runs.folder import RunFolder
from rayml.training.driver import train

pytestmark = pytest.mark.ray
QUIET = Console(quiet=True)


def config_for(folder, name, mode="adapters", engine="local", **changes):
    values = {
        "workers": 2 if engine == "zero" else 1,
        "mode": mode,
        "engine": engine,
        "algorithm": {"name": name},
        "model": {"attention": "eager"},
        "data": {"splits": SPLITS, "max_tokens": 64},
        "outer": {"steps": 3, "lr": 1e-3},
        "validation": {"every": 3, "episodes": 4},
        "run": {"checkpoint_every": 2},
    }
    return make_config(folder, **values | changes)


def tokens():
    return torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def assert_answers(folder, run):
    """A new task's folder, in the user's own words."""
    task = toy_tasks(tasks=1, classes=3, per_class=4, seed=9)[0]
    file = folder / "few.jsonl"
    file.write_text("".join(json.dumps({"input": e.input, "target": e.target}) + "\n" for e in task.examples))
    load(run).adapt(file).save(folder / "new")
    answer = load_adapter(folder / "new").predict(task.examples[0].input)
    assert set(answer.probabilities) == set(task.options)
    assert sum(answer.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", REGISTERED)
def test_an_algorithm_from_end_to_end(tmp_path, tiny, name, local_mode):
    data = {"splits": SPLITS, "max_tokens": 64, "weighting": "dynamic"}
    regularize = {"lora_dropout": 0.1, "label_smoothing": 0.1, "token_dropout": 0.1}
    config = config_for(tmp_path, name, data=data, regularize=regularize)
    run = train(config)
    records = run.records()
    assert [record["step"] for record in records] == [1, 2, 3]
    assert 0 <= records[-1]["val_accuracy_after"] <= 1
    assert verify(newest_checkpoint(run.best)) == 3
    found = evaluate(run.path, episodes=2)
    assert found["algorithm"] == name
    assert found["overall"]["episodes"] == 2
    load(run).save(tmp_path / "exported")
    stock = PeftModel.from_pretrained(load_base(tiny, "float32"), tmp_path / "exported")
    with torch.no_grad():  # the start has moved: its B is not zero any more
        assert not torch.equal(stock(input_ids=tokens()).logits, load_base(tiny, "float32")(input_ids=tokens()).logits)
    with pytest.raises(RunError, match="exists already"):
        load(run).save(tmp_path / "exported")
    assert_answers(tmp_path, run)


def test_what_tells_classes_apart_refuses_free_text_before_it_is_trained_and_where_it_is_evaluated(
    tmp_path, local_mode
):
    rows = [{"task": "toy-5", "input": f"say {word}", "target": f"{word} {word}"} for word in "abcdefghij"]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for(tmp_path, "protonet", outer={"steps": 1}, validation={"every": 0})
    run = train(config)
    with pytest.raises(DataError, match="'toy-5' is free text; protonet tells classes apart"):
        evaluate(run.path, data=str(texts), episodes=2)
    tasks = tuple(task for task in toy_tasks() if task.name != "toy-5")
    write_tasks(tmp_path / "toy.jsonl", tasks)
    both = config.data.model_copy(update={"path": (*config.data.path, str(texts))})
    other = config.run.model_copy(update={"dir": str(tmp_path / "other")})
    with pytest.raises(DataError, match="'toy-5' is free text; protonet tells classes apart"):
        train(config.model_copy(update={"data": both, "run": other}))


def assert_full_run_is_whole(folder, run):
    """It scores, its model loads in stock transformers and has moved, and a new task can be learned."""
    assert 0 <= run.records()[-1]["val_accuracy_after"] <= 1
    found = evaluate(run.path, episodes=2)
    assert found["overall"]["episodes"] == 2
    load(run).save(folder / "exported")
    stock, before = (AutoModelForCausalLM.from_pretrained(p) for p in (folder / "exported", resolve_model("tiny")))
    at_the_end = AutoModelForCausalLM.from_pretrained(run.model)
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), at_the_end.parameters(), strict=True))
    with torch.no_grad():
        assert not torch.equal(stock(input_ids=tokens()).logits, before(input_ids=tokens()).logits)
    assert_answers(folder, run)


FULL = {
    "outer": {"steps": 4, "lr": 1e-2, "optimizer": "sgd", "clip_norm": 0.0},
    "validation": {"every": 2, "episodes": 4},
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Four steps of mode full by ZeRO over two workers."""
    pytest.importorskip("deepspeed")
    return train(config_for(tmp_path_factory.mktemp("sharded"), "fomaml_plus", "full", "zero", **FULL))


@pytest.mark.workers
def test_mode_full_from_end_to_end_is_one_and_the_same_by_both_engines(sharded, tmp_path):
    """One worker adapts to whole tasks, or two share the rows of each: the same outer steps."""
    with training_here():
        local = train(config_for(tmp_path, "fomaml_plus", "full", "local", **FULL))
    losses = []
    for name, run in (("local", local), ("zero", sharded)):
        (tmp_path / name).mkdir()
        assert_full_run_is_whole(tmp_path / name, run)
        losses.append([[r["support_loss"], r["query_loss"], r.get("val_accuracy_after", 0.0)] for r in run.records()])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)


@pytest.mark.workers
def test_a_sharded_run_goes_on_exactly_and_refuses_another_number_of_workers(sharded, tmp_path):
    config = config_for(tmp_path, "fomaml_plus", "full", "zero", **FULL)
    shutil.copytree(sharded.path, config.run.dir)
    shutil.rmtree(RunFolder(config.run.dir).checkpoints / "step_00000004")
    run = train(config, resume=True)
    assert [r["query_loss"] for r in run.records()] == [r["query_loss"] for r in sharded.records()]
    with pytest.raises(RunError, match=r"same engine, mode, workers, zero\.stage alone.*rayml export"):
        train(config.model_copy(update={"workers": 1, "outer": config.outer.model_copy(update={"steps": 5})}), True)


def test_training_stops_early_and_the_best_checkpoint_is_used(tmp_path, local_mode):
    """A rate that forgets everything: the first validation is the best, or nearly."""
    config = config_for(
        tmp_path,
        "fomaml_plus",
        outer={"steps": 60, "lr": 0.5},
        validation={"every": 1, "episodes": 8, "patience": 3},
    )
    run = train(config)
    records = run.records()
    scores = [record["val_accuracy_after"] for record in records]
    assert len(records) < 60
    assert is_enough(scores, 3)
    assert not is_enough(scores[:-1], 3)
    best = scores.index(max(scores)) + 1
    assert best == len(scores) - 3
    assert verify(newest_checkpoint(run.best)) == best
    assert run.trained()[1] == newest_checkpoint(run.best)
    assert run.trained("newest")[1] == newest_checkpoint(run.checkpoints)
    assert verify(newest_checkpoint(run.checkpoints)) == len(records)
    assert train(config, resume=True).records() == records  # it is over


@pytest.mark.parametrize("mode", ["adapters", "full"])
def test_patience_without_a_task_for_meta_val_is_said_to_have_no_effect_and_the_newest_is_used(
    tmp_path, local_mode, capsys, mode
):
    splits = {"val": 0.0, "test": 0.0, "test_tasks": ["toy-5"]}
    changes = {"data": {"splits": splits}, "outer": {"steps": 2}, "validation": {"every": 1, "patience": 1}}
    run = train(make_config(tmp_path, mode=mode, **changes))
    assert "validation.patience: there is no task for meta-val, so it never stops" in capsys.readouterr().err
    assert run.trained()[1] == newest_checkpoint(run.checkpoints)
    with pytest.raises(RunError, match="no validation has chosen a best checkpoint"):
        run.trained("best")
    assert run.model.exists() == (mode == "full")


def test_when_it_is_enough():
    assert not is_enough([0.5, 0.4, 0.4], 0)
    assert not is_enough([0.5, 0.4, 0.4], 3)
    assert is_enough([0.5, 0.4, 0.4], 2)
    assert not is_enough([0.5, 0.4, 0.6, 0.6], 2)
    assert not is_enough([], 2)
    assert is_best([0.5])
    assert not is_best([0.5, 0.5])
