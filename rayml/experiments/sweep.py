"""A sweep: a Ray Tune search over ordinary training runs, one run folder per trial.

Ray Tune keeps the state of the search in `tune/`; each trial keeps its run, with checkpoints, in `trials/`. So a killed
sweep can resume: finished trials are only read again, the others continue from their last checkpoint.
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

from rayml.config import Config, dump_config, parse_config, with_values
from rayml.errors import ConfigError, RunError, TrainingError
from rayml.experiments.search_space import Range, check_space, parse_space, round_point
from rayml.experiments.sweep_report import Trial, TrialTable, report_sweep
from rayml.lm.abilities import checked_model
from rayml.ray_start import own_ray, processors
from rayml.runs.checkpoint import val_score
from rayml.runs.files import AnyPath, parse_path, write_atomically
from rayml.runs.folder import RunFolder
from rayml.tasks.prepare import prepare_splits
from rayml.training.driver import storage, train, with_absolute_paths
from rayml.training.ray_internals import trial_settings

SCORE = "score"
TUNE = "tune"


@dataclass(frozen=True)
class SweepJob:
    """What every trial needs to know."""

    values: dict[str, Any]
    """The config of the sweep, nested: unlike a `Config` it can be unpickled before an algorithm of the user's own is
    imported."""
    source: str
    at_once: int
    """Trials that run at a time."""
    space: Sequence[Range]

    def config(self, trial: str, point: dict[str, Any]) -> Config:
        """Return the config of a trial, which writes a checkpoint at each validation."""
        settings = round_point(point, self.space)
        settings |= {"run.dir": self.run_path(trial), "run.checkpoint_every": self.values["validation"]["every"]}
        values = {key: value for key, value in self.values.items() if key != "sweep"}
        return parse_config(with_values(values, settings), self.source)

    def run_path(self, trial: str) -> str:
        return str(parse_path(self.values["run"]["dir"]) / "trials" / trial)


def sweep(values: dict[str, Any], source: str, resume: bool, out: Console) -> AnyPath:
    """Search as the config's `sweep` section says; return the folder of `best.yaml`, `trials.*` and `sweep.png`.

    Raises:
        ConfigError, DataError, RunError: the input is bad; nothing was started.
        TrainingError: no trial reached a validation.
    """
    config = with_absolute_paths(parse_config(values, source))
    values = config.model_dump(mode="json")
    space = check_sweep(config, values, source)
    folder = parse_path(config.run.dir)
    begin_sweep(folder, config, resume)
    at_once = 0
    if not os.environ.get("RAY_ADDRESS"):
        at_once = concurrency(config, processors(), 1, torch.cuda.device_count())
    with own_ray(config, max(1, at_once)):
        if not at_once:
            resources = ray.cluster_resources()
            at_once = concurrency(config, int(resources.get("CPU", 0)), 2, int(resources.get("GPU", 0)))
        job = SweepJob(values, source, at_once, space)
        results = run_tune(config, job)
    # A result has its settings only if its trial reached a validation; Ray Tune's own trials always have them.
    points = trial_settings(results)
    trials = [trial_outcome(job, point, results[number]) for number, point in enumerate(points)]
    if all(trial.score is None for trial in trials):
        raise TrainingError(f"{folder}: no trial reached a validation; the first: {trials[0].error or trials[0].state}")
    report_sweep(config, space, trials, folder, out)
    return folder


def check_sweep(config: Config, values: dict[str, Any], source: str) -> list[Range]:
    """Return the ranges to search, or raise ConfigError before anything starts."""
    space = parse_space(config.sweep.search)
    check_space(space, values, source)
    if not config.validation.every:
        raise ConfigError("validation.every: a sweep compares validations; set it to a number of outer steps")
    splits = prepare_splits(config.data)
    if not splits.val:
        raise ConfigError("data.splits.val: a sweep is scored on meta-val, which has no task; raise it")
    checked_model(config, [task for part in splits for task in part])
    return space


def begin_sweep(folder: AnyPath, config: Config, resume: bool) -> None:
    """Write `sweep.yaml`, or check that the folder holds the same sweep.

    Raises:
        RunError: the folder holds a sweep and `resume` is not set, or it holds another sweep.
    """
    path, text = folder / "sweep.yaml", dump_config(config)
    if path.exists():
        if not resume:
            raise RunError(f"{folder}: holds a sweep already; --resume it, or give run.dir another folder")
        if path.read_text(encoding="utf-8") != text:
            raise RunError(f"{folder}: holds another sweep (see {path.name} there); use another run.dir")
    elif folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder}: holds something that is no sweep; give run.dir another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def concurrency(config: Config, cpus: int, cpus_each: int, gpus: int) -> int:
    """Return how many trials run at a time.

    No more trials start than have room for all their workers, so that none waits for workers that another holds.

    Args:
        cpus_each: CPUs that a worker takes.

    Raises:
        ConfigError: the config asks for more than fit.
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


