"""A sweep: Ray Tune over the same training that `rayml train` does, one run folder a trial.

Ray Tune keeps the state of the search in `tune/`, and every trial its own run in `trials/`, with its checkpoints. So a
sweep that was killed goes on: what ended is only read again, and what was cut off goes on from its last checkpoint.
"""

import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher
from rich.console import Console

from rayml.config import Config, dump_config, parse_config
from rayml.errors import ConfigError, RunError, TrainingError
from rayml.experiments.search_space import Range, check_space, parse_space, rounded, trial_config
from rayml.experiments.sweep_report import Trial, TrialTable, report_sweep
from rayml.lm.abilities import checked_model
from rayml.runs.checkpoint import val_score
from rayml.runs.files import AnyPath, as_path, write_whole
from rayml.runs.folder import RunFolder
from rayml.tasks.prepare import prepare_splits
from rayml.training.driver import own_ray, processors, storage, train, with_absolute_paths
from rayml.training.ray_internals import trial_settings

SCORE = "score"
TUNE = "tune"


@dataclass(frozen=True)
class Sweeping:
    """What every trial is told."""

    values: dict[str, Any]
    source: str
    folder: str
    every: int
    metric: str
    at_once: int
    space: Sequence[Range]

    def config(self, trial: str, point: dict[str, Any]) -> Config:
        """Return the config of a trial; its run folder is named after it."""
        return trial_config(self.values, self.source, rounded(point, self.space), self.run(trial), self.every)

    def run(self, trial: str) -> str:
        return str(as_path(self.folder) / "trials" / trial)


def sweep(values: dict[str, Any], source: str, resume: bool, out: Console) -> AnyPath:
    """Search as the config's `sweep` says; return the folder of `best.yaml`, `trials.csv`, `trials.json`, `sweep.png`.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: no trial came to a validation.
    """
    config = with_absolute_paths(parse_config(values, source))
    values = config.model_dump(mode="json")
    space = check(config, values, source)
    folder = as_path(config.run.dir)
    begin(folder, config, resume)
    at_once = 0
    if not os.environ.get("RAY_ADDRESS"):
        at_once = concurrency(config, processors(), 1, torch.cuda.device_count())
    with own_ray(config, max(1, at_once)):
        if not at_once:
            there = ray.cluster_resources()
            at_once = concurrency(config, int(there.get("CPU", 0)), 2, int(there.get("GPU", 0)))
        job = Sweeping(values, source, str(folder), config.validation.every, config.sweep.metric, at_once, space)
        results = run(config, job, space)
    # A result knows its settings only if its trial came to a validation; the trials behind it always do.
    points = trial_settings(results)
    trials = [outcome(job, point, results[number]) for number, point in enumerate(points)]
    if all(trial.score is None for trial in trials):
        raise TrainingError(f"{folder}: no trial came to a validation; the first: {trials[0].error or trials[0].state}")
    report_sweep(config, space, trials, folder, out)
    return folder


def check(config: Config, values: dict[str, Any], source: str) -> list[Range]:
    """Return what is searched, or raise ConfigError before anything starts."""
    space = parse_space(config.sweep.search)
    check_space(space, values, source)
    if not config.validation.every:
        raise ConfigError("validation.every: a sweep goes by validations; give it a number of outer steps")
    splits = prepare_splits(config.data)
    if not splits.val:
        raise ConfigError("data.splits.val: a sweep is scored on meta-val, which has no task; raise it")
    checked_model(config, [task for part in splits for task in part])
    return space


def begin(folder: AnyPath, config: Config, resume: bool) -> None:
    """Write `sweep.yaml`, or check that the sweep there is the same.

    Raises:
        RunError: there is a sweep already and `resume` is not asked for, or it is another one.
    """
    written, text = folder / "sweep.yaml", dump_config(config)
    if written.exists():
        if not resume:
            raise RunError(f"{folder}: holds a sweep already; --resume it, or give run.dir another folder")
        if written.read_text(encoding="utf-8") != text:
            raise RunError(f"{folder}: holds another sweep (see {written.name} there); use another run.dir")
    elif folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder}: holds something that is no sweep; give run.dir another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(written, text)


