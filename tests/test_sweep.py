"""Sweeps: what is searched, what came of it, and a real one that is killed half-way."""

import csv
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_config

from rayml.config import dump_config, load_config
from rayml.errors import ConfigError, RunError
from rayml.experiments.search_space import Range, check_space, parse_space, round_point
from rayml.experiments.sweep import begin_sweep, concurrency, validation_scores
from rayml.experiments.sweep_report import Trial, TrialTable, plot, report_sweep


def test_ranges_are_read():
    found = parse_space(
        {"inner.lr": "loguniform(1e-3, 1)", "outer.lr": "uniform(0.1,0.2)", "lora.rank": "choice(4, 8)"}
        | {"inner.steps": "randint(1, 5)", "data.labels": "choice(words, letters)"}
    )
    assert [(one.kind, one.values) for one in found] == [
        ("loguniform", (0.001, 1.0)),
        ("uniform", (0.1, 0.2)),
        ("choice", (4, 8)),
        ("randint", (1, 5)),
        ("choice", ("words", "letters")),
    ]


def test_every_mistake_in_what_to_search_is_told_at_once():
    search = {"inner.rate": "uniform(0, 1)", "inner.lr": "loguniform(0, 1)", "outer.lr": "normal(0, 1)"}
    search |= {"lora.rank": "randint(1.5, 4)", "inner.steps": "choice(3)", "run.dir": "choice(a, b)"}
    search |= {"lora.alpha": "uniform(.nan, 1)", "inner.modules": "choice(*.lora_B, x)"}
    with pytest.raises(ConfigError) as raised:
        parse_space(search)
    assert len(str(raised.value).splitlines()) == 1 + len(search)
    with pytest.raises(ConfigError, match="nothing to search"):
        parse_space({})


def test_a_grid_has_equal_ratios_or_distances():
    assert Range("inner.lr", "loguniform", (0.001, 1.0)).spaced(4) == [0.001, 0.01, 0.1, 1.0]
    assert Range("outer.lr", "uniform", (0.0, 1.0)).spaced(3) == [0.0, 0.5, 1.0]
    assert Range("inner.steps", "randint", (1, 3)).spaced(5) == [1, 2, 3]
    assert Range("lora.rank", "choice", (4, 8)).spaced(9) == [4, 8]


def test_what_is_drawn_is_rounded_and_what_is_chosen_is_not():
    space = [Range("inner.lr", "loguniform", (0.01, 1.0)), Range("outer.lr", "choice", (0.03125, 0.5))]
    point = {"inner.lr": 0.123456, "outer.lr": 0.03125}
    assert round_point(point, space) == {"inner.lr": 0.123, "outer.lr": 0.03125}


def test_an_end_that_the_config_refuses_is_refused_before_the_start(tmp_path):
    values = make_config(tmp_path).model_dump(mode="json")
    check_space(parse_space({"tasks_per_step": "choice(2, 4)"}), values, "x.yaml")
    with pytest.raises(ConfigError, match=r"x.yaml with lora.rank=0"):
        check_space(parse_space({"lora.rank": "randint(0, 4)"}), values, "x.yaml")


@pytest.mark.parametrize(
    "key", ["outer.steps", "workers", "run.dir", "validation.every", "data.ways", "data.splits.val"]
)
def test_what_would_make_trials_incomparable_is_not_searched(key):
    with pytest.raises(ConfigError, match="could not be compared"):
        parse_space({key: "choice(1, 2)"})


@pytest.mark.parametrize(
    ("workers", "asked", "cpus", "gpus", "expected"),
    [(2, 0, 2, 0, 1), (1, 0, 8, 0, 8), (2, 3, 8, 0, 3), (2, 0, 64, 8, 4), (2, 0, 4, 8, 2)],
)
def test_trials_at_a_time_are_as_many_as_find_room(tmp_path, workers, asked, cpus, gpus, expected):
    config = make_config(tmp_path, workers=workers, sweep={"concurrent": asked})
    assert concurrency(config, cpus, 1, gpus) == expected


def test_more_trials_than_find_room_are_refused(tmp_path):
    config = make_config(tmp_path, workers=2, sweep={"concurrent": 2})
    with pytest.raises(ConfigError, match=r"sweep.concurrent: 2 trials of 2 workers .*; use 1"):
        concurrency(config, cpus=2, cpus_each=1, gpus=0)
    with pytest.raises(ConfigError, match="workers"):
        concurrency(config, cpus=1, cpus_each=1, gpus=0)


def test_what_is_raised_is_a_score():
    accuracy = {"step": 5, "val_accuracy_before": 0.25, "val_accuracy_after": 0.75}
    loss = {"step": 5, "val_loss_before": 3.0, "val_loss_after": 1.0}
    assert validation_scores(accuracy, "after")["score"] == 0.75
    assert validation_scores(accuracy, "gain")["score"] == 0.5
    assert validation_scores(loss, "after")["score"] == math.exp(-1)
    assert validation_scores(loss, "gain")["score"] == math.exp(-1) - math.exp(-3)
    both = accuracy | loss | {"val_score_before": 0.1, "val_score_after": 0.4}
    assert validation_scores(both, "after") == {"step": 5, "before": 0.1, "after": 0.4, "score": 0.4}
    assert validation_scores({"step": 5, "query_loss": 1.0}, "after") == {}
    assert validation_scores(loss | {"val_loss_after": math.nan}, "after")["score"] == -math.inf


