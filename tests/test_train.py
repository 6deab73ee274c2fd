"""Meta-training on a local Ray: the stream, exact resume, the gain on unseen tasks, and what stops it."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from conftest import SPLITS, make_config, toy_tasks
from ray._private import worker as ray_worker
from safetensors.torch import load_file

from rayml.adapter import load_adapter
from rayml.api import evaluate
from rayml.config import dump_config, load_config
from rayml.errors import ConfigError, DataError, RunError, TrainingError
from rayml.lm.encode import Encoder
from rayml.lm.frozen import WorkerShare
from rayml.model import load
from rayml.ray_start import WORKER_ENV, check_resources, processors, start_ray
from rayml.runs import files
from rayml.runs.checkpoint import (
    folder_name,
    is_best,
    is_enough,
    newest_checkpoint,
    read_checkpoint,
    read_newest,
    seal,
    val_score,
    val_scores,
    verify,
    write_state,
)
from rayml.runs.files import local_output
from rayml.runs.folder import RunFolder
from rayml.tasks.episodes import Sampler
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.statistics import Curve
from rayml.tasks.task import Example, Task
from rayml.training import driver, worker
from rayml.training.driver import cpus_each, train
from rayml.training.ray_internals import forget_lost_checkpoints
from rayml.training.stream import EncodeEpisode, Job, share_of_step, stream_steps, worker_index
from rayml.training.trackers import saved_id
from rayml.training.worker import validate

needs_ray = pytest.mark.ray


def final_state(run: RunFolder) -> dict[str, torch.Tensor]:
    return read_checkpoint(newest_checkpoint(run.checkpoints)).tensors


def steps_logged(run: RunFolder) -> list[int]:
    return [record["step"] for record in run.read_metrics()]


# The stream


def test_worker_indices_of_a_step_do_not_depend_on_the_number_of_workers():
    for workers in (1, 2, 3, 4):
        for step in range(5):
            drawn = []
            for rank in range(workers):
                share = share_of_step(4, rank, workers)
                drawn += [worker_index(step * len(share) + i, 100, 4, share) for i in range(len(share))]
            assert drawn == list(range(100 + 4 * step, 104 + 4 * step))


@needs_ray
def test_the_stream_of_ray_data_equals_a_plain_loop(tokenizer, monkeypatch):
    monkeypatch.setattr("rayml.training.stream.STEPS_AHEAD", 8)  # several parts, the last one short
    begun, whole = threading.Event(), ray.data.range
    monkeypatch.setattr("ray.data.range", lambda *of, **more: begun.set() or whole(*of, **more))
    tasks, sampler = toy_tasks(), Sampler(3, 2, 2, "letters", 5)
    encoder = Encoder(tokenizer, "{input}:", 64)
    encode = EncodeEpisode(ray.put(tasks), ray.put(encoder), sampler)
    for rank in range(2):
        begun.clear()
        steps = stream_steps(encode, first=40, steps=19, per_step=4, rank=rank, workers=2)
        assert begun.wait(60)  # before anybody asks for one
        expected = [
            [encoder.episode(sampler.episode(tasks, 40 + 4 * step + 2 * rank + i)) for i in range(2)]
            for step in range(19)
        ]
        assert list(steps) == expected


# Validation


class Recorder:
    """What scores episodes: what it was asked, and an accuracy or a loss that tells the episode."""

    def __init__(self):
        self.asked = []

    def score(self, episodes):
        self.asked.append([bool(episode.labels) for episode in episodes])
        return [Curve(e.task, e.index, bool(e.labels), [0.25, 0.5 if e.labels else 2.0]) for e in episodes]


def test_all_workers_score_tasks_of_one_kind_at_a_time_and_every_task_counts_the_same(tmp_path, monkeypatch):
    """With a sharded base, other calls on another worker would hang."""
    texts = tuple(Task(f"text-{t}", tuple(Example(f"say {i}", f"{t} {i}") for i in range(8))) for t in range(3))
    tasks = [*texts, *toy_tasks(1)]
    monkeypatch.setattr(worker, "fetch_once", lambda tasks: tasks)
    config = make_config(tmp_path, tasks_per_step=4, validation={"episodes": 16})
    asked = []
    for rank in range(2):
        monkeypatch.setattr(worker, "share_of_tasks", lambda _, rank=rank: WorkerShare(rank, 2))
        learning = Recorder()
        record = validate(config, Job(config, "", None, None, tasks, None), learning)
        asked.append(learning.asked)
    assert asked[0] == asked[1] == [[True] * 2] + [[False] * 2] * 3
    assert {key: record[key] for key in ("val_accuracy_after", "val_loss_after")} == {
        "val_accuracy_after": 0.5,
        "val_loss_after": 2.0,
    }
    assert record["val_score_after"] == pytest.approx((0.5 + 3 * math.exp(-2)) / 4)
    assert val_score(record) == record["val_score_after"]
    assert val_score(record, "before") == pytest.approx((0.25 + 3 * math.exp(-0.25)) / 4)


def test_a_task_with_many_classes_counts_as_much_in_a_validation_as_one_with_few(tmp_path, monkeypatch):
    """In training it has more of the episodes."""
    few, many = *toy_tasks(1, classes=3), replace(*toy_tasks(1, classes=30), name="many")
    monkeypatch.setattr(worker, "fetch_once", lambda tasks: tasks)
    right = SimpleNamespace(
        score=lambda episodes: [Curve(e.task, 0, True, [float(e.task == "many")]) for e in episodes]
    )
    config = make_config(tmp_path, validation={"episodes": 400})
    record = validate(config, Job(config, "", None, None, (few, many), None), right)
    assert record["val_score_after"] == pytest.approx(0.5, abs=0.1)


def test_a_validation_that_is_not_finite_is_never_the_best():
    records = [{"val_score_after": score} for score in (math.nan, 0.5, math.nan, 0.4)]
    scores = val_scores(records)
    assert [is_best(scores[: n + 1]) for n in range(4)] == [True, True, False, False]
    assert is_enough(scores, 2)


# What stops before Ray starts


@pytest.fixture
def no_ray(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)


def test_more_workers_than_processors_are_refused(tmp_path):
    config = make_config(tmp_path, workers=4)
    with pytest.raises(ConfigError, match=r"workers: 4 need 4 CPUs, there are 2; use workers=2"):
        check_resources(config, cpus=2, cpus_each=1, gpus=0)
    with pytest.raises(ConfigError, match="workers: 4 need a GPU each, there are 1"):
        check_resources(config.model_copy(update={"device": "cuda"}), cpus=64, cpus_each=2, gpus=1)
    check_resources(config, cpus=8, cpus_each=2, gpus=0)


def test_processors_are_counted_where_a_process_cannot_be_bound_to_some(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert processors() == os.cpu_count()


def test_a_job_may_set_what_rayml_sets_for_its_workers(tmp_path, monkeypatch):
    """`rayml submit --env TOKENIZERS_PARALLELISM=true`: Ray gives it to the driver, and merges it with the driver's."""
    monkeypatch.setattr(os, "environ", os.environ | {"TOKENIZERS_PARALLELISM": "true"})
    of_driver = {}
    monkeypatch.setattr(ray, "init", lambda **settings: of_driver.update(settings))
    start_ray(make_config(tmp_path))
    may_override = os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == "1"
    of_job = {"env_vars": {"TOKENIZERS_PARALLELISM": "true", "MINE": "1"}}
    merged = ray_worker._merge_runtime_env(of_job, of_driver["runtime_env"], override=may_override)
    assert merged["env_vars"] == WORKER_ENV | {"TOKENIZERS_PARALLELISM": "true", "MINE": "1"}