def run_tune(config: Config, job: SweepJob) -> ray.tune.ResultGrid:
    """Run Ray Tune to its end, or resume it."""
    configure_ray_tune()
    # A trial only waits for its workers. Ray Tune insists on some resource; any share of a CPU would cost the workers'
    # episode streams a whole CPU, so the trial takes one byte of memory.
    trainable = ray.tune.with_resources(ray.tune.with_parameters(TrialRun, job=job), {"memory": 1})
    location, distributions = storage(parse_path(config.run.dir)), param_space(config, job.space)
    state, filesystem = f"{location['storage_path']}/{TUNE}", location.get("storage_filesystem")
    if ray.tune.Tuner.can_restore(state, filesystem):
        return ray.tune.Tuner.restore(
            state, trainable, resume_unfinished=True, param_space=distributions, storage_filesystem=filesystem
        ).fit()
    tuner = ray.tune.Tuner(
        trainable,
        param_space=distributions,
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
            **location,
            verbose=0,
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # the run folder has checkpoints
            callbacks=[TrialTable([searched.key for searched in job.space], config.outer.steps)],
        ),
    )
    return tuner.fit()


def configure_ray_tune() -> None:
    """Let Ray Tune save its state every second, and print nothing: `TrialTable` shows the trials."""
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", "The reported value is ignored")  # a resumed trial reports its first steps again


def param_space(config: Config, space: Sequence[Range]) -> dict[str, Any]:
    """Return what Ray Tune draws from: a distribution for each key, or for a grid its values."""
    if config.sweep.searcher == "grid":
        choices = math.prod(len(searched.values) for searched in space if searched.kind == "choice")
        ranges = sum(searched.kind != "choice" for searched in space)
        points = max(2, round((config.sweep.trials / choices) ** (1 / max(1, ranges))))
        return {searched.key: ray.tune.grid_search(searched.spaced(points)) for searched in space}
    return {searched.key: distribution(searched) for searched in space}


def distribution(searched: Range) -> Any:
    if searched.kind == "choice":
        return ray.tune.choice(list(searched.values))
    low, high = searched.values
    if searched.kind == "randint":
        high += 1  # Ray Tune excludes it
    return getattr(ray.tune, searched.kind)(low, high)


def search_algorithm(config: Config, at_once: int) -> Searcher | SearchAlgorithm:
    """Return the seeded searcher."""
    if config.sweep.searcher != "optuna":
        return BasicVariantGenerator(max_concurrent=at_once, random_state=config.seed)
    from ray.tune.search.optuna import OptunaSearch

    return ConcurrencyLimiter(OptunaSearch(metric=SCORE, mode="max", seed=config.seed), max_concurrent=at_once)


def scheduler(config: Config) -> TrialScheduler:
    """Return the scheduler. ASHA stops a trial at a validation where it is not in the best third so far."""
    if config.sweep.scheduler == "none":
        return FIFOScheduler()
    first, last = config.validation.every, config.outer.steps
    return ASHAScheduler(time_attr="step", max_t=last, grace_period=min(first, last), reduction_factor=3)


class TrialRun(ray.tune.Trainable):
    """One trial: a training run in a thread, whose validations are the steps that Ray Tune sees.

    A trial that is stopped early tells its run to stop, and waits until the workers are gone. This takes a class: Ray
    Tune kills a function trainable, and with it Ray Train's controller, whose workers then keep their resources.
    """

    def setup(self, config: dict[str, Any], job: SweepJob) -> None:  # type: ignore[override]  # by `with_parameters`
        self.settings, self.job = job.config(self.trial_id, config), job
        self.run = RunFolder(self.settings.run.dir)
        self.last: dict[str, Any] = {"step": 0}
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._train)
        self.thread.start()

    def _train(self) -> None:
        try:
            train(self.settings, resume=True, at_once=self.job.at_once)
        except Exception as error:  # `step` raises it, where Ray Tune sees it
            self.error = error

    def step(self) -> dict[str, Any]:
        """Wait for the next validation, or the end."""
        metric = self.job.values["sweep"]["metric"]
        while True:
            ended = not self.thread.is_alive()  # checked before reading, so that no record is missed
            records = self.run.records_after(self.last["step"])
            validation = next(filter(None, (validation_scores(record, metric) for record in records)), None)
            if validation and (ended or validation["step"] < self.settings.outer.steps):
                self.last = validation
                return validation
            if ended:
                if self.error:
                    raise self.error
                return self.last | {"done": True}
            time.sleep(self.run.poll_seconds)

    def cleanup(self) -> None:
        try:
            if self.run.path.is_dir():  # else it was refused before it started
                self.run.request_stop()
        finally:
            self.thread.join()


def validation_scores(record: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return a record's step, its meta-val scores, and the score to maximize; nothing if it is no validation."""
    before, after = (val_score(record, when) for when in ("before", "after"))
    if before is None or after is None:
        return {}
    score = after - before if metric == "gain" else after
    score = score if math.isfinite(score) else -math.inf  # the scheduler cannot compare NaN
    return {"step": record["step"], "before": before, "after": after, SCORE: score}


def trial_outcome(job: SweepJob, point: dict[str, Any], result: ray.tune.Result) -> Trial:
    """Return the outcome of a trial."""
    name, metrics = Path(result.path).name, result.metrics or {}
    run = RunFolder(job.run_path(name))
    state = "failed" if result.error else "finished" if run.is_over(job.config(name, point)) else "stopped"
    score = metrics.get(SCORE)
    return Trial(
        name=name,
        point=round_point(point, job.space),
        state=state,
        score=score if score is not None and math.isfinite(score) else None,
        before=metrics.get("before"),
        after=metrics.get("after"),
        step=metrics.get("step", 0),
        seconds=sum(record["step_seconds"] for record in run.records()),
        run=str(run.path),
        error=describe_error(result.error) if result.error else None,
    )


def describe_error(error: Exception) -> str:
    """Return why a trial failed, without the traceback of Ray's own processes."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".strip()
