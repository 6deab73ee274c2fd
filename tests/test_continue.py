"""`rayml train --continue`: begins with what a run learned, replays its tasks, and says what was forgotten."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import make_config, toy_tasks, training_here, write_tasks
from rich.console import Console
from serving_run import make_run

from rayml import model as model_module
from rayml.config import Config
from rayml.errors import ConfigError, DataError, RunError
from rayml.experiments.evaluate_command import held_out_tasks, training_tasks
from rayml.model import load, read_start
from rayml.runs.folder import RunFolder
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.splits import Splits
from rayml.training import continual as continuing
from rayml.training.continual import (
    FORGETTING,
    OldRun,
    changed_display_keys,
    load_old,
    old_run,
    report_forgetting,
    with_replay,
)
from rayml.training.driver import train


def renamed(seed: int, prefix: str):
    return tuple(replace(task, name=f"{prefix}-{task.name[-1]}") for task in toy_tasks(seed=seed))


@pytest.fixture(autouse=True)
def few_episodes(monkeypatch):
    monkeypatch.setattr(continuing, "EPISODES", 8)


@pytest.fixture(scope="module")
def old(tmp_path_factory, local_ray) -> RunFolder:
    config = make_config(tmp_path_factory.mktemp("old"), outer={"steps": 4, "warmup_steps": 0, "lr": 0.01})
    with training_here():
        return train(config)


def new_config(folder, old: RunFolder, **changes) -> Config:
    path = write_tasks(folder / "new.jsonl", renamed(9, "new"))
    splits = {"val": 0.0, "test": 0.0, "test_tasks": ["new-5"]}
    base = make_config(
        folder,
        data={"path": str(path), "splits": splits, "replay": 0.25},
        outer={"steps": 4, "warmup_steps": 0, "lr": 0.01},
        run={"dir": str(folder / "run"), "checkpoint_every": 2, "continues": str(old.path)},
    )
    return Config.model_validate(base.model_dump() | changes)


@pytest.mark.ray
def test_a_run_goes_on_from_another_and_resumes_bit_for_bit(old, tmp_path, local_mode, capsys, monkeypatch):
    whole = train(new_config(tmp_path, old))
    told = capsys.readouterr().err
    assert "before and after: 32 of 32" in told
    assert "replayed as this config shows them" not in told
    # It began where the old one ended, and went on from there.
    begun, then = whole.read_untrained(), load(old)
    assert all(torch.equal(begun[name], then.start[name]) for name in begun)
    now = load(whole)
    assert any(not torch.equal(now.start[name], then.start[name]) for name in begun)
    assert now.inner_lrs.keys() == then.inner_lrs.keys()

    # What is forgotten stands beside what is new.
    found = json.loads((whole.path / FORGETTING).read_text())
    assert found["continues"] == str(old.path)
    assert set(found["scores"]) == {"old tasks, accuracy", "new tasks, accuracy"}
    for ends in found["scores"].values():
        assert ends["change"]["mean"] == pytest.approx(ends["after"]["mean"] - ends["before"]["mean"], abs=1e-9)

    # Cut off while that was measured, it is made up for; both starts are asked on one base.
    (whole.path / FORGETTING).unlink()
    loaded, load_base = [], model_module.load_module
    monkeypatch.setattr(model_module, "load_module", lambda *args: (loaded.append(args), load_base(*args))[1])
    train(new_config(tmp_path, old), resume=True)
    assert len(loaded) == 1
    assert json.loads((whole.path / FORGETTING).read_text()) == found

    # Cut off after two steps and resumed it comes to the same.
    shutil.rmtree(whole.checkpoints / "step_00000004")
    resumed = load(train(new_config(tmp_path, old), resume=True))
    assert [record["step"] for record in whole.records()] == [1, 2, 3, 4]
    assert all(torch.equal(resumed.start[name], now.start[name]) for name in now.start)


@pytest.mark.ray
def test_it_is_said_where_old_tasks_are_replayed_in_another_form(old, tmp_path, local_mode, capsys):
    config = new_config(tmp_path, old)
    then = config.data
    now = then.model_copy(update={"prompt": "{input}?", "templates": {"toy-*": ("{input}!",)}})
    assert changed_display_keys(then, then) == []
    assert changed_display_keys(now, then) == ["data.prompt", "data.templates.toy-*"]
    assert changed_display_keys(then, now) == ["data.prompt"]
    outer = config.outer.model_copy(update={"steps": 1})
    train(config.model_copy(update={"data": now, "outer": outer}))
    assert f"data.prompt: not as in {old.path}; its tasks are replayed" in capsys.readouterr().err


@pytest.mark.ray
def test_old_episodes_have_their_share_and_scores_are_of_the_same_episodes(old, tmp_path):
    config = new_config(tmp_path, old)
    found = old_run(config)
    assert found is not None
    splits, replayed = with_replay(prepare_splits(config.data), found, config.data)
    assert replayed == {f"toy-{n}" for n in range(5)}
    assert not replayed & {task.name for task in (*splits.val, *splits.test)}
    sampler = replace(config.data.sampler(0), replayed=replayed, replay=0.25)
    drawn = Counter(sampler.episode(splits.train, index).task in replayed for index in range(2000))
    assert drawn[True] / 2000 == pytest.approx(0.25, abs=0.03)
    none = config.data.model_copy(update={"replay": 0.0})
    assert with_replay(prepare_splits(config.data), found, none)[1] == frozenset()
    # A run beside itself has forgotten nothing.
    scores = report_forgetting(old, found, found.splits, Console(quiet=True))
    assert all(ends["change"] == {"mean": 0.0, "low": 0.0, "high": 0.0} for ends in scores.values())
    start, _ = read_start(old)
    assert all(torch.equal(start[name], weight) for name, weight in load(old).start.items())


@pytest.mark.parametrize(("dtype", "bases"), [("auto", 1), ("bfloat16", 2)])
def test_both_starts_are_asked_on_one_base_where_it_runs_in_one_dtype(dtype, bases, tmp_path, monkeypatch):
    settings = {"name": "tiny", "attention": "sdpa"}
    first = make_run(tmp_path / "first", model=settings | {"dtype": dtype})
    second = make_run(tmp_path / "second", model=settings | {"dtype": "auto"})
    loaded, load_base = [], model_module.load_module
    monkeypatch.setattr(model_module, "load_module", lambda *args: (loaded.append(args), load_base(*args))[1])
    before = load_old(OldRun(first, first.read_config(), Splits((), (), ())), load(second))
    assert len(loaded) == bases
    assert before.config.model == load(first).config.model


def test_old_tasks_without_enough_examples_for_an_episode_of_this_run_are_refused_or_left_out(tmp_path):
    """The old run may have taken fewer shots."""
    small, large = toy_tasks(2, per_class=8)
    large = replace(large, examples=tuple(replace(e, input=f"{e.input} {i}") for i in range(2) for e in large.examples))
    config = make_config(tmp_path)
    before = OldRun(RunFolder(tmp_path / "old"), config, Splits((small, large), (), ()))
    data = config.data.model_copy(update={"shots": 10, "replay": 0.25})
    with pytest.raises(DataError, match=r"task 'toy-0', class '\w+': has 8, needs 12"):
        with_replay(Splits(renamed(9, "new"), (), ()), before, data)
    data = data.model_copy(update={"drop_small_classes": True})
    splits, replayed = with_replay(Splits(renamed(9, "new"), (), ()), before, data)
    assert replayed == {"toy-1"} == {task.name for task in splits.train if task.name.startswith("toy")}


def test_what_the_old_run_was_trained_on_is_no_held_out_task(tmp_path, caplog):
    old_config = make_config(tmp_path)
    old = RunFolder(old_config.run.dir)
    old.begin(old_config, prepare_splits(old_config.data), resume=False)
    (tmp_path / "more").mkdir()
    config = new_config(tmp_path / "more", old)
    sampling = config.data.model_copy(update={"queries": 1})
    seen, unseen = (write_tasks(tmp_path / f"{n}.jsonl", toy_tasks()[n : n + 1]) for n in (0, 5))
    assert [task.name for task in held_out_tasks(config, sampling, [str(unseen)], "test")] == ["toy-5"]
    with pytest.raises(DataError, match=r"--data: 100 text\(s\) are trained on"):
        held_out_tasks(config, sampling, [str(seen)], "test")
    shutil.rmtree(old.path)
    assert all(task.name.startswith("new") for task in training_tasks(config))
    assert "which is gone" in caplog.text


@pytest.mark.ray
def test_what_cannot_be_continued_is_refused_before_anything_starts(old, tmp_path):
    with pytest.raises(RunError, match="no run here"):
        train(new_config(tmp_path, RunFolder(tmp_path / "nothing")))
    config = new_config(tmp_path, old)
    other = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 8})})
    with pytest.raises(ConfigError, match=r"lora\.rank must be the same as there"):
        train(other)
    same = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(old.path)})})
    with pytest.raises(RunError, match="is this run itself"):
        train(same)
    leaking = tuple(replace(task, name=f"leak-{task.name}") for task in toy_tasks() if task.name == "toy-5")
    path = write_tasks(tmp_path / "leak.jsonl", leaking)
    data = config.data.model_copy(
        update={"path": (str(path),), "splits": config.data.splits.model_copy(update={"test_tasks": ()})}
    )
    with pytest.raises(DataError, match=r"meta-train.*trained on"):
        train(config.model_copy(update={"data": data}))
