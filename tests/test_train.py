"""Meta-training on a local Ray: the stream, exact resume, the gain on unseen tasks, and what stops it."""

import json
import logging
import shutil

import pytest
import ray
import torch
from conftest import make_config, toy_tasks

from rayml.config import dump_config
from rayml.distributed.stream import EncodeEpisode, stream_steps, worker_index
from rayml.distributed.train import train
from rayml.errors import TrainingError
from rayml.evaluation.command import evaluate_run
from rayml.lm.encode import Encoder
from rayml.runs.checkpoint import newest_checkpoint
from rayml.runs.folder import RunFolder
from rayml.tasks.episodes import Sampler

needs_ray = pytest.mark.ray


def final_state(run: RunFolder) -> dict[str, torch.Tensor]:
    return newest_checkpoint(run.checkpoints).tensors


def steps_logged(run: RunFolder) -> list[int]:
    return [record["step"] for record in run.read_metrics()]


# The stream


def test_worker_indices_of_a_step_do_not_depend_on_the_number_of_workers():
    for workers in (1, 2, 4):
        share = 4 // workers
        for step in range(5):
            rows = range(step * share, (step + 1) * share)
            drawn = {worker_index(row, 100, 4, rank, workers) for rank in range(workers) for row in rows}
            assert drawn == set(range(100 + 4 * step, 104 + 4 * step))


@needs_ray
def test_the_stream_of_ray_data_equals_a_plain_loop(tokenizer, monkeypatch):
    monkeypatch.setattr("rayml.distributed.stream.STEPS_AHEAD", 8)  # several parts, the last one short
    tasks, sampler = toy_tasks(), Sampler(3, 2, 2, "letters", 5)
    encoder = Encoder(tokenizer, "{input}:", 64)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        encode = EncodeEpisode(ray.put(tasks), ray.put(encoder), sampler)
        for rank in range(2):
            steps = stream_steps(encode, first=40, steps=19, per_step=4, rank=rank, workers=2)
            expected = [
                [encoder.episode(sampler.episode(tasks, 40 + 4 * step + 2 * rank + i)) for i in range(2)]
                for step in range(19)
            ]
            assert list(steps) == expected
    finally:
        ray.shutdown()


# Training


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Ten steps in one go, on one worker."""
    return train(make_config(tmp_path_factory.mktemp("straight")))


@needs_ray
def test_a_run_folder_holds_what_it_should(straight):
    assert steps_logged(straight) == list(range(1, 11))
    assert straight.latest.read_text() == "checkpoints/step_00000010\n"
    assert sorted(p.name for p in straight.checkpoints.glob("step_*")) == ["step_00000005", "step_00000010"]
    assert straight.config.exists()
    assert list((straight.path / "tensorboard").iterdir())


@needs_ray
def test_five_steps_and_five_resumed_equal_ten_bit_for_bit(straight, tmp_path):
    config = make_config(tmp_path)
    train(config.model_copy(update={"outer": config.outer.model_copy(update={"steps": 5})}))
    run = RunFolder(config.run.dir)
    with run.metrics.open("a") as file:  # as if it had died on the way to the next checkpoint
        file.write(json.dumps({"step": 6, "query_loss": 0.0, "step_seconds": 0.0}) + '\n{"step": 7, "que')
    train(config, resume=True)
    ours, theirs = final_state(run), final_state(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps_logged(run) == list(range(1, 11))


@needs_ray
@pytest.mark.workers
def test_a_run_goes_on_with_another_number_of_workers(straight, tmp_path):
    """Equal up to the order of float sums: a worker's batch of two tasks in place of four, and the all-reduce."""
    config = make_config(tmp_path)
    train(config.model_copy(update={"outer": config.outer.model_copy(update={"steps": 5})}))
    train(config.model_copy(update={"workers": 2}), resume=True)
    losses = [[r["query_loss"] for r in run.read_metrics()] for run in (RunFolder(config.run.dir), straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = final_state(RunFolder(config.run.dir)), final_state(straight)
    for name in theirs:
        if name.startswith("start/"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@needs_ray
def test_a_torn_checkpoint_is_passed_over_with_a_warning(straight, tmp_path, caplog):
    config = make_config(tmp_path)
    shutil.copytree(straight.path, config.run.dir)
    run = RunFolder(config.run.dir)
    state = run.checkpoints / "step_00000010" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    assert newest_checkpoint(run.checkpoints).step == 5
    assert "step_00000010" in caplog.text
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(straight.path, tmp_path / "run")
    state.write_bytes(state.read_bytes()[:-100])
    run.config.write_text(dump_config(config))
    train(config, resume=True)
    assert newest_checkpoint(run.checkpoints).step == 10
    ours, theirs = final_state(run), final_state(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_ray
@pytest.mark.workers
def test_a_loss_that_is_not_finite_stops_all_workers_and_names_step_and_tasks(tmp_path):
    config = make_config(tmp_path, workers=2, inner={"lr": 1e30}, run={"checkpoint_every": 1})
    with pytest.raises(TrainingError, match=r"outer step 1: a loss or gradient is not finite; tasks: .*toy-\d"):
        train(config)


TOY = {"queries": 4, "shots": 2, "ways": 3}


def gain(tmp_path, steps: int) -> tuple[float, float]:
    """Train 60 steps on toy tasks; return the score on an unseen one before and after adapting by 3 steps."""
    from rich.console import Console

    config = make_config(
        tmp_path,
        data=TOY,
        inner={"steps": steps, "lr": 0.5},
        outer={"steps": 60, "warmup_steps": 0, "lr": 0.01},
        lora={"rank": 8},
        run={"checkpoint_every": 60},
    )
    run = train(config)
    evaluated = config.model_copy(update={"inner": config.inner.model_copy(update={"steps": 3})})
    run.config.write_text(dump_config(evaluated))
    quiet = Console(quiet=True)
    found = evaluate_run(run.path, None, None, None, 30, 0, "test", None, quiet, quiet)["overall"]
    return found


@needs_ray
def test_the_gain_on_an_unseen_toy_task_rises_and_does_not_without_inner_steps(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    meta, multitask = gain(tmp_path / "a", steps=2), gain(tmp_path / "b", steps=0)
    print(json.dumps({"meta": meta, "multitask": multitask}))
    assert meta["before"]["mean"] == pytest.approx(1 / 3, abs=0.1)
    assert meta["over_untrained"]["low"] > 0
    assert meta["gain"]["mean"] > multitask["gain"]["mean"] + 0.1