@pytest.mark.parametrize(
    ("nodes", "workers", "each"),
    [([4], 2, 1), ([3], 1, 2), ([8, 8, 8], 4, 3), ([8, 8, 16], 3, 7), ([1, 3, 3, 3], 3, 2), ([1], 2, 1), ([], 2, 1)],
)
def test_workers_get_as_many_cpus_as_they_all_find_on_the_nodes(nodes, workers, each):
    """With one more for the episodes of each; where there is too little room, it may come."""
    assert cpus_each(nodes, workers) == each


def test_too_few_examples_stop_before_ray(tmp_path, no_ray):
    with pytest.raises(DataError, match=r"task 'toy-0'.*has 20, needs 32"):
        train(make_config(tmp_path, data={"shots": 30}))


def test_a_target_without_room_for_its_input_stops_before_ray(tmp_path, no_ray):
    config = make_config(tmp_path, data={"labels": "words", "max_tokens": 8})
    rows = [{"task": "t", "input": f"{i}", "target": "much too long a label"[i % 2 :]} for i in range(12)]
    Path(config.data.path[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = config.data.model_copy(update={"splits": config.data.splits.model_copy(update={"test_tasks": ()})})
    with pytest.raises(DataError, match=r"no room for its input within data\.max_tokens=8"):
        train(config.model_copy(update={"data": data}))


def test_a_run_folder_of_another_config_or_in_use_is_refused(tmp_path, no_ray):
    config = make_config(tmp_path)
    splits = prepare_splits(config.data)
    run = RunFolder(config.run.dir)
    run.begin(config, splits, resume=False)
    run.begin(config, splits, resume=False)  # nothing was learned yet: begun anew
    (run.checkpoints / "step_00000005").mkdir()
    with pytest.raises(RunError, match="holds a run already; --resume"):
        run.begin(config, splits, resume=False)
    run.begin(config.model_copy(update={"workers": 2}), splits, resume=True)
    other = config.model_copy(update={"inner": config.inner.model_copy(update={"lr": 0.7})})
    with pytest.raises(RunError, match=r"another config \(inner.lr differ\)"):
        run.begin(other, splits, resume=True)
    begun = config.model_copy(update={"run": config.run.model_copy(update={"continues": str(tmp_path / "old")})})
    with pytest.raises(RunError, match=r"another config \(run.continues differ\)"):
        run.begin(begun, splits, resume=True)
    with pytest.raises(RunError, match="the meta-train tasks differ"):
        run.begin(config, splits._replace(train=splits.train[1:]), resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(RunError, match="something other than a run"):
        RunFolder(tmp_path / "mine").begin(config, splits, resume=False)


def test_two_processes_never_train_one_run(tmp_path, no_ray):
    config = make_config(tmp_path)
    with RunFolder(config.run.dir).held(), pytest.raises(RunError, match=r"run: another process is training it"):
        train(config)
    assert not any(Path(config.run.dir).iterdir())
    with RunFolder(config.run.dir).held():
        RunFolder(config.run.dir).begin(config, prepare_splits(config.data), resume=False)
    with RunFolder(config.data.path[0]).held():
        pass  # a file: it is `begin` that says so


def test_advice_for_a_run_that_diverged_can_be_followed(tmp_path):
    config = make_config(tmp_path)
    splits, run = prepare_splits(config.data), RunFolder(config.run.dir)
    run.begin(config, splits, resume=False)
    (run.checkpoints / "step_00000005").mkdir()
    advice = worker.stop_reason(config, 7, ["toy-1"])
    assert "--resume" not in advice
    for key, value in (("inner.lr", 0.01), ("outer.lr", 1e-5), ("model.dtype", "bfloat16")):
        assert key in advice
        with pytest.raises(RunError, match=r"use another run\.dir"):
            run.begin(load_config(config, {key: value}), splits, resume=True)
    assert advice.endswith("To begin there at this run's last checkpoint, --continue this run")


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    config = make_config(tmp_path)
    splits, file = prepare_splits(config.data), Path(config.data.path[0])
    for path, reason in ((file, "Not a directory"), (file / "run", "Not a directory"), (Path("/proc/run"), "No such")):
        with pytest.raises(RunError, match=rf"{path}: cannot be written to \({reason}.*another folder"):
            RunFolder(path).begin(config, splits, resume=False)


def test_nothing_that_a_run_without_a_checkpoint_left_is_taken_for_the_next_one_s(tmp_path):
    config = make_config(tmp_path)
    splits, run = prepare_splits(config.data), RunFolder(config.run.dir)
    run.begin(config, splits, resume=False)
    best = run.best / "step_00000004"  # it had validations, and was killed before its first checkpoint
    best.mkdir(parents=True)
    (best / "state.safetensors").touch()
    (run.best / "mine").touch()
    run.write_precision("bfloat16", "eager", "it was asked for")
    saved_id(run, "wandb", lambda: "first")
    run.begin(config, splits, resume=True)
    assert [path.name for path in run.best.iterdir()] == ["mine"]
    assert run.trained_dtype() == config.model.dtype == "float32"
    assert saved_id(run, "wandb", lambda: "second") == "second"


def test_what_ray_train_remembers_is_forgotten_where_it_is_torn_or_gone(tmp_path):
    memory = tmp_path / "checkpoint_manager_snapshot.json"
    (tmp_path / "step_00000001").mkdir()
    whole = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "step_00000001"}]})
    for text, stays in ((whole, True), (whole.replace('1"', '2"'), False), (whole[:20], False)):
        memory.write_text(text)
        forget_lost_checkpoints(tmp_path)
        assert memory.exists() == stays
    forget_lost_checkpoints(tmp_path)


