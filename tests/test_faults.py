"""Workers, nodes and drivers that are lost, hang, or are about to be taken away."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import ray.train
from conftest import make_config, on_workers
from faults import (
    STEPS,
    TOLERANCE,
    Machines,
    Training,
    difference,
    kill_driver,
    kill_node,
    kill_worker,
    stop_worker,
)
from pydantic import ValidationError
from rich.console import Console

from rayml.config import Config, dump_config, load_config
from rayml.errors import TrainingError
from rayml.runs.folder import RunFolder
from rayml.training import collective, worker
from rayml.training import stragglers as watch
from rayml.training.driver import train
from rayml.training.heartbeat import Heartbeats, Straggler


@pytest.fixture(scope="module")
def machines():
    with Machines() as started:
        yield started


@pytest.mark.cluster
def test_workers_that_hang_or_are_lost_change_nothing_and_a_lost_node_leaves_fewer(machines, tmp_path):
    """One run is left alone; one loses workers, a node and its driver; one ends with fewer workers."""
    (tmp_path / "alone").mkdir()
    alone = Training(machines, tmp_path / "alone")
    alone.wait_for_step(3)
    assert len({node.node_id for node, _ in machines.busy()}) == 3
    undisturbed = alone.weights()

    (tmp_path / "fewer").mkdir()
    fewer = Training(machines, tmp_path / "fewer", workers=[2, 3])
    fewer.wait_for_step(STEPS // 2)
    kill_node(fewer)
    assert 0 < difference(fewer.weights(), undisturbed) < TOLERANCE

    machines.have(4)
    (tmp_path / "same").mkdir()
    same = Training(machines, tmp_path / "same", run={"longest_wait": 20, "max_failures": 3})
    for fault, step in (stop_worker, 12), (kill_worker, 22), (kill_node, 32), (kill_driver, 42):
        same.wait_for_step(step)
        fault(same)
    assert difference(same.weights(), undisturbed) == 0
    assert "gives no sign of life" in same.output()


# Heartbeats


def test_the_roll_names_who_has_not_come_where_others_are():
    heartbeats = Heartbeats()
    assert heartbeats.straggler() is None
    assert heartbeats.seconds_without_workers() > 0
    heartbeats.begin(["worker 0", "worker 1", "worker 2"])
    assert heartbeats.seconds_without_workers() == 0
    assert heartbeats.straggler() is None, "all load the model"
    heartbeats.arrived(1, 7)
    time.sleep(0.01)
    straggler = heartbeats.straggler()
    assert straggler.seconds >= 0.01
    assert str(straggler) == "worker 0, worker 2 keeps the others waiting in outer step 7"
    heartbeats.arrived(0, 7)
    heartbeats.arrived(2, 7)
    assert heartbeats.straggler() is None
    heartbeats.arrived(0, 8)
    assert str(heartbeats.straggler()) == "worker 1, worker 2 keeps the others waiting in outer step 8"
    heartbeats.begin(["worker 0"])  # of those there were, one is left
    heartbeats.arrived(0, 6)
    assert heartbeats.straggler() is None


def test_the_roll_names_whose_process_is_not_heard_of():
    heartbeats = Heartbeats()
    heartbeats.begin(["worker 0", "worker 1"])
    for name in "worker 0", "worker 1", "worker 0 of before":
        heartbeats.beat(name)
    assert heartbeats.lost(1.0) is None
    time.sleep(0.02)
    assert heartbeats.lost(0.01) is None, "both: then it is the actor that was away"
    heartbeats.beat("worker 1")
    straggler = heartbeats.lost(0.01)
    assert (str(straggler), straggler.seconds > 0.01) == ("worker 0 gives no sign of life", True)
    heartbeats.begin(["worker 0"])
    assert heartbeats.lost(0.0) is None, "it has not begun"
    heartbeats.beat("worker 0")
    assert str(heartbeats.lost(0.0)) == "worker 0 gives no sign of life", "with no other, nobody else would say so"


@pytest.mark.parametrize(("without_workers", "stays"), [(0.0, False), (3.0, True)])
def test_a_worker_that_has_caught_up_is_not_blamed_for_a_later_failure(monkeypatch, without_workers, stays):
    """Workers that are gone have not caught up."""
    late = Straggler("worker 1 keeps the others waiting", 900.0)
    answers = [[None, late], 0.0, [None, None], without_workers]
    watching = watch.Watch(MagicMock(), 0.08, Console(quiet=True))

    def get(*_, **__):
        if len(answers) == 1:
            watching.stop.set()
        return answers.pop(0)

    monkeypatch.setattr(watch.ray, "get", get)
    watching._watch()
    assert watching.named == (late if stays else None)


@pytest.mark.ray
def test_without_room_for_workers_training_ends_and_says_so(tmp_path, capsys, monkeypatch, local_ray):
    monkeypatch.setattr(watch, "START_SECONDS", 1)
    config = make_config(tmp_path, workers=2, device="cuda", run={"longest_wait": 4.0})
    # In a thread, as a sweep's trials are.
    with ThreadPoolExecutor(1) as pool, pytest.raises(TrainingError, match=r"within run.longest_wait=4 seconds"):
        pool.submit(train, config).result()
    assert "the cluster has" in capsys.readouterr().err


def test_fewest_and_most_workers_are_checked_before_the_start(tmp_path):
    for workers, mode, reason in (
        ([3, 2], "adapters", "the first of .* is larger"),
        ([1, 2], "full", "are for one number of workers"),
    ):
        with pytest.raises(ValidationError, match=reason):
            make_config(tmp_path, workers=workers, tasks_per_step=6, mode=mode, engine="zero")
    config = make_config(tmp_path, workers=[2, 4])
    assert (config.fewest_workers, config.most_workers, config.tasks_per_worker) == (2, 4, 2)
    assert load_config(write(tmp_path, config), ["workers=[1, 2]"]).workers == (1, 2)


def write(folder: Path, config: Config) -> Path:
    (folder / "config.yaml").write_text(dump_config(config))
    return folder / "config.yaml"


@pytest.mark.workers
def test_all_workers_agree_on_what_they_are_told(tmp_path):
    on_workers(notices_agree, 2, tmp_path)


def notices_agree(rank: int, folder: Path) -> None:
    """Ray Train says it to some workers sooner than to others; a node is checkpointed for once."""
    info = None
    ray.train.get_preemption_info = lambda: collective.from_first_worker(info)  # Ray's own needs Ray's workers
    run = RunFolder(folder)
    notices = worker.Notices(run)
    worker.PREEMPTION_SECONDS = 0.0
    assert notices.read() == (False, False)
    info = SimpleNamespace(preempted_node_ids=["a"]) if rank == 0 else None
    assert notices.read() == (False, True)
    assert notices.read() == (False, False), "known"
    info = SimpleNamespace(preempted_node_ids=["a", "b"])
    assert notices.read() == (False, True)
    worker.PREEMPTION_SECONDS = 1000.0
    info = SimpleNamespace(preempted_node_ids=["c"])
    assert notices.read() == (False, False), "not asked again so soon"
    collective.gather_from_workers(None)
    if rank == 0:
        run.request_stop()
    assert notices.read() == (True, False)
