"""Where a run's numbers are shown, and where its time goes."""

import json
import re
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from conftest import make_config, training_here
from rich.console import Console
from test_train import SPLITS, steps_logged

from rayml.errors import ConfigError
from rayml.runs.folder import RunFolder
from rayml.tasks.prepare import prepare_splits
from rayml.training import progress, trackers, worker
from rayml.training.driver import train
from rayml.training.progress import WATCHED_STEPS, DataWait, Lag
from rayml.training.replicated import slowest_worker
from rayml.training.stream import DivergedError, Job

ROOT = Path(__file__).parents[1]
PHASES = "data_seconds", "inner_seconds", "outer_seconds", "communication_seconds"


@pytest.mark.ray
def test_every_tracker_has_every_step_once_also_after_a_resumption_and_phases_add_up(tmp_path):
    pytest.importorskip("wandb")
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    everywhere = {"trackers": ("tensorboard", "wandb", "mlflow"), "checkpoint_every": 2}
    outer = {"steps": 3}
    run = train(make_config(tmp_path, outer=outer, data={"splits": SPLITS}, run=everywhere))
    with training_here():
        train(make_config(tmp_path, outer={"steps": 5}, data={"splits": SPLITS}, run=everywhere), resume=True)
    records = run.records()
    assert steps_logged(run) == [1, 2, 3, 4, 5]
    assert_phases_add_up(records)

    ids = json.loads((run.path / "trackers.json").read_text())
    mlflow = client(f"sqlite:///{run.path / 'mlflow.db'}")
    found = mlflow.get_metric_history(ids["mlflow"], "query_loss")
    assert [(point.step, point.value) for point in found] == [(r["step"], r["query_loss"]) for r in records]
    again = trackers.MLflow(make_config(tmp_path, run=everywhere), run, run.path, 3)
    again.write(records[3])  # taken again after a crash
    assert len(mlflow.get_metric_history(ids["mlflow"], "query_loss")) == 5
    assert mlflow.get_run(ids["mlflow"]).data.params["outer.steps"] == "3"
    kept = list((run.path / "wandb").glob(f"offline-run-*-{ids['wandb']}"))
    assert kept, "both parts are one W&B run"
    assert list((run.path / "tensorboard").iterdir())

    panels = json.loads((ROOT / "cluster" / "grafana.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    shown = {name for text in expressions if "run=~" in text for name in re.findall(r"ray_rayml_(\w+)", text)}
    validated = {"val_accuracy_before", "val_accuracy_after", "val_score_before", "val_score_after"}
    assert shown == shown & ({*records[-1]} | validated | {*slowest_worker(torch.ones(2))}), "the dashboard's panels"

    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_rayml_query_loss{")]
    assert any(f'run="{run.path.name}"' in line for line in lines), "Ray exports it to Prometheus"


def assert_phases_add_up(records):
    for record in records:
        assert 0.7 * record["step_seconds"] < sum(record[phase] for phase in PHASES) <= record["step_seconds"]
    # A run begins without having waited for a checkpoint; the second one saved every second step.
    assert [record["checkpoint_seconds"] > 0.001 for record in records] == [False, False, True, False, True]


def test_a_tracker_that_is_not_installed_is_named_before_the_start(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb mlflow-skinny"):
        trackers.check_trackers(["tensorboard", "wandb", "mlflow"], RunFolder(tmp_path))


def test_mlflow_takes_settings_with_any_keys_of_their_own(monkeypatch, tmp_path):
    tracking, logged = pytest.importorskip("mlflow.tracking"), {}
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: SimpleNamespace(experiment_id="1"),
        create_run=lambda *_, **__: SimpleNamespace(info=SimpleNamespace(run_id="a")),
        log_batch=lambda _, params: logged.update({param.key: param.value for param in params}),
        get_metric_history=lambda *_: [],
    )
    monkeypatch.setattr(tracking, "MlflowClient", lambda _: client)
    config = make_config(tmp_path, data={"templates": {"hotel-*": ["{input}:"]}})
    trackers.MLflow(config, RunFolder(tmp_path), tmp_path, 0)
    assert (logged["data.templates"], logged["inner.steps"]) == ("{'hotel-*': ['{input}:']}", "2")
    assert all(re.fullmatch(r"[\w. :/-]+", name) for name in logged), "MLflow refuses others"


@pytest.mark.parametrize("diverges", [True, False])
def test_trackers_are_told_whether_training_failed(monkeypatch, tmp_path, diverges):
    def step(*_, **__):
        learning.done += 1
        if diverges:
            raise DivergedError(["toy-1"])
        return {"step": 1, "query_loss": 0.5}

    learning = SimpleNamespace(done=0, device=torch.device("cpu"), prepare=lambda episodes: None, step=step)
    tracker = SimpleNamespace(write=lambda record: None, close=lambda failed: failures.append(failed))
    failures = []
    monkeypatch.setattr(worker, "open_trackers", lambda *_: [tracker])
    monkeypatch.setattr(worker, "report", lambda *_: None)
    config = make_config(tmp_path, outer={"steps": 1})
    run = RunFolder(config.run.dir)
    run.path.mkdir()
    with worker.StepLog(config, run, 0) as log:
        reason = worker.meta_train(Job(config, "", None, None, None, None), run, learning, iter([[]]), log)
    assert ("toy-1" in (reason or "")) == diverges
    assert failures == [diverges]


def test_progress_goes_on_from_the_newest_checkpoint_and_not_from_steps_that_are_taken_again(tmp_path):
    config = make_config(tmp_path)
    run, splits = RunFolder(config.run.dir), prepare_splits(config.data)
    run.begin(config, splits, resume=False)
    for checkpoint in (0, 5):
        run.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 9)))
        if checkpoint:
            (run.checkpoints / f"step_{checkpoint:08d}").mkdir()
        run.begin(config, splits, resume=True)
        assert steps_logged(run) == list(range(1, checkpoint + 1))
        assert progress.Progress(run, 10, Console(quiet=True), None).step == checkpoint