def test_a_model_that_could_not_be_written_at_the_end_is_written_when_the_run_is_resumed(tmp_path, monkeypatch):
    config = make_config(tmp_path, mode="full")
    run = RunFolder(config.run.dir)
    fits, kills = [], iter([True, False])

    def fit(*_):
        fits.append(run.model.exists())
        folder = run.checkpoints / folder_name(config.outer.steps)
        folder.mkdir()
        write_state(folder, {"w": torch.ones(1)})
        seal(folder, config.outer.steps, part=0, parts=1)

    def save(path):
        with local_output(path) as here:
            here.mkdir()
            (here / "config.json").touch()
            if next(kills):
                raise MemoryError
            (here / "model.safetensors").touch()

    monkeypatch.setattr(driver, "own_ray", lambda _: nullcontext(False))
    monkeypatch.setattr(driver, "fit", fit)
    monkeypatch.setattr(driver, "load", lambda _: SimpleNamespace(save=save))
    with pytest.raises(MemoryError):
        train(config)
    assert not run.model.exists()
    train(config, resume=True)
    train(config, resume=True)
    assert fits == [False], "it is trained once"
    assert sorted(path.name for path in run.model.iterdir()) == ["config.json", "model.safetensors"]


DISK_FULL = """
import resource, sys, torch
from pathlib import Path
from rayml.runs.checkpoint import naming_full_disk, newest_checkpoint, seal, write_state
root = Path(sys.argv[1])
for step, size in ((1, 10), (2, 100_000)):
    if step == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    folder = root / f"step_{step:08d}"
    folder.mkdir()
    try:
        with naming_full_disk(folder, step):
            write_state(folder, {"w": torch.ones(size)})
            seal(folder, step, part=0, parts=1)
    except Exception as error:
        print(type(error).__name__, error)
print(newest_checkpoint(root).name)
"""


