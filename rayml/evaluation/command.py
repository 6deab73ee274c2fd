"""What `rayml evaluate` and `rayml adapt` do, from files to files."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rayml.algorithms.registry import DEFAULT
from rayml.config import Config, dump_config
from rayml.errors import ConfigError, DataError, RunError
from rayml.evaluation import report
from rayml.interrupt import kept
from rayml.progress import doing, progress
from rayml.runs.files import Place, made_here, place, write_whole
from rayml.runs.folder import RunFolder, fingerprint
from rayml.sections import Data
from rayml.tasks.prepare import prepare_splits, prepare_tasks
from rayml.tasks.read import read_rows
from rayml.tasks.splits import refuse_leaks
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.evaluation.session import Session
    from rayml.meta.adapt import Params

log = logging.getLogger(__name__)
# Episodes of an evaluation are drawn with their own seeds, far from those of training and validation.
EVALUATION_SEED = 2_000_003


def evaluate_run(
    run_path: str | Place,
    data_path: list[str] | None,
    ways: int | None,
    shots: int | None,
    episodes: int,
    seed: int,
    split: str,
    checkpoint: str | None,
    json_file: Path | None,
    out: Console,
    err: Console,
) -> dict[str, Any]:
    """Evaluate a run; print the table, write the JSON and the plot, and return what the JSON holds.

    Raises:
        RunError, DataError, ConfigError: no run, no tasks, or an unknown split.
    """
    if split not in ("test", "val"):
        raise ConfigError(f"--split: expected test or val, got {split!r}")
    if checkpoint not in (None, "best", "newest"):
        raise ConfigError(f"--checkpoint: expected best or newest, got {checkpoint!r}")
    run = RunFolder(run_path)
    config, _ = run.trained(checkpoint)
    data = config.data.model_copy(update={k: v for k, v in {"ways": ways, "shots": shots}.items() if v})
    tasks = held_out_tasks(config, data, data_path, split)
    config.algorithm.check(tasks)
    with doing(err, "loading libraries and model"):
        from rayml.evaluation.evaluate import evaluate, summarize
        from rayml.evaluation.parts import Parts
        from rayml.evaluation.session import open_session

        session = open_session(run, checkpoint)
    err.print(str(session.precision), style="dim", markup=False, highlight=False, soft_wrap=True)
    session.encoder.check(tasks)
    sampler = data.sampler(EVALUATION_SEED + seed)
    settings = {"ways": data.ways, "shots": data.shots, "queries": data.queries, "episodes": episodes, "seed": seed}
    asked = [session.step, session.precision.dtype, settings, fingerprint(tasks), dump_config(config)]
    total, parts = len(tasks) * episodes, Parts(run.path, asked)
    err.print(f"{len(tasks)} tasks x {episodes} episodes, each from two starts: {2 * total} adaptations", style="dim")
    try:
        with progress(err) as bar:
            found = evaluate(session, tasks, sampler, episodes, parts, bar("adapting", total))
    except KeyboardInterrupt as end:
        message = f"{parts.episodes} of {total} episodes are kept; the same command goes on with the others"
        raise kept(end, message) from None
    parts.remove()
    summary = {
        "run": str(run.path),
        "algorithm": config.algorithm.name,
        "outer_steps": session.step,
        "inner_steps": config.inner.steps,
        "tasks_from": data_path or f"meta-{split}",
        **settings,
        **summarize(found),
    }
    kind = "-data" if data_path else "" if split == "test" else f"-{split}"
    written, picture = json_file or run.path / f"evaluation{kind}.json", run.path / f"adaptation{kind}.png"
    write_whole(written, json.dumps(summary, indent=2) + "\n")
    method = "" if config.algorithm.name == DEFAULT else f"{config.algorithm.name}, "
    title = f"{config.model.name}, {data.ways}-way {data.shots}-shot, {method}after {session.step} outer steps"
    report.plot(summary, picture, title)
    out.print(report.table(summary, title))
    answers = report.answers_table(summary)
    if answers:
        out.print(answers)
    for name, found in summary["tasks"].items():
        if "spans" in found:
            out.print(f"{name}, spans after adapting:\n{found['spans']}", markup=False, highlight=False)
    out.print(f"{written}\n{picture}", highlight=False, soft_wrap=True)
    return summary


def held_out_tasks(config: Config, data: Data, paths: list[str] | None, split: str) -> tuple[Task, ...]:
    """Return the tasks of `paths`, or else of the run's own split; `data` says what an episode takes.

    Raises:
        DataError: there are none, they are too small for an episode, or they hold a text of meta-train.
    """
    if paths:
        tasks = prepare_tasks(data.model_copy(update={"path": tuple(paths), "drop_small_classes": True}))
        refuse_leaks("--data", trained_on(config), tasks)
    else:
        tasks = getattr(prepare_splits(config.data), split)
        data.sampler(seed=0).check(tasks)
    if not tasks:
        raise DataError(f"the run holds out no task for meta-{split}; give --data, or raise data.splits.{split}")
    return tasks


def trained_on(config: Config) -> tuple[Task, ...]:
    """Return the run's meta-train tasks; none, with a warning, where its data cannot be read any more."""
    try:
        return prepare_splits(config.data).train
    except DataError as error:
        log.warning("--data is not compared with what was trained on: %s", error)
        return ()