def concurrency(config: Config, cpus: int, cpus_each: int, gpus: int) -> int:
    """Return how many trials run at a time.

    A trial takes nothing but its workers, and no more are started than these all find room for: so none waits for
    workers that another holds.

    Raises:
        ConfigError: more are asked for than there is room for.
    """
    fit = cpus // (config.most_workers * cpus_each)
    if config.device == "cuda" or (config.device == "auto" and gpus >= config.most_workers):
        fit = min(fit, gpus // config.most_workers)
    if fit < 1:
        raise ConfigError(f"workers: a trial's {config.most_workers} do not fit ({cpus} CPUs, {gpus} GPUs); lower it")
    if config.sweep.concurrent > fit:
        raise ConfigError(
            f"sweep.concurrent: {config.sweep.concurrent} trials of {config.most_workers} workers do not fit at a time "
            f"({cpus} CPUs, {gpus} GPUs); use {fit}"
        )
    return config.sweep.concurrent or fit


def run(config: Config, job: Sweeping, space: Sequence[Range]) -> ray.tune.ResultGrid:
    """Run Ray Tune to its end, or go on with it."""
    settle_ray_tune()
    # A byte, since Ray Tune does not take nothing: a trial waits for its workers, and a share of a CPU would be one CPU
    # less for their streams of episodes.
    trainable = ray.tune.with_resources(ray.tune.with_parameters(TrialRun, job=job), {"memory": 1})
    folder, drawn = storage(as_path(job.folder)), param_space(config, space)
    state, there = f"{folder['storage_path']}/{TUNE}", folder.get("storage_filesystem")
    if ray.tune.Tuner.can_restore(state, there):
        return ray.tune.Tuner.restore(
            state, trainable, resume_unfinished=True, param_space=drawn, storage_filesystem=there
        ).fit()
    tuner = ray.tune.Tuner(
        trainable,
        param_space=drawn,
        tune_config=ray.tune.TuneConfig(
            metric=SCORE,
            mode="max",
            num_samples=1 if config.sweep.searcher == "grid" else config.sweep.trials,
            search_alg=search_algorithm(config, job.at_once),
            scheduler=scheduler(config),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name=TUNE,
            **folder,
            verbose=0,
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # the run folder has them
            callbacks=[TrialTable([one.key for one in space], config.outer.steps)],
        ),
    )
    return tuner.fit()


def settle_ray_tune() -> None:
    """Have Ray Tune keep its state, and keep quiet: our own table tells what happens."""
    # Ray Tune writes its state so often: what is lost with a killed driver is a second.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", "The reported value is ignored")  # a resumed trial tells its first steps again


def param_space(config: Config, space: Sequence[Range]) -> dict[str, Any]:
    """Return what Ray Tune draws from: distributions, or for a grid the values of each key."""
    if config.sweep.searcher == "grid":
        choices = math.prod(len(one.values) for one in space if one.kind == "choice")
        ranges = sum(one.kind != "choice" for one in space)
        points = max(2, round((config.sweep.trials / choices) ** (1 / max(1, ranges))))
        return {one.key: ray.tune.grid_search(one.spaced(points)) for one in space}
    found: dict[str, Any] = {}
    for one in space:
        draw = getattr(ray.tune, one.kind)
        low_high = (one.values[0], one.values[1] + 1) if one.kind == "randint" else one.values
        found[one.key] = draw(list(one.values)) if one.kind == "choice" else draw(*low_high)
    return found


def search_algorithm(config: Config, at_once: int) -> Searcher | SearchAlgorithm:
    """Return the searcher, seeded."""
    if config.sweep.searcher != "optuna":
        return BasicVariantGenerator(max_concurrent=at_once, random_state=config.seed)
    from ray.tune.search.optuna import OptunaSearch

    return ConcurrencyLimiter(OptunaSearch(metric=SCORE, mode="max", seed=config.seed), max_concurrent=at_once)


def scheduler(config: Config) -> TrialScheduler:
    """Return what stops trials early: at a validation, those behind the best third of what came so far."""
    if config.sweep.scheduler == "none":
        return FIFOScheduler()
    first, last = config.validation.every, config.outer.steps
    return ASHAScheduler(time_attr="step", max_t=last, grace_period=min(first, last), reduction_factor=3)


class TrialRun(ray.tune.Trainable):
    """One trial: a training run of its own, in a thread, whose validations are Ray Tune's steps.

    Stopped early, it tells the run to stop, and waits until its workers have gone. (Ray Tune kills functions that it
    stops, and with them Ray Train's controller, which then never gives its workers' places back.)
    """

    def setup(self, config: dict[str, Any], job: Sweeping) -> None:  # type: ignore[override]  # by `with_parameters`
        self.settings, self.job = job.config(self.trial_id, config), job
        self.run = RunFolder(self.settings.run.dir)
        self.last: dict[str, Any] = {"step": 0}
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._train)
        self.thread.start()

    def _train(self) -> None:
        try:
            train(self.settings, resume=True, at_once=self.job.at_once)
        except Exception as error:  # raised by `step`, where Ray Tune looks for it
            self.error = error

    def step(self) -> dict[str, Any]:
        """Wait for the next validation, or the end."""
        while True:
            ended = not self.thread.is_alive()  # asked first, so that nothing is written after it is read
            fresh = [scored(record, self.job.metric) for record in self.run.records_after(self.last["step"])]
            found = next(filter(None, fresh), None)
            if found and (ended or found["step"] < self.settings.outer.steps):
                self.last = found
                return found
            if ended:
                if self.error:
                    raise self.error
                return self.last | {"done": True}
            time.sleep(self.run.poll_seconds)

    def cleanup(self) -> None:
        try:
            if self.run.path.is_dir():  # else it was refused before it began
                self.run.tell_to_stop()
        finally:
            self.thread.join()


def scored(record: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return a record's step, its scores on meta-val and what is to be raised; nothing if it has none."""
    before, after = (val_score(record, when) for when in ("before", "after"))
    if before is None or after is None:
        return {}
    score = after - before if metric == "gain" else after
    score = score if math.isfinite(score) else -math.inf  # the scheduler compares it
    return {"step": record["step"], "before": before, "after": after, SCORE: score}


def outcome(job: Sweeping, point: dict[str, Any], result: ray.tune.Result) -> Trial:
    """Return what came of a trial."""
    name, metrics = Path(result.path).name, result.metrics or {}
    run = RunFolder(job.run(name))
    state = "failed" if result.error else "finished" if run.is_over(job.config(name, point)) else "stopped"
    score = metrics.get(SCORE)
    return Trial(
        name=name,
        point=rounded(point, job.space),
        state=state,
        score=score if score is not None and math.isfinite(score) else None,
        before=metrics.get("before"),
        after=metrics.get("after"),
        step=metrics.get("step", 0),
        seconds=sum(record["step_seconds"] for record in run.records()),
        run=str(run.path),
        error=reason(result.error) if result.error else None,
    )


def reason(error: Exception) -> str:
    """Return why a trial failed, without Ray's account of how that travelled."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".strip()