def test_a_full_disk_is_named_and_the_old_checkpoint_survives(tmp_path):
    """The limit on a file's size stands in for the disk's end."""
    found = subprocess.run([sys.executable, "-c", DISK_FULL, str(tmp_path)], capture_output=True, text=True)
    lines = found.stdout.splitlines()
    assert "RunError" in lines[0], found
    assert "the disk is full" in lines[0]
    assert lines[-1] == "step_00000001"


def test_a_full_disk_is_the_one_of_temporary_files_where_a_part_does_not_fit_there(tmp_path, monkeypatch):
    def write(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RunError, match=rf"{tmp_path}/rayml-\w+: the disk is full; the checkpoints before step 7"):
        worker.write_part(SimpleNamespace(done=7, parts=1, write=write))
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_reads_back_and_a_changed_one_is_refused(tmp_path):
    write_state(tmp_path, {"w": torch.arange(5.0)})
    seal(tmp_path, 3, part=0, parts=1)
    saved = read_checkpoint(tmp_path)
    assert saved.step == 3
    assert torch.equal(saved.tensors["w"], torch.arange(5.0))
    assert torch.equal(load_file(tmp_path / "state.safetensors")["w"], torch.arange(5.0))
    damaged = bytearray((tmp_path / "state.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "state.safetensors").write_bytes(damaged)
    with pytest.raises(RunError, match="not what its manifest says"):
        read_checkpoint(tmp_path)


def old_checkpoint(root: Path, step: int) -> Path:
    """A checkpoint that was written a minute ago."""
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    write_state(folder, {"w": torch.full((3,), float(step))})
    seal(folder, step, part=0, parts=1)
    for file in folder.iterdir():
        os.utime(file, (time.time() - 60,) * 2)
    return folder


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files whose checksum is taken, each time."""
    seen, read = [], files._read_checksum
    monkeypatch.setattr(files, "_read_checksum", lambda file: (seen.append(file.parent.name), read(file))[1])
    return seen


def test_a_checkpoint_is_read_for_its_checksum_once(tmp_path, hashed):
    config = make_config(tmp_path, outer={"steps": 3})
    run = RunFolder(config.run.dir)
    run.begin(config, prepare_splits(config.data), resume=False)
    for step in (1, 2):
        old_checkpoint(run.checkpoints, step)
    hashed.clear()
    assert not run.is_over(config)
    assert hashed == [], "where it goes on, who goes on reads it"
    _, folder = run.trained()
    run.trained()
    assert read_checkpoint(folder).step == read_newest(run.checkpoints).step == 2
    assert hashed == ["step_00000002"]
    old_checkpoint(run.checkpoints, 3)
    hashed.clear()
    assert run.is_over(config)
    assert run.is_over(config)
    assert hashed == ["step_00000003"]
    (folder / "state.safetensors").write_bytes(b"torn")
    (run.checkpoints / "step_00000003" / "state.safetensors").write_bytes(b"torn")
    assert not run.is_over(config)
    assert read_newest(run.checkpoints).step == 1


# Training


@needs_ray
def test_a_run_folder_holds_what_it_should(straight):
    assert steps_logged(straight) == list(range(1, 11))
    scores = [r["val_accuracy_after"] for r in straight.read_metrics() if "val_accuracy_after" in r]
    assert len(scores) == 2
    assert all(0 <= score <= 1 for score in scores)
    assert straight.latest.read_text() == "checkpoints/step_00000010\n"
    assert sorted(p.name for p in straight.checkpoints.glob("step_*")) == ["step_00000005", "step_00000010"]
    assert straight.config.exists()
    assert list((straight.path / "tensorboard").iterdir())


def copy_of(straight, tmp_path):
    """Its config and folder, in a place of its own."""
    config = make_config(tmp_path, data={"splits": SPLITS}, lora={"start": "principal"}, workers=2)
    shutil.copytree(straight.path, config.run.dir)
    run = RunFolder(config.run.dir)
    run.config.write_text(dump_config(config))
    return config, run


@needs_ray
def test_five_steps_and_five_resumed_equal_ten_bit_for_bit(straight, tmp_path, caplog):
    """The checkpoint of step 10 is torn, and it died on the way to the next one; this time without validations."""
    config, run = copy_of(straight, tmp_path)
    state = run.checkpoints / "step_00000010" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    assert verify(newest_checkpoint(run.checkpoints)) == 5
    assert "step_00000010" in caplog.text
    run.truncate_metrics(5)
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 6, "query_loss": 0.0, "step_seconds": 0.0}) + '\n{"step": 7, "que')
    train(config, resume=True)
    assert verify(newest_checkpoint(run.checkpoints)) == 10
    ours, theirs = final_state(run), final_state(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps_logged(run) == list(range(1, 11))


@needs_ray
@pytest.mark.workers
def test_a_run_goes_on_with_another_number_of_workers(straight, tmp_path):
    """Equal up to the order of float sums: a worker's batch of four tasks in place of two, and no all-reduce.

    AdamW turns such a difference in a gradient near zero into a whole step, so it grows after the first steps.
    """
    config, run = copy_of(straight, tmp_path)
    shutil.rmtree(run.checkpoints / "step_00000010")  # by hand: Ray Train remembers it
    train(config.model_copy(update={"workers": 1}), resume=True)
    losses = [[r["query_loss"] for r in one.read_metrics()] for one in (run, straight)]
    assert losses[0][:7] == pytest.approx(losses[1][:7], rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@needs_ray
@pytest.mark.workers
def test_a_loss_that_is_not_finite_stops_all_workers_and_names_step_and_tasks(tmp_path):
    config = make_config(tmp_path, workers=2, inner={"lr": 1e30}, run={"checkpoint_every": 1})
    with pytest.raises(TrainingError, match=r"outer step 1: a loss or gradient is not finite; tasks: .*toy-\d"):
        train(config)


def evaluated(folder: Path, steps: int, outer_steps: int) -> dict[str, Any]:
    """Train on toy tasks with this many inner steps; return the scores on one that was held out."""
    folder.mkdir()
    config = make_config(
        folder,
        data={"ways": 3, "shots": 2, "queries": 4},
        lora={"rank": 8, "alpha": 8.0, "start": "principal"},
        inner={"steps": steps, "lr": 2.0},
        outer={"steps": outer_steps, "warmup_steps": 0, "lr": 0.01},
        run={"checkpoint_every": outer_steps},
    )
    return evaluate(train(config).path, episodes=30)["overall"]


@needs_ray
def test_the_gain_on_an_unseen_toy_task_rises_and_does_not_without_inner_steps(tmp_path, local_mode):
    meta, multitask = evaluated(tmp_path / "meta", 2, 100), evaluated(tmp_path / "multitask", 0, 40)
    assert meta["before"]["mean"] == pytest.approx(1 / 3, abs=0.1)  # letters are permuted: chance
    assert meta["gain"]["low"] > 0.1
    assert meta["over_untrained"]["low"] > 0.1
    assert multitask["gain"]["mean"] == 0
    assert multitask["after"]["mean"] == pytest.approx(1 / 3, abs=0.1)


@needs_ray
def test_a_new_task_is_learned_and_answered_in_the_users_own_labels(straight, tmp_path):
    task = toy_tasks(tasks=1, classes=3, per_class=4, seed=9)[0]
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"input": e.input, "target": e.target}) + "\n" for e in task.examples))
    load(straight).adapt(file).save(tmp_path / "new")
    predictor = load_adapter(tmp_path / "new")
    answer = predictor.predict(task.examples[0].input)
    assert set(answer.probabilities) == set(task.options)
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert answer.text == max(answer.probabilities, key=answer.probabilities.get)
    two = predictor.predict(task.examples[0].input, list(task.options[:2]))
    assert set(two.probabilities) == set(task.options[:2])
    with pytest.raises(ConfigError, match="nonsense not among"):
        predictor.predict("x", ["nonsense"])
    with pytest.raises(RunError, match="exists already"):
        load(straight).adapt(file).save(tmp_path / "new")


@needs_ray
@pytest.mark.workers
def test_free_text_is_learned_over_zero_3_and_generated(tmp_path):
    """The other kind of task, the other engine: two workers, validation by loss and by accuracy, an adapter that
    generates."""
    pytest.importorskip("deepspeed")
    config = make_config(
        tmp_path,
        workers=2,
        engine="zero",
        outer={"steps": 2},
        algorithm={"start_weight": 0},
        validation={"every": 2, "episodes": 4},
    )
    rows = [{"task": f"t{i % 3}", "input": f"say {i}", "target": f"it is {i}"} for i in range(60)]
    rows += [{"task": "label", "input": f"is {i} odd", "target": ["no", "yes"][i % 2]} for i in range(20)]
    Path(config.data.path[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {"val": 0.0, "test": 0.0, "val_tasks": ("t1", "label"), "test_tasks": ("t2",)}
    data = config.data.model_copy(update={"splits": config.data.splits.model_copy(update=splits)})
    run = train(config.model_copy(update={"data": data}))
    last = list(run.read_metrics())[-1]
    assert 0 < last["val_loss_after"] < last["val_loss_before"]
    for when in ("before", "after"):
        both = last[f"val_accuracy_{when}"], math.exp(-last[f"val_loss_{when}"])
        assert last[f"val_score_{when}"] == pytest.approx(sum(both) / 2)
    file = tmp_path / "few.jsonl"
    file.write_text('{"input": "say 1", "target": "it is 1"}\n{"input": "say 2", "target": "it is 2"}\n')
    load(run).adapt(file).save(tmp_path / "new")
    predictor = load_adapter(tmp_path / "new")
    answer = predictor.predict("say 3")
    assert answer.probabilities == {}
    prompt = predictor.encoder.row(Example("say 3", "."), is_label=False)
    tokens = torch.tensor([prompt.tokens[: prompt.start]])
    with torch.no_grad():  # the first character, by the adapted model's own logits
        first = predictor.lm.module(input_ids=tokens).logits[0, -1].argmax()
    text = predictor.encoder.tokenizer.decode([first])
    assert answer.text.startswith(text.strip()) or first == predictor.encoder.tokenizer.eos_token_id
