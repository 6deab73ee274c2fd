"""`rayml evaluate`: from a run's folder to a table, `evaluation.json` and `adaptation.png`."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rayml.algorithms.registry import DEFAULT
from rayml.config import Config, dump_config
from rayml.errors import ConfigError, DataError, RunError
from rayml.experiments import report
from rayml.interrupt import with_message
from rayml.progress import progress, show_activity
from rayml.runs.files import AnyPath, parse_path, write_atomically
from rayml.runs.folder import RunFolder, fingerprint
from rayml.sections import Data
from rayml.tasks.episodes import EVALUATION_SEED
from rayml.tasks.prepare import prepare_splits, prepare_tasks
from rayml.tasks.splits import refuse_leaks
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.experiments.evaluate import Parts
    from rayml.model import MetaModel

log = logging.getLogger(__name__)


def evaluate_run(
    run: "RunFolder | MetaModel",
    data: list[str] | None,
    ways: int | None,
    shots: int | None,
    episodes: int,
    seed: int,
    split: str,
    checkpoint: str | None,
    json_file: str | AnyPath | None,
    out: Console,
    err: Console,
) -> dict[str, Any]:
    """Evaluate a run: print the table, write the JSON and the plot, and return what the JSON holds.

    All input is checked before the model is loaded.

    Raises:
        RunError, DataError, ConfigError: no run, no tasks, an unknown split, or no place for the JSON.
    """
    json_path = _writable(json_file) if json_file else None
    if split not in ("test", "val"):
        raise ConfigError(f"split: expected test or val, got {split!r}")
    config = run.trained(checkpoint)[0] if isinstance(run, RunFolder) else run.config
    folder = run if isinstance(run, RunFolder) else run.run
    start = folder.start if folder else None
    if start and not data:
        raise DataError(f"{start}: comes without tasks to be tested on; give --data")
    changes = {key: value for key, value in {"ways": ways, "shots": shots}.items() if value}
    sampling = config.data.model_copy(update=changes)
    tasks = held_out_tasks(config, sampling, data, split, bool(start))
    config.algorithm.check(tasks)
    model = _load_model(run, config, tasks, checkpoint, err)
    outputs = model.run.outputs
    if isinstance(outputs, Path):
        outputs.mkdir(parents=True, exist_ok=True)
    sizes = {"ways": sampling.ways, "shots": sampling.shots, "queries": sampling.queries}
    settings = {**sizes, "episodes": episodes, "seed": seed}
    scores, parts = _scores(model, config, tasks, sampling, settings, err)
    summary = {
        "run": model.run.start or str(model.run.path),
        "checkpoint": model.checkpoint,
        "algorithm": config.algorithm.name,
        "outer_steps": model.step,
        "inner_steps": config.inner.steps,
        "tasks_from": data or f"meta-{split}",
        **settings,
        **scores,
    }
    suffix = "-data" if data else "" if split == "test" else f"-{split}"
    json_path, plot_path = json_path or outputs / f"evaluation{suffix}.json", outputs / f"adaptation{suffix}.png"
    write_atomically(json_path, json.dumps(summary, indent=2) + "\n")
    parts.remove()
    method = "" if config.algorithm.name == DEFAULT else f"{config.algorithm.name}, "
    title = f"{config.model.name}, {sampling.ways}-way {sampling.shots}-shot, {method}after {model.step} outer steps"
    report.plot_adaptation(summary, plot_path, title)
    report.print_evaluation(summary, title, out)
    out.print(f"{json_path}\n{plot_path}", highlight=False, soft_wrap=True)
    return summary


def _writable(file: str | AnyPath) -> AnyPath:
    """Return the path of a file, after making its folder; raise RunError if it cannot be written there."""
    path = parse_path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--json {file}: cannot be written: {error}") from error
    if path.is_dir():
        raise RunError(f"--json {file}: is a folder; give a file")
    return path


def _load_model(run: Any, config: Config, tasks: Sequence[Task], checkpoint: str | None, err: Console) -> Any:
    """Load the model of a run, and check that it can answer the tasks."""
    with show_activity(err, "loading libraries and model"):
        from rayml.lm.abilities import refuse_without_text
        from rayml.lm.check_tasks import check_tasks
        from rayml.model import load

        refuse_without_text(config, tasks)
        model = load(run, checkpoint=checkpoint) if isinstance(run, RunFolder) else run
    if model.run is None:
        raise RunError("an untrained start is evaluated beside a run's; give a run")
    for line in (f"{model.run.start or model.run.path}: {model.checkpoint}", str(model.precision)):
        err.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    check_tasks(model.encoder, tasks)
    return model


def _scores(
    model: "MetaModel", config: Config, tasks: Sequence[Task], data: Data, settings: dict[str, int], err: Console
) -> tuple[dict[str, Any], "Parts"]:
    """Return the scores of all episodes, and the file with those done so far, to be removed once they are written.

    Episodes that were done before an interruption are not done again.
    """
    from rayml.experiments.evaluate import Parts, encoder_beside, evaluate
    from rayml.experiments.summaries import summarize_evaluation

    assert model.run, "checked by `_load_model`"
    episodes, sampler = settings["episodes"], data.sampler(EVALUATION_SEED + settings["seed"])
    inputs = [model.step, model.precision.dtype, settings, fingerprint(tasks), dump_config(config)]
    total, parts = len(tasks) * episodes, Parts(model.run.outputs, inputs)
    err.print(f"{len(tasks)} tasks x {episodes} episodes, each from two starts: {2 * total} adaptations", style="dim")
    try:
        with progress(err) as add_bar:
            evaluation = evaluate(model, tasks, sampler, episodes, parts, add_bar("adapting", total))
            beside = encoder_beside(evaluation, tasks, sampler, episodes, add_bar)
    except KeyboardInterrupt as interrupt:
        message = f"{parts.episodes} of {total} episodes are kept; the same command goes on with the others"
        raise with_message(interrupt, message) from None
    return summarize_evaluation(evaluation) | {"beside": beside}, parts


def held_out_tasks(
    config: Config, data: Data, paths: list[str] | None, split: str, is_start: bool = False
) -> tuple[Task, ...]:
    """Return the tasks of `paths`, or else of the run's own split.

    Args:
        data: the sizes of episodes.
        is_start: whether it is a start that comes with rayml, without the tasks that it was trained on.

    Raises:
        DataError: there are no tasks, they are too small for an episode, or they hold a text of meta-train.
    """
    if paths:
        tasks = prepare_tasks(data.model_copy(update={"path": tuple(paths), "drop_small_classes": True}))
        refuse_leaks("--data", () if is_start else training_tasks(config), tasks)
    else:
        tasks = getattr(prepare_splits(config.data), split)
        data.sampler(seed=0).check(tasks)
    if not tasks:
        raise DataError(f"the run holds out no task for meta-{split}; give --data, or raise data.splits.{split}")
    return tasks


def training_tasks(config: Config) -> tuple[Task, ...]:
    """Return the meta-train tasks of a run, and of those that it continues; none, with a warning, of data that can no
    longer be read."""
    tasks: tuple[Task, ...] = ()
    try:
        tasks = prepare_splits(config.data).train
    except DataError as error:
        log.warning("--data is not compared with what was trained on: %s", error)
    old = RunFolder(config.run.continues) if config.run.continues else None
    if old is None or old.start:  # a start comes without its tasks
        return tasks
    if not old.config.exists():
        log.warning("--data is not compared with what %s was trained on, which is gone", old.path)
        return tasks
    return (*tasks, *training_tasks(old.read_config()))