RATES = [Range("inner.lr", "loguniform", (0.01, 1.0)), Range("outer.lr", "loguniform", (1e-4, 1e-2))]


def trials(space) -> list[Trial]:
    states = ("stopped", 0.9, 4), ("finished", 0.5, 8), ("finished", 0.7, 8), ("failed", None, 0)
    found = []
    for number, (state, score, step) in enumerate(states):
        point = {one.key: one.spaced(4)[number % len(one.spaced(4))] for one in space}
        error = "TrainingError: a loss is not finite" if state == "failed" else None
        found.append(
            Trial(f"t{number}", point, state, score, score and 0.25, score, step, 3.0, f"trials/t{number}", error)
        )
    return found


def test_the_best_trial_is_a_config_to_train(tmp_path, capsys):
    from rich.console import Console

    config = make_config(tmp_path, sweep={"search": {"inner.lr": "loguniform(0.01, 1)"}})
    best = report_sweep(config, RATES, trials(RATES), tmp_path, Console(width=200))
    assert best.name == "t2"  # the best of those that ran to their end
    written = load_config(tmp_path / "best.yaml")
    assert written.inner.lr == best.point["inner.lr"]
    assert written.outer.lr == best.point["outer.lr"]
    assert not written.sweep.search
    assert written.run.dir == str(tmp_path / "best")
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["name"] for row in rows] == ["t2", "t1", "t0", "t3"]
    assert float(rows[0]["inner.lr"]) == best.point["inner.lr"]
    assert json.loads((tmp_path / "trials.json").read_text())[3]["error"] == "TrainingError: a loss is not finite"
    assert "t3 failed: TrainingError: a loss is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_the_picture_suits_the_number_of_keys(tmp_path, keys, monkeypatch):
    from matplotlib import figure

    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **_: drawn.append(self.axes[0]))
    space = [*RATES, Range("data.labels", "choice", ("words", "letters"))][:keys]
    plot(space, trials(space), tmp_path / "sweep.png", "meta-val, after")
    (axis,) = drawn
    if keys == 3:
        assert [text.get_text() for text in axis.get_xticklabels()] == [*(one.key for one in space), "meta-val, after"]
        assert len(axis.get_lines()) == 4
    else:
        assert axis.get_xlabel() == "inner.lr"
        assert ("outer.lr" in axis.get_ylabel()) == (keys == 2)


def test_the_live_table_survives_being_pickled():
    table = TrialTable(["inner.lr"], steps=8)
    table.setup()
    table.rows["a"] = {
        "point": {"inner.lr": 0.1},
        "result": {"step": 4, "before": 0.2, "after": 0.6},
        "state": "running",
    }
    again = pickle.loads(pickle.dumps(table))
    assert again._cells(1, again.rows["a"]) == ["1", "0.1", "4/8", "0.200", "0.600", "running"]


def run_sweep(config: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rayml", "sweep", str(config), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.ray
def test_a_sweep_that_is_killed_goes_on_and_a_trial_that_fails_is_reported(tmp_path):
    inner_lrs = "choice(0.1, 1e+30, 0.2)"  # the first two beside each other; one diverges
    config = make_config(
        tmp_path,
        data={"splits": {"val": 0.0, "test": 0.0, "val_tasks": "toy-4", "test_tasks": "toy-5"}},
        outer={"steps": 6},
        validation={"every": 3, "episodes": 4},
        sweep={
            "search": {"inner.lr": inner_lrs},
            "trials": 3,
            "concurrent": 2,
            "searcher": "grid",
            "scheduler": "none",
        },
    )
    path, folder = tmp_path / "sweep.yaml", Path(config.run.dir)
    path.write_text(dump_config(config))

    first = run_sweep(path)
    seen = ""
    for line in first.stdout:
        seen += line
        if re.match(r"\d +0\.2 +3/6 ", line):  # two trials have ended, the third is half-way
            first.send_signal(signal.SIGKILL)
            break
    first.wait()
    assert re.search(r"^\d +0\.1 .* finished$", seen, re.M), seen
    assert re.search(r"^\d +1e\+30 .* failed$", seen, re.M), seen
    before = {run.name: (run / "metrics.jsonl").stat().st_mtime_ns for run in folder.glob("trials/*")}
    assert len(before) == 3

    with pytest.raises(RunError, match="holds a sweep already; --resume it"):
        begin_sweep(folder, load_config(path), resume=False)

    time.sleep(2)
    second = run_sweep(path, "--resume")
    printed = second.communicate()[0]
    assert second.returncode == 0, printed
    found = {trial["point"]["inner.lr"]: trial for trial in json.loads((folder / "trials.json").read_text())}
    assert {rate: trial["state"] for rate, trial in found.items()} == {0.1: "finished", 1e30: "failed", 0.2: "finished"}
    assert "not finite" in found[1e30]["error"]
    assert {trial["name"] for trial in found.values()} == set(before)  # none lost, none taken again
    assert (folder / "trials" / found[0.1]["name"] / "metrics.jsonl").stat().st_mtime_ns == before[found[0.1]["name"]]
    steps = [json.loads(line)["step"] for line in (folder / "trials" / found[0.2]["name"] / "metrics.jsonl").open()]
    assert steps == list(range(1, 7))
    assert load_config(folder / "best.yaml").inner.lr in (0.1, 0.2)
    assert "next: rayml train" in printed
    assert not os.path.exists(folder / "best")