def adapt_run(run_path: str | Place, examples: Path, to: str | Place, name: str | None, out: Console) -> None:
    """Learn the task in a file of examples from a run's start, and write its adapter.

    Raises:
        RunError, DataError: no run, the folder exists, or examples that cannot be used.
    """
    folder = new_folder(to)
    run = RunFolder(run_path)
    run.trained()  # refuse early what is no finished run
    rows = read_rows([str(examples)])
    if len({row.task for row in rows}) > 1:
        raise DataError(f"{examples}: holds {len({row.task for row in rows})} tasks; adapt to one at a time")
    err = Console(stderr=True)
    with doing(err, "loading libraries and model"):
        from rayml.evaluation.learn import learn, new_task
        from rayml.evaluation.session import open_session
        from rayml.lm.peft_files import write_card

        task = new_task(rows, name or folder.name, run.learned_labels(), run.learned_kind())
        session = open_session(run)
    err.print(str(session.precision), style="dim", markup=False, highlight=False, soft_wrap=True)
    learned = learn(session, task)
    with made_here(folder) as here:
        write_weights(session, learned.weights, here)
        write_card(here, learned.card)
    kind = f"{len(task.options)} labels" if task.options else "free text"
    how = "loss " + " -> ".join(f"{loss:.3f}" for loss in (learned.losses[0], learned.losses[-1]))
    if learned.card.shown and not session.config.algorithm.takes_steps:
        how = f"kept for {'the prompt' if session.config.algorithm.keeps == 'prompt' else 'their hidden states'}"
    out.print(f"learned {task.name!r}: {len(task.examples)} examples, {kind}, {learned.seconds:.2f} s, {how}")
    if learned.losses[-1] > learned.losses[0]:
        out.print("[yellow]the loss rose: the inner steps are too long for this task; lower inner.lr, or learn it[/]")
    out.print(f'next: [bold]rayml predict {folder} --input "..."[/]', highlight=False, soft_wrap=True)


def export_run(run_path: str | Place, to: str | Place, checkpoint: str | None, out: Console) -> None:
    """Write a run's learned start: a stock PEFT folder, or, in mode full, a whole Hugging Face model.

    Raises:
        RunError: no run, or the folder exists.
    """
    folder = new_folder(to)
    run = RunFolder(run_path)
    run.trained(checkpoint)
    from rayml.evaluation.session import open_session

    session = open_session(run, checkpoint)
    with made_here(folder) as here:
        write_weights(session, session.start, here)
    what = "a PEFT adapter on " + session.base if session.lm.adapter else "a Hugging Face model"
    out.print(f"{folder}: {what}, after {session.step} outer steps", highlight=False, soft_wrap=True)


def new_folder(to: str | Place) -> Place:
    """Return the place of a folder to make, or raise RunError if it is there."""
    folder = place(to)
    if folder.exists():
        raise RunError(f"{to}: exists already; give --out a new folder")
    return folder


def write_weights(session: "Session", weights: "Params", folder: Path) -> None:
    """Write weights that a session's model takes as stock libraries read them."""
    from rayml.lm.peft_files import save_adapter, save_model

    if session.lm.adapter:
        save_adapter(folder, weights, session.config, session.base, session.encoder.is_masked)
    else:
        save_model(folder, session.lm.module, weights, session.encoder.tokenizer)