def test_who_polls_for_new_steps_does_not_parse_the_old_ones_again(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    assert run.records_after(0) == []
    run.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 101)) + '{"st')
    assert run.records_after(0) == run.records() == [{"step": step} for step in range(1, 101)]
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: (parsed.append(text), loads(text))[1])
    assert run.records_after(98) == [{"step": 99}, {"step": 100}]
    assert len(parsed) == 3


def test_waiting_for_episodes_is_said_once(monkeypatch):
    waits = DataWait()
    slow, quick = {"data_seconds": 0.2, "step_seconds": 1.0}, {"data_seconds": 0.01, "step_seconds": 1.0}
    assert waits.warning({"data_seconds": 100.0, "step_seconds": 101.0}) is None  # the stream starts
    assert [waits.warning(quick) for _ in range(WATCHED_STEPS)] == [None] * WATCHED_STEPS
    said = [waits.warning(slow) for _ in range(WATCHED_STEPS)]
    assert said[0] is None
    (message,) = filter(None, said)
    assert message.startswith("6% of the last 20 steps")
    assert progress.MOST_WAITING == 0.05


def test_a_worker_that_lags_is_named_once():
    lag = Lag()
    slow = slowest_worker(torch.tensor([1.0, 1.1, 2.2]))
    assert slow == {"slowest_worker": 2, "slowest_factor": pytest.approx(2.0)}
    assert slowest_worker(torch.tensor([1.0])) == {}
    even = [{"slowest_worker": step % 3, "slowest_factor": 3.0} for step in range(WATCHED_STEPS)]
    assert [lag.warning(record) for record in even] == [None] * WATCHED_STEPS, "each is slow now and then"
    (message,) = filter(None, [lag.warning(slow) for _ in range(2 * WATCHED_STEPS)])
    assert message.startswith("worker 2 took 2.0 times as long")
